"Checks that say what is wrong, any loss on a mixture, passes that leave no trace"
from contextlib import nullcontext
import copy
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from hypothesis import given, settings, strategies as st
from advmix.core import *

x,y = torch.rand(6,1,8,8),torch.tensor([3,1,4,1,5,9])
idx = torch.stack([torch.arange(6), torch.arange(6).roll(-1)], 1)
lam = torch.linspace(1, .5, 6)
w   = torch.stack([lam, 1-lam], 1)

# ---------------------------------------------------------------- checks

@pytest.mark.parametrize('bad,says', [
    (x*2-1,            r'lies in \[.*\], not in \[0,1\].*on_pixels'),
    ((x*255).byte(),   'divide by 255'),
    (x*float('nan'),   'contains NaN'),
    (x[0],             r'must be a tensor \(B,C,H,W\)'),
    (x.numpy(),        r'must be a tensor'),
    ('x',              r'got str'),
])
def test_images(bad, says):
    with pytest.raises(ValueError, match=says): check_images(bad)

def test_images_pass_unchanged():
    for ok in (x, x.double(), x[:0], x+5e-5): assert check_images(ok) is ok

@pytest.mark.parametrize('bad,n,says', [
    (y, 5, r'holds labels 1..9, outside 0..4'), (-y, None, 'negative'), (-y, 10, 'outside 0..9'), (y.float(), None, 'class numbers'),
    (y[None], None, 'class numbers'), ([1,2], None, 'got list')])
def test_labels(bad, n, says):
    with pytest.raises(ValueError, match=says): check_labels(bad, n)

@pytest.mark.parametrize('bad,says', [
    (torch.rand(6,10).softmax(1), 'remove its softmax'), (torch.zeros(6,10)/0, 'NaN'), (torch.full((6,10), float('inf')), 'infinite'),
    (torch.randn(6,3), 'outside 0..2'), (torch.randn(6), r'must return logits'), ((1,2), 'got tuple|returns tuple')])
def test_logits(bad, says):
    with pytest.raises(ValueError, match=says): check_logits(bad, y)

def test_trusted_looks_at_shapes_only():
    "Inside, no value is read, which on the meta device would be an error; shapes and types are still checked"
    with trusted():
        check_images(x.to('meta')), check_labels(y.to('meta'), 3), check_logits(torch.zeros(6,10, device='meta'), y.to('meta'))
        with pytest.raises(ValueError, match='B,C,H,W'): check_images(x[0])
        with pytest.raises(ValueError, match='divide by 255'): check_images((x*255).byte())
        with pytest.raises(ValueError, match='class numbers'): check_labels(y.float())
        with trusted(False), pytest.raises(ValueError, match='not in'): check_images(x*2)
        assert check_images(x*2) is not None
    with pytest.raises(ValueError, match='not in'): check_images(x*2)

def test_trust_ends_with_an_exception():
    with pytest.raises(RuntimeError), trusted(): raise RuntimeError
    with pytest.raises(ValueError, match='not in'): check_images(x*2)

@pytest.mark.parametrize('a,b', [(torch.half,torch.float32), (torch.bfloat16,torch.float32), (torch.float32,)*2, (torch.double,)*2])
def test_at_least_float32(a, b): assert at_least_float32(torch.rand(2).to(a)).dtype==b

# ---------------------------------------------------------------- labels and losses

@settings(max_examples=40, deadline=None)
@given(st.integers(1,8), st.integers(1,4), st.integers(2,7))
def test_soft_labels_are_sums_of_weights(B, N, n):
    y,idx,w = torch.randint(0, n, (B,)),torch.randint(0, B, (B,N)),torch.rand(B,N)
    soft = soft_labels(y, idx, w, n)
    for i in range(B):
        for c in range(n): assert abs(soft[i,c]-sum(w[i,k] for k in range(N) if y[idx[i,k]]==c))<1e-5

def no_reduction(p, t): return F.cross_entropy(p, t)
cw = torch.linspace(1, 10, 10)
losses = [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy, no_reduction, nn.CrossEntropyLoss(cw),
    CrossEntropyLossFlat(weight=cw), partial(F.cross_entropy, weight=cw), nn.CrossEntropyLoss(label_smoothing=.1),
    nn.CrossEntropyLoss(reduction='sum'), LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), nn.CrossEntropyLoss(ignore_index=1)]

