"Accuracy under corruptions: rows by hand, official files that belong to the images, strict means, mCE, and no trace"
from contextlib import nullcontext
import numpy as np, pytest, torch
from torch import nn
from advmix import data
from advmix.corruption import _complete, _means, _cifar_c as cifar_c, corruption_rows, mce
from advmix.distort import COMMON, EXTRA, corrupt, corruption_names

BUILT_IN = corruption_names()

def uint8(x): return (x*255).round().byte().permute(0,2,3,1).numpy()

def net(c=1, size=8, n=10):
    return nn.Sequential(nn.Conv2d(c,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(4*size*size,n))

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
        x,y = cifar_c(folder, 'fog', s, [0,2,1])
        torch.testing.assert_close(x, corrupt(tiles[[0,2,1]], 'contrast', s), atol=.51/255, rtol=0)
        assert y.tolist()==[3,4,1] and y.dtype==torch.int64
    y = torch.tensor([3,1,4,1])
    rows = corruption_rows(net(3,32), tiles[:4], y, str(folder), severities=(1,5))
    assert [r['name'] for r in rows]==['clean','fog','contrast']   # two of fifteen make no mean
    assert rows[1]['n']==4 and rows[1]['source']==f'files in {folder.name}' and len(rows[1]['by_severity'])==2
    part = corruption_rows(net(3,32), tiles[[1,3]], y[[1,3]], folder, index=[1,3])
    assert part[1]['n']==2

def test_files_must_belong_to_the_images(folder, tiles):
    model,y = net(3,32),torch.tensor([3,1,4,1])
    with pytest.raises(ValueError, match='3 of 4 labels differ'): corruption_rows(model, tiles[:4], torch.tensor([1,2,4,3]), folder)
    with pytest.raises(ValueError, match='not corrupted versions'): corruption_rows(model, tiles[20:24], y, folder)
    with pytest.raises(ValueError, match='yours are'): corruption_rows(net(), torch.rand(4,1,8,8), y, folder)
    with pytest.raises(ValueError, match='outside the 4 images'): cifar_c(folder, 'fog', 1, range(9))

def test_files_refused(folder):
    with pytest.raises(ValueError, match='the folder has fog, contrast; CIFAR-10-C is zenodo'): cifar_c(folder, 'snow')
    np.save(folder/'labels.npy', np.zeros(7))
    with pytest.raises(ValueError, match='20 images for 7 labels'): cifar_c(folder, 'fog')

# rows and means

def test_rows(digits):
    x,y = digits
    model = net()
    rows = corruption_rows(model, x, y, bs=17)
    assert [r['name'] for r in rows]==['clean', *corruption_names(x), 'mean of the 10 CIFAR-C-like']
    assert all({'name','accuracy','n','seconds','source'}<=r.keys() and 0<=r['accuracy']<=1 and r['n']==60 for r in rows)
    assert rows[-1]['accuracy']==pytest.approx(sum(r['accuracy'] for r in rows[1:-1])/10)
    row = rows[1]
    assert row['accuracy']==pytest.approx(sum(row['by_severity'])/5)
    model.eval()
    by_hand = [(model(corrupt(x, row['name'], s)).argmax(1)==y).double().mean().item() for s in range(1,6)]
    assert row['by_severity']==pytest.approx(by_hand)
    again = corruption_rows(model, x, y, bs=60)
    assert [r['accuracy'] for r in again]==[r['accuracy'] for r in rows]
    right = [int(v) for v in rows[-1]['per_image'].split()]
    assert len(right)==60 and rows[-1]['of']==50 and sum(right)/60/50==pytest.approx(rows[-1]['accuracy'])

def test_scale_and_source_are_in_the_rows(tiles):
    for size,scale in ((8,'CIFAR-C'), (32,'CIFAR-C'), (64,'Tiny-ImageNet-C'), (224,'ImageNet-C')):
        x = nn.functional.interpolate(tiles[:1], size, mode='bilinear')
        rows = corruption_rows(net(3,size), x, torch.tensor([0]), severities=(1,), bs=1)
        assert scale in rows[1]['source'] and rows[-1]['name']==f'mean of the 11 {scale}-like'
        assert ('flags' in rows[-1])==(size==8)
    with pytest.raises(ValueError, match="lacks fog: it has gaussian"):
        corruption_rows(net(3,32), tiles[:1], torch.tensor([0]), names=["fog"])
    with pytest.raises(ValueError, match="use 1, 2, 3"): corruption_rows(net(3,32), tiles[:1], torch.tensor([0]), severities=(0,))

def test_parts_are_the_whole(digits):
    x,y = digits
    model,kw = net().eval(),dict(names=['gaussian_noise','elastic_transform'], severities=(3,))
    whole = corruption_rows(model, x, y, **kw)
    parts = [corruption_rows(model, x[:25], y[:25], **kw),corruption_rows(model, x[25:], y[25:], first=25, **kw)]
    for w,a,b in zip(whole, *parts): assert w['accuracy']*60==pytest.approx(a['accuracy']*25+b['accuracy']*35)

def fake(names, acc, source='files in CIFAR-10-C', clean=.9, channels=3):
    def row(k, a): return dict(name=k, accuracy=a, n=9, seconds=0., by_severity=[a]*5, severities=[1,2,3,4,5], channels=channels,
                               source='clean' if k=='clean' else source, right=torch.full((9,), 3))
    return [row('clean', clean)] + [row(k, acc) for k in names]

def test_means_need_all():
    means = lambda names, source='files': [r['name'] for r in _means(fake(names, .5), source, 'CIFAR-C')]
    assert means(COMMON+EXTRA)==['mean of the 15 common','mean of all 19'] and means(COMMON)==['mean of the 15 common']
    assert means(COMMON[:14]+EXTRA)==[] and means(())==[]
    assert means(COMMON+EXTRA, 'library')==["mean of the library's 15","mean of the library's 19"]
    assert means([*BUILT_IN], 'built-in')==['mean of the 11 CIFAR-C-like'] and means([*BUILT_IN][1:], 'built-in')==[]

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

@pytest.mark.parametrize('names,source,channels', [
    (COMMON[:2], 'files in c', 3), (COMMON[1:]+EXTRA, 'files in c', 3), ((), 'files in c', 3),
    (COMMON[:14], 'imagecorruptions-imaug, x', 3),
    (['contrast','pixelate'], 'built in, as released, CIFAR-C severities', 1),
    ([k for k in BUILT_IN if k!='saturate'], 'built in, as released, CIFAR-C severities', 3)])
def test_mce_needs_a_complete_set(names, source, channels):
    rows = fake(names, .5, source, channels=channels)
    with pytest.raises(ValueError, match='complete set'): mce(rows, rows)

def test_mce_of_grey_images_does_without_saturation():
    rows = fake([k for k in BUILT_IN if k!='saturate'], .5, 'built in, as released, CIFAR-C severities', channels=1)
    assert mce(rows, rows)['n_corruptions']==10 and _complete({r['name']:r for r in rows})[1].startswith('built in')
    with pytest.raises(ValueError, match='complete set'): mce(rows[1:], rows[1:])   # no clean row

# without a trace, and refusals

class Stop(nn.Module):
    def forward(self, x): raise KeyboardInterrupt

@pytest.mark.parametrize('fails', [False, True])
def test_no_trace(digits, fails):
    model = nn.Sequential(net(), *([Stop()] if fails else []))
    model[0][1].eval()
    model[0][0].weight.requires_grad_(False)
    flags,bufs = [m.training for m in model.modules()],[b.clone() for b in model.buffers()]
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        corruption_rows(model, *digits, names=['impulse_noise'], severities=(5,))
    assert [m.training for m in model.modules()]==flags
    assert all(torch.equal(a, b) for a,b in zip(bufs, model.buffers()))
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()]==[False]+[True]*5

def test_half_models_and_int32_labels(digits):
    x,y = digits
    model = net().eval()
    row = corruption_rows(model, x, y, names=['contrast'])[1]
    half = corruption_rows(model.bfloat16(), x, y.int(), names=['contrast'])[1]
    assert half['accuracy']==pytest.approx(row['accuracy'], abs=.1)
    assert next(model.parameters()).dtype==torch.bfloat16
