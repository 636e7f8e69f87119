"Corruptions: against independent implementations, the same in any batch, monotone, honest about their source, and without a trace"
import importlib, io
import numpy as np, pytest, torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn
from advmix import data
from advmix.corruption import (CIFAR_C, COMMON, EXTRA, cifar_c, corrupt, corruption_means, corruption_names, corruption_row, corruption_rows, mce)

@pytest.fixture(scope='module')
def tiles():
    "48 pieces of two photographs, 32 pixels a side"
    return torch.cat([p.unfold(1,32,32).unfold(2,32,32).permute(1,2,0,3,4).reshape(-1,3,32,32)[::3] for p in data.photos(288, 2)])[:48]

@pytest.fixture(scope='module')
def digits(): return data.split_tensors(data.digits_dls(), n=60)

def net(c=1, size=8, n=10): return nn.Sequential(nn.Conv2d(c,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(4*size*size,n))

def uint8(x): return (x*255).round().byte().permute(0,2,3,1).numpy()

def rms(x, name, source='like'): return torch.stack([(corrupt(x, name, s, source)-x).square().mean().sqrt() for s in range(1,6)])

def needs_library(): pytest.importorskip('imagecorruptions', exc_type=ImportError)   # also where OpenCV lacks libGL

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

def test_noises_have_the_published_strength():
    x = torch.full((2,3,150,150), .5)
    for s in range(1,6):
        assert (corrupt(x,'gaussian_noise',s)-x).std().item() == pytest.approx(CIFAR_C['gaussian_noise'][s-1], rel=.02)
        assert (corrupt(x,'speckle_noise',s)-x).std().item()  == pytest.approx(.5*CIFAR_C['speckle_noise'][s-1], rel=.02)
        assert (corrupt(x,'shot_noise',s)-x).std().item()     == pytest.approx((.5/CIFAR_C['shot_noise'][s-1])**.5, rel=.02)
        hit = corrupt(x,'impulse_noise',s)
        assert (hit!=x).double().mean().item() == pytest.approx(CIFAR_C['impulse_noise'][s-1], rel=.1)   # 1,350 hits: 2.7 % standard deviation
        assert set(hit.unique().tolist())=={0,.5,1}

def test_severities_are_monotone_in_distance(tiles):
    for x in (tiles, nn.functional.interpolate(tiles, 64, mode='bilinear')):
        for k in corruption_names(x):
            d = rms(x, k)
            if k=='saturate': assert d[0]<d[1] and d[2]<d[3]<d[4]   # bleaches at 1 and 2, oversaturates from 3 on
            else: assert (d.diff()>0).all(), (k,d)

def test_severities_on_digits(digits):
    for k in corruption_names(digits[0]):
        d = rms(digits[0], k)
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

@pytest.mark.parametrize('source', ['like','imagenet-c'])
def test_images_own_their_randomness(tiles, source):
    if source!='like': needs_library()
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
    assert set(corruption_names(x, 'imagenet-c'))==set(COMMON+EXTRA) and len(COMMON+EXTRA)==19
    for k in COMMON+EXTRA:
        y = corrupt(x, k, 3, 'imagenet-c')
        assert y.shape==x.shape and y.isfinite().all() and y.min()>=0 and y.max()<=1, k
        if not (size==8 and k=='pixelate'): assert (y-x).abs().mean()>.005, k   # pixels enlarged four times survive averaging

def test_library_on_grey_and_oblong():
    needs_library()
    x = torch.rand(1,1,40,33)
    for k in corruption_names(x, 'imagenet-c'): assert corrupt(x, k, 2, 'imagenet-c').shape==x.shape

def test_library_severities(tiles):
    needs_library()
    for k in COMMON+EXTRA:
        d = rms(tiles[::8], k, 'imagenet-c')
        assert d[4]>d[0], (k,d)
        if k not in ('glass_blur','snow','frost','fog','spatter','saturate','elastic_transform'): assert (d.diff()>0).all(), (k,d)   # those are not scales of distance as published

def test_library_missing(monkeypatch):
    def gone(name): raise ImportError(name)
    monkeypatch.setattr(importlib, 'import_module', gone)
    with pytest.raises(ImportError, match=r"pip install 'advmix\[corruptions\]'"): corrupt(torch.rand(1,3,32,32), 'fog', source='imagenet-c')

# the official files

@pytest.fixture
def folder(tmp_path, tiles):
    x = tiles[:4]
    for k in ('fog','contrast'): np.save(tmp_path/f'{k}.npy', np.concatenate([uint8(corrupt(x, 'contrast', s)) for s in range(1,6)]))
    np.save(tmp_path/'labels.npy', np.tile([3,1,4,1], 5).astype(np.uint8))
    return tmp_path

def test_files(folder, tiles):
    assert corruption_names(source=folder)==['fog','contrast']
    for s in range(1,6):
        x,y = cifar_c(folder, 'fog', s, n=3)
        torch.testing.assert_close(x, corrupt(tiles[:3], 'contrast', s), atol=.51/255, rtol=0)
        assert y.tolist()==[3,1,4] and y.dtype==torch.int64
    row = corruption_row(net(3,32), None, None, 'fog', str(folder), severities=(1,5))
    assert row['n']==4 and row['source']==f'files in {folder.name}' and len(row['by_severity'])==2
    rows = corruption_rows(net(3,32), tiles[:4], torch.tensor([3,1,4,1]), folder)
    assert [r['name'] for r in rows]==['clean','fog','contrast']   # two of fifteen make no mean

def test_files_refused(folder):
    with pytest.raises(ValueError, match='the folder has fog, contrast; CIFAR-10-C is zenodo'): cifar_c(folder, 'snow')
    np.save(folder/'labels.npy', np.zeros(7))
    with pytest.raises(ValueError, match='20 images for 7 labels'): cifar_c(folder, 'fog')

# rows and means

def test_rows(digits):
    x,y = digits
    model = net()
    rows = corruption_rows(model, x, y, bs=17)
    assert [r['name'] for r in rows]==['clean', *corruption_names(x), 'mean of the 9 CIFAR-C-like']
    assert all({'name','accuracy','n','seconds','source'}<=r.keys() and 0<=r['accuracy']<=1 and r['n']==60 for r in rows)
    assert rows[-1]['accuracy']==pytest.approx(sum(r['accuracy'] for r in rows[1:-1])/9)
    row = rows[1]
    assert row['accuracy']==pytest.approx(sum(row['by_severity'])/5)
    model.eval()
    by_hand = [(model(corrupt(x, row['name'], s)).argmax(1)==y).double().mean().item() for s in range(1,6)]
    assert row['by_severity']==pytest.approx(by_hand)
    again = corruption_rows(model, x, y, bs=60)
    assert [r['accuracy'] for r in again]==[r['accuracy'] for r in rows]

def fake(names, acc, source='files in CIFAR-10-C', clean=.9):
    row = lambda k, a: dict(name=k, accuracy=a, n=9, seconds=0., by_severity=[a]*5, severities=[1,2,3,4,5], source='clean' if k=='clean' else source)
    return [row('clean', clean)] + [row(k, acc) for k in names]

def test_means_need_all():
    assert [r['name'] for r in corruption_means(fake(COMMON+EXTRA, .5))]==['mean of the 15 common', 'mean of all 19']
    assert [r['name'] for r in corruption_means(fake(COMMON, .5))]==['mean of the 15 common']
    assert corruption_means(fake(COMMON[:14]+EXTRA, .5))==[]
    assert corruption_means(fake((), .5))==[]

def test_mce():
    a,b = fake(COMMON+EXTRA, .7),fake(COMMON+EXTRA, .4)
    a[1]['by_severity'] = [.9,.8,.7,.6,.5]
    assert mce(a, b)['value']==pytest.approx(.3/.6)
    assert mce(a, b)['n_corruptions']==15                        # the extras don't count
    assert mce(a, b, relative=True)['value']==pytest.approx(.2/.5)
    assert mce(b, b)['value']==1 and mce(b, b, relative=True)['value']==1
    with pytest.raises(ValueError, match='rows and base differ'): mce(a, fake(COMMON, .4))
    with pytest.raises(ValueError, match='rows and base differ'): mce(a, fake(COMMON+EXTRA, .4, source='imagenet'))
    with pytest.raises(ValueError, match='no error on gaussian_noise'): mce(a, fake(COMMON+EXTRA, 1.))
    with pytest.raises(ValueError, match='no added error'): mce(a, fake(COMMON+EXTRA, .4, clean=.3), relative=True)

# without a trace, and refusals

class Stop(nn.Module):
    def forward(self, x): raise KeyboardInterrupt

@pytest.mark.parametrize('fails', [False, True])
def test_no_trace(digits, fails):
    model = nn.Sequential(net(), *([Stop()] if fails else []))
    model[0][1].eval()
    model[0][0].weight.requires_grad_(False)
    flags,bufs = [m.training for m in model.modules()],[b.clone() for b in model.buffers()]
    try: corruption_row(model, *digits, 'impulse_noise', severities=(5,))
    except KeyboardInterrupt: assert fails
    assert [m.training for m in model.modules()]==flags
    assert all(torch.equal(a, b) for a,b in zip(bufs, model.buffers()))
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()]==[False]+[True]*5

def test_half_models_and_int32_labels(digits):
    x,y = digits
    model = net().eval()
    row = corruption_row(model, x, y, 'contrast')
    assert corruption_row(model.bfloat16(), x, y.int(), 'contrast')['accuracy']==pytest.approx(row['accuracy'], abs=.1)
    assert next(model.parameters()).dtype==torch.bfloat16

@pytest.mark.parametrize('args,says', [
    (dict(name='rain'),                       'use one of gaussian_noise'),
    (dict(name='fog'),                        "unknown to source 'like'"),
    (dict(name='saturate', c=1),              'images of 1 channels'),
    (dict(name='contrast', severity=0),       'use 1, 2, 3, 4 or 5'),
    (dict(name='contrast', severity=2.5),     'use 1, 2, 3, 4 or 5'),
    (dict(name='contrast', source='cifar-c'), "use 'like' or 'imagenet-c'"),
    (dict(name='contrast', scale=255),        'not in'),
])
def test_refusals(args, says):
    args = dict(args)
    x = torch.rand(1,args.pop('c',3),8,8)*args.pop('scale',1)
    with pytest.raises(ValueError, match=says): corrupt(x, **args)
