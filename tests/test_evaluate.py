"Evaluation: closed forms, attacks that are checked again, networks without gradients, and the promise to leave no trace"
import copy, importlib.util, inspect, math
import pytest, torch, torch.nn.functional as F
from pathlib import Path
from torch import nn
from advmix.attack import Threat, pgd
from advmix.autoattack import autoattack
from advmix.evaluate import ATTACKS, _distance, _Probe, attacked, clean, eps_curve, examined
from advmix.sanity import _same, _trace, sanity
from advmix.verdict import Verdict
from zoo_of_defences import Detached, NoBackward, ThroughJPEG, ThroughNumpy, ThroughPIL

def mlp(n=10, c=1, sz=8): return nn.Sequential(nn.Flatten(), nn.Linear(c*sz*sz, 64), nn.ReLU(), nn.Linear(64, n))

@pytest.fixture(scope='module')
def data():
    from sklearn.datasets import load_digits
    d = load_digits()
    return torch.tensor(d.images/16).float()[:,None],torch.tensor(d.target)

def train(data, epochs, threat=None, seed=0):
    torch.manual_seed(seed)
    (x,y),m = data,mlp()
    opt = torch.optim.Adam(m.parameters(), 4e-3)
    for _ in range(epochs):
        for b in torch.randperm(1300).split(64):
            z = pgd(m, x[b], y[b], threat) if threat else x[b]
            F.cross_entropy(m(z), y[b]).backward()
            opt.step()
            opt.zero_grad()
    return m.eval()

@pytest.fixture(scope='module')
def plain(data): return train(data, 8)

@pytest.fixture(scope='module')
def robust(data): return train(data, 15, Threat(eps=.1, step=.03, steps=5))

@pytest.fixture
def test(data): return data[0][1300:1360],data[1][1300:1360]

quiet = dict(progress=False)

# --- no trace ---

def batchnormed():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256,10)).train()
    m[1].eval()
    m[0].weight.requires_grad_(False)
    m[4].weight.grad = torch.ones_like(m[4].weight)
    return m

def test_leaves_no_trace(test):
    m = batchnormed()
    x,y = test[0][:8],m(test[0][:8]).argmax(1)
    before,rng,x0 = _trace(m),torch.get_rng_state(),x.clone()
    clean(m, x, y)
    attacked(m, x, y, Threat(eps=.05, steps=3))
    eps_curve(m, x, y, [.05], steps=3)
    sanity(m, x, y, .05, queries=20)
    assert _same(before, _trace(m)) and torch.equal(rng, torch.get_rng_state()) and torch.equal(x, x0)

class Companions(nn.Sequential):
    "A network whose state dict holds more than its own tensors, as with an averaged companion; once even a dict"
    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs)|{'advmix.ema.net.0.weight': torch.ones(2), 'advmix.ema': dict(k=3)}

def test_a_state_dict_may_hold_anything(plain, test, tmp_path):
    m = Companions(*plain)
    kw = dict(eps=.06, attacks=('apgd-ce',), **quiet)
    ref = autoattack(plain, *test, **kw)
    assert torch.equal(autoattack(m, *test, state=tmp_path/'s.pt', **kw).stands, ref.stands)
    assert torch.equal(autoattack(m, *test, state=tmp_path/'s.pt', **kw).stands, ref.stands)
    assert sanity(m, *test, eps=.1, queries=20).ok and attacked(m, *test, Threat(eps=.06, steps=3)).accuracy<1

# --- what is handled, what is refused ---

doors = dict(clean=clean, attacked=attacked, autoattack=lambda m,x,y: autoattack(m, x, y, **quiet), sanity=sanity, curve=eps_curve)

@pytest.mark.parametrize('f', doors.values(), ids=doors)
@pytest.mark.parametrize('bad,word', [
    (lambda m,x,y: (m, (x-.5)/.2, y), 'on_pixels'), (lambda m,x,y: (m, (x*255).byte(), y), '255'),
    (lambda m,x,y: (m, x/0*0, y), 'NaN'), (lambda m,x,y: (nn.Sequential(m, nn.Softmax(1)), x, y), 'softmax'),
    (lambda m,x,y: (m, x, y+1), 'outside 0..9'), (lambda m,x,y: (m, x, y[:-1]), 'same number'),
    (lambda m,x,y: (m, x[:0], y[:0]), 'at least one'), (lambda m,x,y: (m, x, F.one_hot(y,10).float()), 'class numbers'),
    (lambda m,x,y: (nn.Sequential(m, nn.Unflatten(1,(2,5))), x, y), 'logits'),
    (lambda m,x,y: (Tuple(m), x, y), 'tuple'), (lambda m,x,y: (nn.Sequential(m, nn.Threshold(1e9, math.nan)), x, y), 'NaN')])
