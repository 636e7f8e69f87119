"PatchDrop: the published masks and fills, drops exactly what it says, nested, independent of batches, honest bands, no trace"
import json, math
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn
from advmix.data import digits_dls, split_tensors
from advmix.data import photos
from advmix.models import Normalize, on_pixels
from advmix.occlusion import _orders, _pixels, occlusion_rows
from advmix.occlusion import _occlude as occlude, _patch_masks as patch_masks, _plot_occlusion as plot_occlusion

def occlusion_row(model, x, y, ratio, **kw): return occlusion_rows(model, x, y, [ratio], **kw)[0]

@pytest.fixture(scope='module')
def digits(): return split_tensors(digits_dls(), n=60)

def net(): return nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(256,10))

class Template(nn.Module):
    "Nearest class mean: not constant, no randomness, sensitive to holes"
    def __init__(self, x, y):
        super().__init__()
        self.register_buffer('m', torch.stack([x[y==c].mean(0).flatten() for c in range(10)]))
    def forward(self, x): return -torch.cdist(x.flatten(1), self.m)

@pytest.fixture(scope='module')
def template(): return Template(*split_tensors(digits_dls(), 'train'))

# as published: stored by make_references.py, patch by patch, black before normalisation or zero after it

REFERENCES = np.load(Path(__file__).parent/'references.npz')
MEAN = [.485,.456,.406]

@pytest.mark.parametrize('ratio', [.1,.5])
@pytest.mark.parametrize('fill', ['black','mean'])
def test_published_fills_and_patches(ratio, fill):
    x = photos(28, 1)
    cells = torch.zeros(196, dtype=torch.bool)
    cells[torch.from_numpy(REFERENCES[f'patchdrop_index_{ratio}']).long()] = True
    y = occlude(x, _pixels(cells.reshape(1,14,14), 28, 28), MEAN if fill=='mean' else fill)
    torch.testing.assert_close(y, torch.from_numpy(REFERENCES[f'patchdrop_{fill}_{ratio}']), atol=1e-5, rtol=0)

@pytest.mark.parametrize('ratio', [.1,.5])
def test_published_number_of_patches(ratio):
    m = patch_masks(5, ratio, (224,224), shared=True, floor=True)
    assert (m==m[:1]).all()                                                          # one draw for the batch
    cells = m[0].reshape(14,16,14,16).permute(0,2,1,3).reshape(196,-1)
    assert cells.float().mean(1).unique().tolist()==[0,1]                            # whole patches of 16 pixels
    assert cells[:,0].sum()==len(REFERENCES[f'patchdrop_index_{ratio}'])==int(ratio*196)
    first = _orders([(0,0,0)], 14).flatten().argsort()[:int(ratio*196)]              # the patches that come first in the order
    assert set(first.tolist())==set(cells[:,0].nonzero().flatten().tolist())

def test_mean_is_zero_after_normalisation(digits):
    x,y = digits
    model = on_pixels(net().eval(), .4, .3)
    class Holes(nn.Module):
        "Zero after normalisation, written by hand"
        def forward(self, z): return model[1](torch.where(patch_masks(len(z), .5, (8,8))[:,None], 0., model[0](z)))
    row = occlusion_row(model, x, y, .5, fill='mean', draws=1)
    assert row['accuracy']==(Holes()(x).argmax(1)==y).double().mean().item() and row['colour']==pytest.approx([.4])
    bare = occlusion_row(model[1], x, y, .5, fill='mean', draws=1)
    assert bare['colour']==pytest.approx([x.mean().item()]) and isinstance(model[0], Normalize)

# masks

