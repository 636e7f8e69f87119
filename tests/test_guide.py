"Guides: gradients for networks that have none, or wrong ones"
import pytest, torch, torch.nn.functional as F
from torch import nn
from advmix.attack import Threat, pgd
from advmix.guide import GUIDES, margin_loss, _Differences, _Rescaled, _Shortcut, _Smoothed, _ends
from zoo_of_defences import Around, Detached, FlippedGradient, Rounding, Saturated, Thermometer, ThroughNumpy

@pytest.fixture(scope='module')
def digits():
    from sklearn.datasets import load_digits
    d = load_digits()
    return torch.tensor(d.images/16).float()[:,None],torch.tensor(d.target)

@pytest.fixture(scope='module')
def net(digits):
    torch.manual_seed(0)
    (x,y),m = digits,nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512,10))
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    for b in torch.cat([torch.randperm(1300) for _ in range(4)]).split(100):
        opt.zero_grad()
        F.cross_entropy(m(x[b]), y[b]).backward()
        opt.step()
    return m.eval().requires_grad_(False)

@pytest.fixture
def xy(digits): return digits[0][1300:1340],digits[1][1300:1340]

t = Threat(eps=.15, steps=20)

def grad(m, x, y):
    z = x.clone().requires_grad_()
    return torch.autograd.grad(margin_loss(m(z), y).sum(), z)[0]

def left(m, z, y): return (m(z).argmax(1)==y).float().mean().item()

def test_margin_loss():
    logits = torch.tensor([[1.,5.,2.],[1.,5.,2.]])
    assert margin_loss(logits, torch.tensor([1,2])).tolist()==[-3,3]

@pytest.mark.parametrize('defence', [Detached, ThroughNumpy, FlippedGradient])
def test_the_shortcut_gives_the_gradient_behind_the_defence(defence, net, xy):
    x,y = xy
    m = defence(net)
    g = _Shortcut(m, entry=net)
    assert torch.allclose(g(x), m(x)) and torch.allclose(grad(g, x, y), grad(net, x, y), atol=1e-6)
    assert not net._forward_pre_hooks and not net._forward_hooks

class InNoGrad(Around):
    def forward(self, x):
        with torch.no_grad(): return self.net(x)

def test_the_shortcut_opens_no_grad(net, xy):
    x,y = xy
    m = InNoGrad(net)
    assert torch.allclose(grad(_Shortcut(m, entry=net), x, y), grad(net, x, y), atol=1e-6)
    assert torch.is_grad_enabled()
    with torch.no_grad(): _Shortcut(m, entry=net)(x)
    assert torch.is_grad_enabled()

def test_the_shortcut_leaves_at_the_exit(net, xy):
    x,y = xy
    m = Saturated(net)
    assert torch.equal(_Shortcut(m, exit=net)(x), net(x)) and torch.allclose(grad(_Shortcut(m, exit=net), x, y), grad(net, x, y), atol=1e-6)

def test_hooks_go_also_after_a_fault(net, xy):
    class Stops(Around):
        def after(self, logits): raise KeyError('stop')
    with pytest.raises(KeyError): _Shortcut(Stops(net), entry=net)(xy[0])
    assert not net._forward_pre_hooks and not net._forward_hooks

def test_a_stand_in_gives_its_gradient_only(net, xy):
    x,y = xy
    class Steps(nn.Module):
        def forward(self, x): return (x*8).round()/8
    m = nn.Sequential(Steps(), net)
    seen = []
    def soft(u):
        seen.append(u)
        return 3*u
    g = GUIDES['shortcut'](m, x, y, t, stand_in=(m[0], soft))
    assert torch.equal(g(x), m(x)) and seen
    assert torch.allclose(grad(g, x, y), 3*grad(net, m[0](x), y), atol=1e-5)

def test_ends_in_the_order_of_execution(net, xy):
    m = Rounding(net)
    entries,exits = _ends(m, xy[0], 10)
    assert entries[:2]==[None, net[0]] and net[3] in exits and exits[0] is None

@pytest.mark.parametrize('defence', [Rounding, Detached, Thermometer, FlippedGradient, Saturated])
def test_the_chosen_shortcut_brings_the_defence_down(defence, net, xy):
    torch.manual_seed(0)
    x,y = xy
    m = defence(net)
    g = GUIDES['shortcut'](m, x, y, t)
    z = pgd(g, x, y, t, loss=margin_loss)
    assert left(m, z, y)<=left(net, pgd(net, x, y, t, loss=margin_loss), y)+.1

def test_no_shortcut_where_there_is_no_module(xy):
    class Flat(nn.Module):
        def forward(self, x): return torch.zeros(len(x), 10)
    assert GUIDES['shortcut'](Flat(), *xy, t) is None

def test_differences_measure_the_gradient(net, xy):
    torch.manual_seed(0)
    x,y = xy
    g,e = grad(net, x, y).flatten(1),grad(_Differences(net, 1e-3, k=400), x, y).flatten(1)
    assert F.cosine_similarity(g, e).median()>.9 and torch.equal(_Differences(net, 1e-3)(x), net(x))

def test_smoothing_and_scaling(net, xy):
    torch.manual_seed(0)
    x,y = xy
    class Ripple(Around):
        def before(self, x): return x+.02*torch.sin(400*x)
    x = (x+.1*torch.rand_like(x)).clamp(0,1)   # digits have seventeen grey values, so the ripple would be the same everywhere
    cos = lambda m: F.cosine_similarity(grad(m, x, y).flatten(1), grad(net, x, y).flatten(1)).mean()
    assert cos(_Smoothed(Ripple(net), .04, k=64))>cos(Ripple(net))+.2
    out = _Rescaled(net)(x)
    assert torch.equal(out.argmax(1), net(x).argmax(1)) and torch.allclose(out.amax(1)-out.amin(1), torch.tensor(5.))

def test_a_surrogate_answers_as_the_network_and_fools_it(net, xy):
    torch.manual_seed(0)
    x,y = xy
    m = Rounding(net)
    s = GUIDES['surrogate'](m, x, y, t)
    assert (s(x).argmax(1)==m(x).argmax(1)).float().mean()>.9 and not s.training
    assert left(m, pgd(s, x, y, t, loss=margin_loss), y)<left(m, x, y)-.3
