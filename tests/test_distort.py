"Corruptions: the released code's to half a grey level, the same in any batch, on three scales, and without a trace"
import importlib, io
from pathlib import Path
import numpy as np, pytest, torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch import nn
from advmix import data
from advmix.distort import COMMON, EXTRA, SCALES, SEVERITIES, _BUILT_IN, corrupt, corruption_names, severity_scale

def constants(scale): return {k: v[[*SCALES].index(scale)] for k,v in SEVERITIES.items()}

CIFAR_C = constants('CIFAR-C')

def uint8(x): return (x*255).round().byte().permute(0,2,3,1).numpy()

def rms(x, name, source='built-in'):
    return torch.stack([(corrupt(x, name, s, source)-x).square().mean().sqrt() for s in range(1,6)])

def needs_library(): pytest.importorskip('imagecorruptions', exc_type=ImportError)   # also where OpenCV lacks libGL

# against the released code, as stored by make_references.py

REFERENCES = np.load(Path(__file__).parent/'references.npz')

class Legacy:
    "numpy's legacy stream, which the released code draws from, through the interface of a Generator; it draws `(H,W,C)`, we `(C,H,W)`"
    def __init__(self, seed): self.uniform,self.r = np.random.RandomState(seed).uniform,np.random.RandomState(seed)
    def standard_normal(self, size, dtype): return self.r.normal(size=(*size[1:],size[0])).transpose(2,0,1).astype(dtype)
    def poisson(self, lam): return self.r.poisson(lam.transpose(1,2,0)).transpose(2,0,1)

