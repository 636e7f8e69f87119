"Mixing in one forward pass: exact, once, and gone whatever happens"
import copy, gc, pickle
import pytest, torch, torch.nn.functional as F
from torch import nn
from advmix.models import get_model, on_pixels
from advmix.mix import MixUp
from advmix.zoo import RandomMix
from advmix.manifold import ManifoldMix, _find_layer as find_layer

@pytest.fixture
def net(): return get_model('convnet', 4, c_in=3, size=16).double()
@pytest.fixture
def batch(): return torch.rand(6,3,16,16).double(),torch.tensor([0,1,2,3,0,1])
def hooks(net): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in net.modules())
def armed_at(net): return [n for n,m in net.named_modules() if any('mix' in getattr(h, '__name__', '') for h in m._forward_hooks.values())]
def mixed_by_hand(h, m): return m.w[:,0,None,None,None]*h+m.w[:,1,None,None,None]*h[m.idx[:,1]]

@pytest.mark.parametrize('layer,k', [(0,1),(1,2),('stage3',3),(-1,3)])
def test_equals_the_computation_by_hand(net, batch, layer, k):
    x,y = batch
    m   = ManifoldMix(layers=[layer])(x, y, net)
    assert m.x is x and m.mask is None and m.w.dtype==torch.float32 and len(armed_at(net))==1
    loss = m.loss(F.cross_entropy, net(m.x), y)
    got  = torch.autograd.grad(loss, list(net.parameters()))
    h    = net[1][:k](net[0](x))
    want = torch.autograd.grad(m.loss(F.cross_entropy, net[1][k:](mixed_by_hand(h, m)), y), list(net.parameters()))
    assert hooks(net)==0 and all(torch.allclose(a, b, atol=1e-10) for a,b in zip(got, want))
    assert torch.equal(m.x, x)

def test_input_layer_is_mixup(net, batch):
    x,y = batch
    torch.manual_seed(3)
    m = ManifoldMix(layers=['input'])(x, y, net)
    torch.manual_seed(3)
    torch.randint(1, ())
    want = MixUp(2.)(x)
    assert torch.equal(m.x, want.x) and torch.equal(m.idx, want.idx) and hooks(net)==0

def test_all_layers_come_up_and_seed_decides(net, batch):
    x,y = batch
    mixer,where = ManifoldMix(),[]
    for _ in range(60):
        with mixer.armed(x, y, net) as m:
            where.append(armed_at(net) or ['input'])
            net(m.x)
    counts = [sum(w[0].endswith(n) for w in where) for n in ('input','stage1','stage2')]
    assert min(counts)>8 and sum(counts)==60
    def run():
        torch.manual_seed(4)
        m = mixer(x, y, net)
        return net(m.x)
    net.eval()
    assert torch.equal(run(), run())

def test_fires_once(net, batch):
    x,y = batch
    net.eval()
    plain,mixer = net(x),ManifoldMix(layers=[1])
    m = mixer(x, y, net)
    assert not torch.allclose(net(x), plain) and torch.equal(net(x), plain) and mixer.disarm() is False
    m = mixer(x, y, net)
    assert mixer.disarm() is True and mixer.disarm() is False and torch.equal(net(x), plain)

def test_arming_again_replaces(net, batch):
    x,y = batch
    mixer = ManifoldMix(layers=[0,1])
    ms = [mixer(x, y, net) for _ in range(5)]
    assert len(armed_at(net))==1 and len(ms)==5

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
def test_exceptions(net, batch, exc):
    x,y = batch
    with pytest.raises(exc):
        with ManifoldMix(layers=[1]).armed(x, y, net): raise exc('stop')
    assert hooks(net)==0
    def boom(m, i): raise exc('inside')
    h = net[1].stage1.register_forward_pre_hook(boom)
    with pytest.raises(exc):
        with ManifoldMix(layers=[1]).armed(x, y, net) as m: net(m.x)
    h.remove()
    assert hooks(net)==0

class Fault(nn.Module):
    "Fails in the pass it is told to"
    def __init__(self, exc):
        super().__init__()
        self.exc,self.on = exc,False
    def forward(self, x):
        if self.on: raise self.exc('inside')
        return x

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
@pytest.mark.parametrize('where', ['before','after','wrapper'])
@pytest.mark.parametrize('wrap', [False,True])
def test_a_pass_that_failed_leaves_the_next_one_alone(batch, exc, where, wrap):
    "The `Mixed` lives on, in a traceback for instance; a pass by hand is neither mixed nor fails, whatever its batch size"
    x,y  = batch
    fault = Fault(exc)
    parts = [nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,4)]
    inner = nn.Sequential(*(parts if where=='wrapper' else [fault,*parts] if where=='before' else [*parts,fault])).double()
    outer = nn.Sequential(fault if where=='wrapper' else nn.Identity(), inner)
    run   = outer if wrap or where=='wrapper' else inner
    plain,part = inner(x),inner(x[:2])
    for layer in (inner[1] if where=='before' else inner[0],):
        mixer = ManifoldMix(layers=[layer])
        m = mixer(x, y, outer)
        fault.on = True
        with pytest.raises(exc, match='inside'): run(m.x)
        fault.on = False
        if (where,exc)==('wrapper',KeyboardInterrupt): run(x[:2])   # nothing around the layer has seen a beginning or an end but `outer`
        assert torch.equal(inner(x[:2]), part) and torch.equal(inner(x), plain) and torch.equal(outer(x), plain) and hooks(outer)==0
        assert mixer.disarm()==(where!='after') and len(m.x)==6