def test_bad_input_gets_one_sentence(f, bad, word, plain, test):
    with pytest.raises(ValueError, match=word) as e: f(*bad(plain, *test))
    assert '\n' not in str(e.value)

class Tuple(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x),x

def test_unknown_names(plain, test):
    with pytest.raises(ValueError, match='use one of fgsm'): attacked(plain, *test, attack='nope')

def test_half_precision_is_judged_in_float32(plain, test):
    h = copy.deepcopy(plain).half()
    assert torch.equal(attacked(h, *test, Threat(eps=.06)).stands, attacked(copy.deepcopy(h).float(), *test, Threat(eps=.06)).stands)
    assert next(h.parameters()).dtype==torch.float16

# --- own attacks ---

def test_only_right_images_are_attacked_and_cheats_do_not_count(plain, test):
    x,y = test
    y = y.clone()
    y[:5] = (y[:5]+1)%10
    seen = []
    def cheat(m, a, b, t):
        seen.append(len(a))
        return 1-a
    v = attacked(plain, x, y, Threat(eps=.1), cheat)
    right = plain(x).argmax(1)==y
    assert seen==[right.sum()] and torch.equal(v.stands, right) and len(v.flags)==1
    assert v.by==['' if r else 'clean' for r in right]
    assert attacked(plain, x, y, Threat(eps=.1), lambda m,a,b,t: a*math.nan).accuracy==v.accuracy

def test_order_of_strength_and_examples_are_real(robust, test):
    x,y = test
    t = Threat(eps=.1, steps=20)
    v = {k: attacked(robust, x, y, t, k) for k in ('noise','fgsm','pgd','margin')}
    assert v['noise'].accuracy>=v['fgsm'].accuracy>=v['pgd'].accuracy>.3
    for r in v.values():
        assert torch.equal(robust(r.adv).argmax(1)==y, r.stands) and torch.equal(r.adv[r.stands], x[r.stands])
        assert _distance(x, r.adv, 'linf').max()<=.1+1e-6 and r.adv.min()>=0 and r.adv.max()<=1
    assert v['pgd'].name=='pgd20' and v['margin'].name=='cw20' and v['fgsm'].backwards==(robust(x).argmax(1)==y).sum()
    assert attacked(robust, x, y, t).stands.equal(attacked(robust, x, y, t).stands)   # same seed
    assert v['pgd'].row()['by'].keys()<={'clean','pgd20'}

def test_parts_of_a_deterministic_attack_merge_to_the_whole(robust, test):
    x,y = test
    t = Threat(eps=.1, steps=10, random_start=False)
    for k in (2,3):
        parts = [attacked(robust, x[s], y[s], t, bs=10) for s in Verdict.parts(60, k, bs=10)]
        joined,whole = Verdict.merge(parts),attacked(robust, x, y, t, bs=10)
        assert torch.equal(joined.stands, whole.stands) and torch.equal(joined.adv, whole.adv)
        assert (joined.by,joined.forwards,joined.backwards,joined.settings)==(whole.by,whole.forwards,whole.backwards,whole.settings)

# --- the wrapper round the network ---

class Stored(nn.Module):
    "Answers with a tensor of its own, the same one each time"
    def __init__(self): super().__init__(); self.out = torch.eye(4)
    def forward(self, x): return self.out[:len(x)]

def test_what_an_attack_writes_into_logits_stays_there():
    m,x = Stored(),torch.rand(4,1,2,2)
    with examined(m) as net:
        for z in (x, x.clone().requires_grad_()):
            net(z).detach().fill_(-math.inf)   # as Square does
            assert torch.equal(m.out, torch.eye(4))

def test_the_wrapper_changes_no_gradient(robust, test):
    x,y = test
    with examined(robust) as net:
        for t in (Threat(eps=.1, random_start=False), Threat(eps=.5, norm='l2', random_start=False)):
            assert torch.equal(pgd(net, x, y, t), pgd(robust, x, y, t))
        assert not net.blind and net.forwards==net.backwards==2*10*60

def test_gradients_of_single_logits(robust, test):
    "FAB asks for the gradient of one logit after the other from the same pass"
    z = test[0][:3].clone().requires_grad_()
    with examined(robust) as net:
        out = net(z)
        for k in range(10):
            g, = torch.autograd.grad(out[:,k].sum(), z, retain_graph=True)
            assert torch.allclose(g, torch.autograd.functional.jacobian(lambda v: robust(v)[:,k].sum(), test[0][:3]))