@pytest.mark.parametrize('key', [k for k in REFERENCES if not k.startswith('patchdrop')])
def test_equal_to_the_released_code(key):
    scale,name = key.split('_', 1)
    size  = 224 if key=='imagenet_elastic_transform' else 32
    photo = ImageOps.fit(Image.fromarray(load_sample_images().images[0]), (size,size))
    x = torch.from_numpy(np.array(photo)).permute(2,0,1)[None].float()/255
    for s in range(1,6):
        c   = constants(dict(cifar='CIFAR-C', imagenet='ImageNet-C')[scale])[name][s-1]
        res = _BUILT_IN[name](x, c, [Legacy(s)]).clamp(0,1)[0].permute(1,2,0)[::size//16,::size//16]*255
        worst = 3 if name=='jpeg_compression' else .51   # another libjpeg rounds otherwise; the arrays are whole numbers
        assert np.abs(res.numpy()-REFERENCES[key][s-1]).max()<worst, s

def test_built_in_are_eleven_on_three_scales():
    assert len(REFERENCES.files)==20+6 and set(_BUILT_IN)=={*CIFAR_C} and len(CIFAR_C)==11
    for v in SEVERITIES.values(): assert len(v)==len(SCALES)==3 and all(len(c)==5 for c in v)

def test_scale_follows_the_size(tiles):
    for size,scale in ((8,'CIFAR-C'), (32,'CIFAR-C'), (40,'CIFAR-C'), (64,'Tiny-ImageNet-C'), (224,'ImageNet-C')):
        x = nn.functional.interpolate(tiles[:1], size, mode='bilinear')
        name,note = severity_scale(x)
        assert name==scale and (note is None)==(size!=8)
        assert severity_scale(x, 'library')[0]=='ImageNet-C'
        assert torch.equal(corrupt(x, 'contrast', 2), corrupt(x, 'contrast', 2, scale=scale))
    assert not torch.equal(corrupt(tiles, 'contrast', 2), corrupt(tiles, 'contrast', 2, scale='ImageNet-C'))

def test_elastic_bends_and_keeps_colours(tiles):
    flat = torch.tensor([.2,.5,.8])[None,:,None,None].expand(1,3,32,32)
    for s in range(1,6): torch.testing.assert_close(corrupt(flat, 'elastic_transform', s), flat)
    y = corrupt(tiles, 'elastic_transform', 1)
    assert (y-tiles).abs().amax((1,2,3)).median()>.2 and y.min()>=tiles.min() and y.max()<=tiles.max()

# the built-in set

def test_blur_is_scikit_images(tiles):
    for s,sigma in enumerate(CIFAR_C['gaussian_blur'], 1):
        ref = gaussian_filter(tiles[:3].numpy(), (0,0,sigma,sigma), mode='nearest', truncate=4)
        np.testing.assert_allclose(corrupt(tiles[:3], 'gaussian_blur', s), ref, atol=2e-5)

@pytest.mark.parametrize('severity', range(1,6))
def test_colours_are_hsv(tiles, severity):
    x = torch.cat([tiles[:4], torch.zeros(1,3,32,32), torch.full((1,3,32,32),.5), torch.ones(1,3,32,32)])
    hsv = rgb_to_hsv(x.permute(0,2,3,1).double().numpy())
    a,b = CIFAR_C['saturate'][severity-1]
    sat,bri = hsv.copy(),hsv.copy()
    sat[...,1] = np.clip(sat[...,1]*a+b, 0, 1)
    bri[...,2] = np.clip(bri[...,2]+CIFAR_C['brightness'][severity-1], 0, 1)
    for name,ref in (('saturate',sat),('brightness',bri)):
        np.testing.assert_allclose(corrupt(x, name, severity).permute(0,2,3,1), hsv_to_rgb(ref), atol=1e-5)

def test_pixelate_and_jpeg_are_pillows(tiles):
    for im,p,j in zip(uint8(tiles[:3]), uint8(corrupt(tiles[:3], 'pixelate', 5)), uint8(corrupt(tiles[:3], 'jpeg_compression', 5))):
        im,buf = Image.fromarray(im),io.BytesIO()
        im.save(buf, 'JPEG', quality=40)
        np.testing.assert_array_equal(p, im.resize((20,20), Image.BOX).resize((32,32), Image.BOX))
        np.testing.assert_array_equal(j, Image.open(buf))

def test_contrast_keeps_the_mean_of_each_channel(tiles):
    y = corrupt(tiles, 'contrast', 4)
    torch.testing.assert_close(y.mean((2,3)), tiles.mean((2,3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((2,3)), .3*tiles.std((2,3)), atol=1e-5, rtol=0)

@pytest.mark.parametrize('scale', SCALES)
def test_noises_have_the_published_strength(scale):
    x,c = torch.full((2,3,150,150), .4),constants(scale)
    std = lambda name, s: (_BUILT_IN[name](x, c[name][s-1], [np.random.default_rng(i) for i in (0,1)])-x).std().item()   # not yet clipped
    for s in range(1,6):
        assert std('gaussian_noise', s)==pytest.approx(c['gaussian_noise'][s-1], rel=.02)
        assert std('speckle_noise', s) ==pytest.approx(.4*c['speckle_noise'][s-1], rel=.02)
        assert std('shot_noise', s)    ==pytest.approx((.4/c['shot_noise'][s-1])**.5, rel=.02)
        hit = corrupt(x, 'impulse_noise', s, scale=scale)
        share = (hit!=x).double().mean().item()   # at least 1,350 hits: a standard deviation of 2.7 %
        assert share==pytest.approx(c['impulse_noise'][s-1], rel=.1)
        assert (hit==1).sum().item()==pytest.approx((hit==0).sum().item(), rel=.2) and len(hit.unique())==3

def test_severities_are_monotone_in_distance(tiles):
    for x in (tiles, nn.functional.interpolate(tiles, 64, mode='bilinear')):
        for k in corruption_names(x):
            d = rms(x, k)
            if k=='saturate': assert d[0]<d[1] and d[2]<d[3]<d[4]   # bleaches at 1 and 2, oversaturates from 3 on
            elif k=='elastic_transform': assert d.min()>.02         # an affine map first, then ever finer waves
            elif k=='pixelate': assert (d.diff()[:3]>0).all()       # half the resolution undoes the enlargement
            else: assert (d.diff()>0).all(), (k,d)

def test_severities_on_digits(digits):
    for k in corruption_names(digits[0]):
        d = rms(digits[0], k)
        if k=='elastic_transform': continue
        if k!='pixelate': assert (d.diff()>0).all(), (k,d)          # of 8 pixels .95 leaves 7 and so does .9
        else: assert d[4]>d[0]

@pytest.mark.parametrize('shape', [(2,1,8,8), (2,3,33,20), (1,2,16,9), (1,4,5,7), (3,1,28,28)])
def test_any_size_and_channels(shape):
    x = torch.rand(shape)
    names = corruption_names(x)
    assert ('saturate' in names)==(shape[1]==3)
    for k in names:
        y = corrupt(x, k, 5)
        assert y.shape==x.shape and y.min()>=0 and y.max()<=1 and y.dtype==torch.float32 and not torch.equal(x,y)

# seeds

@pytest.mark.parametrize('source', ['built-in','library'])
def test_images_own_their_randomness(tiles, source):
    if source!='built-in': needs_library()
    x = tiles[:3]
    states = lambda: (torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64)), np.random.get_state()[2])
    before = states()
    for k in corruption_names(x, source):
        y = corrupt(x, k, 3, source)
        parts = torch.cat([corrupt(x[:1], k, 3, source), corrupt(x[1:], k, 3, source, first=1)])
        assert torch.equal(y, parts), k
    assert not torch.equal(corrupt(x, 'gaussian_noise', 3, source, seed=1), corrupt(x, 'gaussian_noise', 3, source))
    after = states()
    assert all(torch.equal(a, b) for a,b in zip(before[:2], after[:2])) and before[2]==after[2]

# the library's nineteen

@pytest.mark.parametrize('size', [8, 32, 64, 224])
def test_nineteen_at_every_size(size):
    needs_library()
    x = data.photos(size, 2)[:1]
    assert set(corruption_names(x, 'library'))==set(COMMON+EXTRA) and len(COMMON+EXTRA)==19
    for k in COMMON+EXTRA:
        y = corrupt(x, k, 3, 'library')
        assert y.shape==x.shape and y.isfinite().all() and y.min()>=0 and y.max()<=1, k
        if not (size==8 and k=='pixelate'): assert (y-x).abs().mean()>.005, k   # pixels enlarged four times survive averaging

def test_library_on_grey_and_oblong():
    needs_library()
    x = torch.rand(1,1,40,33)
    for k in corruption_names(x, 'library'): assert corrupt(x, k, 2, 'library').shape==x.shape

def test_library_severities(tiles):
    needs_library()
    for k in COMMON+EXTRA:
        d = rms(tiles[::8], k, 'library')
        assert d[4]>d[0], (k,d)
        uneven = ('glass_blur','snow','frost','fog','spatter','saturate','elastic_transform')   # no scales of distance as published
        if k not in uneven: assert (d.diff()>0).all(), (k,d)

def test_library_missing(monkeypatch):
    def gone(name): raise ImportError(name)
    monkeypatch.setattr(importlib, 'import_module', gone)
    with pytest.raises(ImportError, match=r"pip install 'advmix\[corruptions\]'"): corrupt(torch.rand(1,3,32,32), 'fog', source='library')

# refusals

@pytest.mark.parametrize('args,says', [
    (dict(name='rain'),                       'use one of gaussian_noise'),
    (dict(name='fog'),                        "unknown to source 'built-in'"),
    (dict(name='saturate', c=1),              'images of 1 channels'),
    (dict(name='contrast', severity=0),       'use 1, 2, 3, 4 or 5'),
    (dict(name='contrast', severity=2.5),     'use 1, 2, 3, 4 or 5'),
    (dict(name='contrast', source='cifar-c'), "use 'built-in' or 'library'"),
    (dict(name='contrast', scale='cifar'),    'use CIFAR-C, Tiny-ImageNet-C, ImageNet-C'),
    (dict(name='contrast', source='library', scale='CIFAR-C'), "ImageNet-C's severities only"),
    (dict(name='contrast', times=255),        'not in'),
])
def test_refusals(args, says):
    args = dict(args)
    x = torch.rand(1,args.pop('c',3),8,8)*args.pop('times',1)
    with pytest.raises(ValueError, match=says): corrupt(x, **args)