@pytest.mark.parametrize('i', range(len(losses)))
def test_unmixed_labels_give_the_users_own_loss(i):
    lf,pred = losses[i],torch.randn(6,10)
    before = copy.deepcopy(getattr(lf, '__dict__', {}))
    own = torch.tensor([[1.,0.]]).expand(6,2)
    assert torch.allclose(mixed_loss(lf, pred, y, idx, own), lf(pred, y), atol=1e-6)
    assert str(getattr(lf, '__dict__', {}))==str(before)

@pytest.mark.parametrize('i', [0,1,2,3])
def test_items_and_soft_targets_agree_for_cross_entropy(i):
    pred = torch.randn(6,10)
    assert torch.allclose(mixed_loss(losses[i], pred, y, idx, w), F.cross_entropy(pred, soft_labels(y, idx, w, 10)), atol=1e-6)

def test_float_targets_are_mixed_themselves():
    pred,t = torch.randn(6,10),(torch.rand(6,10)>.7).float()
    want = F.binary_cross_entropy_with_logits(pred, soft_labels(t, idx, w, 10))
    assert torch.allclose(mixed_loss(BCEWithLogitsLossFlat(), pred, t, idx, w), want, atol=1e-6)

def test_half_precision_losses_are_float32():
    assert mixed_loss(F.cross_entropy, torch.randn(6,10).half(), y, idx, w).dtype==torch.float32
    assert item_losses(F.cross_entropy, torch.randn(6,10).bfloat16(), y).dtype==torch.float32

@pytest.mark.parametrize('lf,kw,says', [
    (CrossEntropyLossFlat(), dict(mode='soft'), 'CrossEntropyLossFlat does not take soft targets'),
    (F.mse_loss, {}, 'mse_loss cannot be evaluated per item'), (F.cross_entropy, dict(mode='mean'), "'mean' unknown")])
def test_losses_that_cannot(lf, kw, says):
    with pytest.raises(ValueError, match=says): mixed_loss(lf, torch.randn(6,10), y, idx, w, **kw)

def test_rows_that_do_not_sum_to_one_scale_the_loss():
    pred = torch.randn(6,10)
    assert torch.allclose(mixed_loss(F.cross_entropy, pred, y, idx, 1.7*w), 1.7*mixed_loss(F.cross_entropy, pred, y, idx, w))

# ---------------------------------------------------------------- no trace

def network(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4*36,10))

@pytest.mark.parametrize('mode', ['eval','as_is'])
@pytest.mark.parametrize('fails', [False,True])
def test_untouched(mode, fails):
    net = network().train()
    net[1].eval(); net[4].eval()   # frozen by the user
    net[0].train = None            # nobody may call it
    flags,buffers = [m.training for m in net.modules()],[b.clone() for b in net.buffers()]
    with pytest.raises(RuntimeError, match='mine') if fails else nullcontext(), untouched(net, mode):
        net[1].training = mode=='as_is'   # so that statistics move
        net(x)
        if fails: raise RuntimeError('mine')
    assert [m.training for m in net.modules()]==flags and all(map(torch.equal, net.buffers(), buffers))

def test_untouched_knows_two_modes():
    with pytest.raises(ValueError, match="use 'eval' or 'as_is'"), untouched(network(), 'train'): pass

def test_input_grad_is_the_inputs_alone():
    net,z = network().eval(),x.clone().requires_grad_()
    g = input_grad(F.cross_entropy(net(z), y, reduction='sum'), z)
    assert all(p.grad is None for p in net.parameters()) and z.grad is None and g.shape==x.shape
    alone = x[:1].clone().requires_grad_()
    assert torch.allclose(input_grad(F.cross_entropy(net(alone), y[:1], reduction='sum'), alone), g[:1], atol=1e-6)

def test_device_of():
    for net in (network(), nn.Flatten(), nn.BatchNorm2d(2, affine=False)): assert device_of(net).type=='cpu'
    assert device_of(nn.Flatten(), x.to('meta')).type=='meta' and device_of(network().to('meta')).type=='meta'