class Unused(nn.Module):
    "Its answer has a gradient, but not in the pixels"
    def __init__(self, m):
        super().__init__()
        self.m = m
        self.extra = [torch.zeros(1, requires_grad=True)]   # a tensor that no list of parameters knows
    def forward(self, x): return self.m(x.detach())+self.extra[0]

class Nans(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x+0*(x-x).sqrt())

blind = [Detached, ThroughNumpy, ThroughPIL, ThroughJPEG, NoBackward, Unused]

@pytest.mark.parametrize('defence', blind)
def test_networks_without_gradient_are_evaluated_and_flagged(defence, plain, test):
    m = defence(plain)
    for k in ('fgsm','pgd','margin'):
        v = attacked(m, *test, Threat(eps=.1, steps=3), k)
        assert v.name.endswith('(no gradient)') and any('no gradient reaches the pixels' in f for f in v.flags) and v.accuracy>.8
    n = attacked(m, *test, Threat(eps=.1), 'noise')
    assert n.name=='noise' and not n.flags
    assert any('no gradient' in f for f in eps_curve(m, *test, [0,.1], steps=2).flags)

def test_nan_gradients_lead_nowhere_but_do_not_end_it(plain, test):
    v = attacked(Nans(plain), *test, Threat(eps=.1, steps=3, norm='l2'))
    assert v.accuracy>.8 and torch.isfinite(v.adv).all() and not v.flags   # no candidate is NaN, so none is refused

class Steep(nn.Module):
    "Its gradient is infinite, of either sign, in the first two pixels"
    def forward(self, x):
        v = x.flatten(1)
        s = (v[:,:1]-v[:,:1].detach()).sqrt()-(v[:,1:2]-v[:,1:2].detach()).sqrt()   # 0 with slopes of plus and minus infinity
        return torch.cat([v[:,2:4].sum(1, keepdim=True)+s, 9*torch.ones_like(s)-9.5], 1)

def test_infinite_gradients_lead_nowhere():
    x = torch.full((5,1,2,2), .5)
    with examined(Steep()) as net:
        z = x.clone().requires_grad_()
        g, = torch.autograd.grad(net(z)[:,0].sum(), z)
    assert torch.equal(g.flatten(1), torch.tensor([[0.,0.,1.,1.]]).expand(5,4))

def test_faults_of_the_network_itself_are_not_swallowed(test):
    class Broken(nn.Module):
        def forward(self, x): return x.flatten(1)@torch.ones(3,3)
    with pytest.raises(RuntimeError, match='shapes'): attacked(Broken(), *test)
    class Interrupted(nn.Module):
        def forward(self, x):
            if x.requires_grad: raise KeyboardInterrupt
            return torch.eye(10)[test[1]][:len(x)]*9
    with pytest.raises(KeyboardInterrupt): attacked(Interrupted(), *test)
    class Full(nn.Module):
        def forward(self, x):
            if x.requires_grad: raise torch.cuda.OutOfMemoryError('full')
            return torch.eye(10)[test[1]][:len(x)]*9
    with pytest.raises(torch.cuda.OutOfMemoryError): attacked(Full(), *test)

def test_a_probe_counts_batches_of_any_kind(plain, test):
    p = _Probe(plain)
    assert p.right(*test, bs=7).shape==(60,) and p.forwards==60 and p.backwards==0

def test_what_is_taken_is_a_plain_copy(plain, test):
    x,y = test[0].repeat(1,3,1,1).to(memory_format=torch.channels_last),test[1].int()
    with examined(plain) as net: a,b = net.take(x, y)
    assert a.is_contiguous() and torch.equal(a, x) and a.data_ptr()!=x.data_ptr() and b.dtype==torch.int64
    with examined(plain) as net: assert net.take(x.double(), y)[0].dtype==torch.float32
    with examined(plain) as net: assert net.take(x.contiguous(), y)[0].data_ptr()!=x.contiguous().data_ptr()

def test_the_seed_decides_and_the_state_of_the_generator_does_not(robust, test):
    v = []
    for seed,state in ((0,1), (0,2), (3,1)):
        torch.manual_seed(state)
        v.append(attacked(robust, *test, Threat(eps=.1, steps=2), seed=seed).adv)
    assert torch.equal(v[0], v[1]) and not torch.equal(v[0], v[2])
    torch.manual_seed(1); a = eps_curve(robust, *test, [.1], steps=2).smallest
    torch.manual_seed(2); assert torch.equal(a, eps_curve(robust, *test, [.1], steps=2).smallest)