def test_a_layer_that_was_passed_by_is_not_mixed_later(batch):
    "Stochastic depth, say: the pass ended without the layer, and the next one is not the one it was meant for"
    x,y = batch
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.skip = nn.Conv2d(3,3,1),nn.Conv2d(3,3,1),True
        def forward(self, x): return self.a(x) if self.skip else self.b(self.a(x))
    net = Skips().double()
    mixer = ManifoldMix(layers=['b'])
    m = mixer(x, y, net)
    net(m.x)
    net.skip = False
    assert torch.equal(net(x), net.b(net.a(x))) and hooks(net)==0 and mixer.disarm() is True

def test_disarm_says_when_labels_were_mixed_and_nothing_else(net, batch):
    x,y = batch
    mixer = ManifoldMix(layers=[1])
    m = mixer(x, y, net)
    with torch.no_grad(): net(m.x)
    assert mixer.disarm() is True and hooks(net)==0
    with pytest.raises(RuntimeError, match='nothing was mixed'):
        with mixer.armed(x, y, net) as m, torch.no_grad(): net(m.x)
    m = mixer(x, y, net)
    net(m.x)
    assert mixer.disarm() is False

def test_own_hooks_of_the_network_stay(net, batch):
    x,y = batch
    calls = []
    net[1].stage1.register_forward_hook(lambda *a: calls.append('out'))
    net[1].register_forward_pre_hook(lambda *a: calls.append('in'))
    for _ in range(3):
        with ManifoldMix(layers=[0]).armed(x, y, net) as m: net(m.x)
    assert calls==['in','out']*3 and hooks(net)==2

def test_not_run_or_run_without_gradients(net, batch):
    x,y = batch
    with pytest.raises(RuntimeError, match='nothing was mixed'):
        with ManifoldMix(layers=[1]).armed(x, y, net): pass
    net.eval()
    with torch.no_grad():
        plain = net(x)
        m = ManifoldMix(layers=[1])(x, y, net)
        assert torch.equal(net(x), plain) and hooks(net)==0

def test_hook_dies_with_its_batch(net, batch):
    x,y = batch
    mixer = ManifoldMix(layers=[1])
    m = mixer(x, y, net)
    assert len(armed_at(net))==1
    del m
    gc.collect()
    assert hooks(net)==0

def test_wrong_outputs_raise_and_leave_nothing(batch):
    x,y = batch
    class Pair(nn.Module):
        def forward(self, x): return x,x
    class First(nn.Module):
        def forward(self, x): return x[0].mean((2,3))
    net = nn.Sequential(Pair(), First())
    m = ManifoldMix(layers=[net[0]])(x, y, net)
    with pytest.raises(ValueError, match='one tensor with the batch first'): net(m.x)
    assert hooks(net)==0
    net = nn.Sequential(nn.Flatten(0,1))
    m = ManifoldMix(layers=[net[0]])(x, y, net)
    with pytest.raises(ValueError, match='for a batch of 6'): net(x)
    assert hooks(net)==0

def test_bad_input(net, batch):
    x,y = batch
    for bad in (dict(alpha=0), dict(layers='input'), dict(layers=[])):
        with pytest.raises(ValueError, match=[*bad][0]): ManifoldMix(**bad)
    with pytest.raises(ValueError, match='inside a model'): ManifoldMix()(x, y)
    with pytest.raises(ValueError, match='DataParallel'): ManifoldMix()(x, y, nn.DataParallel(net))
    with pytest.raises(ValueError, match='stage1'): ManifoldMix(layers=['nope'])(x, y, net)
    with pytest.raises(ValueError, match='batch norm'): find_layer(net, net[1].stage1[0][1])
    with pytest.raises(ValueError, match='no part of'): find_layer(net, nn.Linear(1,1))

def test_through_a_wrapper_and_in_a_random_mix(net, batch):
    x,y = batch
    inner = net[1].eval()
    plain = inner(x)
    m = ManifoldMix(layers=[0])(x, y, on_pixels(inner, .5, .25))
    assert not torch.allclose(inner(x), plain) and hooks(inner)==0 and len(m.x)==6
    mixer = RandomMix([ManifoldMix(layers=[0]),'cutmix'])
    assert mixer.needs_model and not mixer.blend
    for _ in range(10):
        m = mixer(x, y, inner)
        inner(m.x)
        assert hooks(inner)==0
    kept = [mixer(x, y, inner) for _ in range(8)]
    assert mixer.disarm() and not mixer.disarm() and hooks(inner)==0 and len(kept)==8

def test_copies_and_pickles_do_not_wait(net, batch):
    x,y = batch
    mixer = ManifoldMix(layers=[1])
    m = mixer(x, y, net)
    for twin in (copy.deepcopy(mixer), copy.copy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert twin.disarm() is False and twin.layers==[1]
    assert mixer.disarm() is True

@pytest.mark.parametrize('arch', ['preact_resnet18','resnet18'])
def test_default_layers_on_resnets(arch):
    net = get_model(arch, 4, c_in=3, size=16)
    x,y = torch.rand(2,3,16,16),torch.tensor([0,1])
    for k in (0,1):
        with ManifoldMix(layers=[k]).armed(x, y, net) as m, torch.autocast('cpu', dtype=torch.bfloat16): assert net(m.x).isfinite().all()