@given(st.integers(1,7), st.integers(8,40), st.integers(8,40), st.integers(1,8), st.floats(0,1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_drops_exactly_the_ratio(n, h, w, g, ratio, shared):
    m = patch_masks(n, ratio, (h,w), g, shared)
    assert m.shape==(n,h,w) and m.dtype==torch.bool
    edges = [torch.linspace(0, s, g+1).round().long() for s in (h,w)]
    pairs = lambda e: list(zip(e, e[1:]))
    cells = torch.stack([torch.stack([m[:,a:b,c:d].float().mean((1,2)) for c,d in pairs(edges[1])], 1) for a,b in pairs(edges[0])], 1)
    assert ((cells==0)|(cells==1)).all()                             # whole patches
    assert (cells.sum((1,2))==round(ratio*g*g)).all()                # exactly so many
    if h%g==0 and w%g==0: assert m.double().mean((1,2)).tolist()==pytest.approx([round(ratio*g*g)/(g*g)]*n)
    if shared: assert (m==m[:1]).all()

def test_published_grid():
    m = patch_masks(3, .5, (224,224))
    assert m.double().mean((1,2)).tolist()==[.5]*3
    assert torch.equal(m, m[:,::16,::16].repeat_interleave(16,1).repeat_interleave(16,2))   # 14×14 patches of 16 pixels
    assert patch_masks(1, .5, (8,8)).sum()==32 and patch_masks(1, 1/16, (8,8)).sum()==4      # 4×4 patches of 2 pixels on the digits

def test_nested_and_seeded():
    ms = [patch_masks(4, r/10, (28,28)) for r in range(11)]
    assert all((a<=b).all() for a,b in zip(ms, ms[1:]))
    a = patch_masks(4, .5, (28,28))
    assert torch.equal(a[2:], patch_masks(2, .5, (28,28), first=2))
    assert not torch.equal(a[0], a[1])
    for kw in (dict(seed=1), dict(draw=1)): assert not torch.equal(a, patch_masks(4, .5, (28,28), **kw))

def test_masks_are_uniform():
    m = patch_masks(4000, .25, (8,8), grid=4).float().mean(0)
    assert (m-.25).abs().max()<4*math.sqrt(.25*.75/4000)

def test_occlude():
    x,m = torch.rand(2,3,28,28),patch_masks(2, .3, (28,28))
    k = m[:,None].expand_as(x)
    for fill,c in (('black',torch.zeros(3)),('mean',x.mean((0,2,3))),(.5,torch.full((3,),.5)),([.1,.2,.3],torch.tensor([.1,.2,.3]))):
        y = occlude(x, m, fill)
        assert torch.equal(y[~k], x[~k])
        torch.testing.assert_close(y[k], c[:,None,None].expand_as(x)[k])

# curves

def test_ends_of_the_curve(digits, template):
    x,y = digits
    acc = lambda x: (template(x).argmax(1)==y).double().mean().item()
    rows = occlusion_rows(template, x, y, draws=3)
    assert [r['name'] for r in rows]==[f'occlusion {r/10:g}' for r in range(11)]
    assert rows[0]['accuracy']==acc(x) and rows[-1]['accuracy']==acc(torch.zeros_like(x))
    assert len(rows[0]['draws'])==len(rows[-1]['draws'])==1 and len(rows[5]['draws'])==3
    assert rows[0]['accuracy']>.8 and rows[-1]['accuracy']<.25 and rows[5]['accuracy']<rows[1]['accuracy']
    json.dumps(rows)
    for r in rows:
        right = [int(v) for v in r['per_image'].split()]
        assert len(right)==60 and max(right)<=r['of'] and sum(right)/60/r['of']==pytest.approx(r['accuracy'])

def test_parts_are_the_whole(digits, template):
    x,y = digits
    whole = occlusion_row(template, x, y, .5, draws=2)
    a,b = occlusion_row(template, x[:25], y[:25], .5, draws=2),occlusion_row(template, x[25:], y[25:], .5, draws=2, first=25)
    assert whole['per_image']==a['per_image']+' '+b['per_image']

def test_by_hand_and_in_any_batch(digits, template):
    x,y = digits
    row = occlusion_row(template, x, y, .5, draws=2, fill='mean', grid=8)
    hand = [(template(occlude(x, patch_masks(60, .5, (8,8), 8, draw=d), 'mean')).argmax(1)==y).double().mean().item() for d in range(2)]
    assert row['draws']==pytest.approx(hand) and row['accuracy']==pytest.approx(sum(hand)/2)
    assert occlusion_row(template, x, y, .5, draws=2, fill='mean', grid=8, bs=7)['draws']==row['draws']
    shared = occlusion_row(template, x, y, .5, draws=1, shared=True, bs=40)
    m = torch.cat([patch_masks(40, .5, (8,8), shared=True), patch_masks(20, .5, (8,8), shared=True, first=40)])
    assert shared['accuracy']==pytest.approx((template(occlude(x, m)).argmax(1)==y).double().mean().item())

def test_band_is_students(digits, template):
    row = occlusion_row(template, *digits, .5, draws=6)
    lo,hi = stats.t.interval(.95, 5, loc=np.mean(row['draws']), scale=stats.sem(row['draws']))
    assert (row['lo'],row['hi'])==pytest.approx((max(lo,0),min(hi,1)))
    one = occlusion_row(template, *digits, .5, draws=1)
    assert one['lo'] is None and one['hi'] is None

def test_own_masks_are_the_better_estimate(digits, template):
    spread = {s:np.std(occlusion_row(template, *digits, .5, draws=15, shared=s)['draws']) for s in (True,False)}
    assert spread[False]<.7*spread[True]

def test_plot(digits, template):
    rows = lambda ratios, draws: occlusion_rows(template, *digits, ratios=ratios, draws=draws)
    ax = plot_occlusion(dict(a=rows((0,.5,1), 2), b=rows((0,1), 1)))
    assert [l.get_label() for l in ax.get_lines()]==['a','b']

# no trace, refusals

def test_no_trace(digits):
    model = net()
    model[1].eval()
    flags,bufs = [m.training for m in model.modules()],[b.clone() for b in model.buffers()]
    rng,npr = torch.get_rng_state(),np.random.get_state()[1].copy()
    x = digits[0].clone()
    occlusion_row(model, x, digits[1], .5, draws=2)
    assert [m.training for m in model.modules()]==flags and torch.equal(x, digits[0])
    assert all(torch.equal(a, b) for a,b in zip(bufs, model.buffers()))
    assert torch.equal(rng, torch.get_rng_state()) and (npr==np.random.get_state()[1]).all()

@pytest.mark.parametrize('kw,says', [
    (dict(ratio=30),                 'ratio 30 is not a share'),
    (dict(ratio=float('nan')),       'not a share'),
    (dict(ratio=.5, grid=9),         'from 1 to 8'),
    (dict(ratio=.5, grid=2.),        'whole number'),
    (dict(ratio=.5, fill='zero'),    "'black', 'mean'"),
    (dict(ratio=.5, fill=128),       'in \\[0,1\\]'),
    (dict(ratio=.5, fill=[0,.5]),    'each of 1 channels'),
    (dict(ratio=.5, draws=0),        'at least 1'),
])
def test_refusals(digits, kw, says):
    with pytest.raises(ValueError, match=says): occlusion_row(net(), *digits, **kw)

def test_refuses_normalised(digits):
    with pytest.raises(ValueError, match='on_pixels'): occlusion_row(net(), (digits[0]-.5)/.3, digits[1], .5)