@pytest.mark.parametrize('attack', ['pgd','margin'])
def test_an_image_that_fell_costs_nothing_more(attack, plain, test):
    x,y = test
    v = attacked(plain, x, y, Threat(eps=.3, steps=20), attack)
    n = (plain(x).argmax(1)==y).sum().item()
    assert v.accuracy==0 and v.backwards<20*n/2   # all fall, most of them early

def test_noise_is_noise_whatever_the_start_of_the_other_attacks():
    x = torch.full((200,1,4,4), .5)
    d = (ATTACKS['noise'](None, x, None, Threat(eps=.2, random_start=False))-x)/.2
    assert d.abs().max()<=1+1e-6 and abs(d.var()-1/3)<.02 and abs(d.mean())<.03   # the variance of uniform draws from [-1,1]

def test_one_default_at_every_door():
    doors = {f.__name__: inspect.signature(f).parameters for f in (clean, attacked, eps_curve, autoattack, _Probe.right, _Probe.attack)}
    assert {p['bs'].default for p in doors.values()}=={250} and {p['seed'].default for p in doors.values() if 'seed' in p}=={0}
    assert doors['autoattack']['eps'].default==doors['attacked']['threat'].default.eps==Threat().eps==8/255
    assert doors['eps_curve']['eps'].default==(0,*[2**k/255 for k in range(1,6)])   # in grey levels, twice as far each time

# --- curves ---

def test_linear_network_has_its_closed_form_radius():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x = .4+.2*torch.rand(40,1,4,4)
    with torch.no_grad(): m[1].bias[0] -= (m(x)[:,0]-m(x)[:,1]).median()   # both classes occur, at all distances from the boundary
    y = m(x).argmax(1)
    w,gap = (m[1].weight[0]-m[1].weight[1]).detach(),(m(x)[:,0]-m(x)[:,1]).abs().detach()
    for norm,dual in (('linf',1), ('l2',2)):
        c = eps_curve(m, x, y, torch.linspace(0, .4 if norm=='linf' else 1.2, 41).tolist(), norm)
        r = (gap/w.norm(p=dual)).double()
        ok = r*(w.abs().max()/w.norm(p=dual) if norm=='l2' else 1)<.35   # so near that the pixel bounds never bite
        assert ok.sum()>20
        assert (c.smallest[ok]>=r[ok]-1e-4).all() and (c.smallest[ok]-r[ok]).max()<.012*(1 if norm=='linf' else 3)
        a = torch.tensor(c.accuracy)
        assert (a[1:]<=a[:-1]).all() and a[0]==1
        far = .35 if norm=='linf' else 1.   # one large radius is enough, since examples are pulled back
        assert eps_curve(m, x, y, [far], norm, steps=40).smallest.mean()<.4*far

def test_curve_starts_clean(plain, test):
    x,y = test
    c = eps_curve(plain, x, y, [.5,0,.05])
    assert c.eps==[0,.05,.5] and c.accuracy[0]==clean(plain, x, y).accuracy and c.accuracy[-1]==0
    assert (c.smallest[~c.stands[0]]==0).all() and c.smallest.isfinite().all()
    for e,s in zip(c.eps, c.stands): assert (c.smallest[~s]<=e+1e-6).all()   # no image fell outside the radius at which it fell

# --- the ordinary ResNet-18 that ships with pyautoattack ---

def test_bundled_checkpoint_falls_at_8_and_partly_stands_at_half():
    "No CIFAR images ship with anything, so crops of photographs stand in, with the network's own answers as labels"
    from sklearn.datasets import load_sample_images
    root = Path(importlib.util.find_spec('pyautoattack').submodule_search_locations[0])/'examples'
    if not (root/'model_test.pt').exists(): pytest.skip('this pyautoattack comes without its checkpoint')
    spec = importlib.util.spec_from_file_location('aa_resnet', root/'resnet.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    m = mod.ResNet18().eval()
    m.load_state_dict(torch.load(root/'model_test.pt', map_location='cpu', weights_only=True))
    ims = [F.interpolate(torch.tensor(i).permute(2,0,1)[None]/255, size=(64,96), mode='area')[0] for i in load_sample_images().images]
    x = torch.stack([im[:,i:i+32,j:j+32] for im in ims for i,j in ((0,0),(32,32),(16,64))]).clamp(0,1)
    with torch.no_grad(): y = m(x).argmax(1)
    assert attacked(m, x, y, Threat(steps=10)).accuracy==0
    assert attacked(m, x, y, Threat(eps=.5/255, steps=4)).accuracy>0
