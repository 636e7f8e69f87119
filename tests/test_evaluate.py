"Evaluation: AutoAttack's own verdicts, closed forms, false defences, and the promise to leave no trace"
import copy, importlib.util, math, sys
import pytest, torch, torch.nn.functional as F
from pathlib import Path
from torch import nn
from pyautoattack import AutoAttack
from advmix.attack import Threat, pgd
from advmix.evaluate import attacked, autoattack, clean, distance, eps_curve, examined, margin_loss, sanity, _same, _trace

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

# --- AutoAttack: the package's own verdict, image by image ---

def official(m, x, y, bs, eps, norm='Linf', seed=0, version='standard', attacks=None):
    aa = AutoAttack(m, eps=eps, norm=norm, seed=seed, version=version)
    if attacks: aa.attacks_to_run = list(attacks)
    return aa.run_standard_evaluation(x, y, batch_size=bs)[0]

@pytest.mark.parametrize('name,n,bs,eps', [('robust',20,20,.1), ('plain',32,8,.15)])
def test_verdict_equals_the_packages_own(name, n, bs, eps, test, request):
    m = request.getfixturevalue(name)
    x,y = test[0][:n],test[1][:n]
    v = autoattack(m, x, y, eps, bs=bs, **quiet)
    z = official(m, x, y, bs, eps)
    assert torch.equal(v.stands, m(z).argmax(1)==y) and torch.equal(v.adv, z)
    assert 0<v.accuracy<1 and v.name=='autoattack' and [s['name'] for s in v.stages]==['apgd-ce','apgd-t','fab-t','square']
    acc = [s['accuracy'] for s in v.stages]
    assert acc==sorted(acc, reverse=True) and acc[-1]==v.accuracy

@pytest.mark.parametrize('norm,eps', [('l2',.5), ('l1',2.)])
def test_other_norms_and_versions(norm, eps, plain, test):
    x,y = test
    only = ('apgd-ce','apgd-t')
    v = autoattack(plain, x, y, eps, norm, attacks=only, bs=30, seed=3, **quiet)
    z = official(plain, x, y, 30, eps, norm.upper(), seed=3, attacks=only)
    assert torch.equal(v.stands, plain(z).argmax(1)==y)
    assert 'only' in v.name and distance(x, v.adv, norm).max()<=eps+1e-4

def test_plus_and_individual(plain, test):
    x,y = test[0][:10],test[1][:10]
    only = ('apgd-dlr','fab')
    v = autoattack(plain, x, y, .06, version='plus', attacks=only, **quiet)
    assert torch.equal(v.stands, plain(official(plain, x, y, 250, .06, version='plus', attacks=only)).argmax(1)==y)
    only = ('apgd-ce','apgd-t')
    v = autoattack(plain, x, y, .06, version='individual', attacks=only, **quiet)
    aa = AutoAttack(plain, eps=.06, norm='Linf', seed=0)
    aa.attacks_to_run = list(only)
    each = {k: plain(z).argmax(1)==y for k,(z,_) in aa.run_standard_evaluation_individual(x, y).items()}
    assert [s['accuracy'] for s in v.stages]==[each[k].double().mean().item() for k in only]
    assert torch.equal(v.stands, each['apgd-ce']&each['apgd-t'])

def test_a_network_without_a_chance_ends_at_once(plain, test):
    v = autoattack(plain, *test, .5, **quiet)
    assert v.accuracy==0 and v.stages[1]['forwards']==0

def test_resumes_after_an_interrupt(plain, test, tmp_path):
    kw = dict(eps=.06, attacks=('apgd-ce','apgd-t'), bs=20, **quiet)
    once = autoattack(plain, *test, **kw)
    f,calls = tmp_path/'sub'/'aa.pt',[]
    def stop(*a):
        calls.append(1)
        if len(calls)==at: raise KeyboardInterrupt
    for at in (150, 500):
        calls.clear()
        h = plain.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt): autoattack(plain, *test, state=f, **kw)
        h.remove()
    again = autoattack(plain, *test, state=f, **kw)
    assert torch.equal(again.stands, once.stands) and torch.equal(again.adv, once.adv) and again.backwards==once.backwards
    assert [s['accuracy'] for s in again.stages]==[s['accuracy'] for s in once.stages]
    for other in (dict(kw, eps=.05), dict(kw, seed=1), dict(kw, bs=10)):
        with pytest.raises(ValueError, match='another run'): autoattack(plain, *test, state=f, **other)
    with pytest.raises(ValueError, match='another run'): autoattack(mlp(), *test, state=f, **kw)
    f.write_bytes(b'nonsense')
    with pytest.raises(ValueError, match='not a state file'): autoattack(plain, *test, state=f, **kw)

def test_few_classes(data):
    x,y = data
    x,y = x[y<4][:30],y[y<4][:30]
    torch.manual_seed(0)
    m = mlp(4)
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    for _ in range(60): F.cross_entropy(m(x), y).backward(), opt.step(), opt.zero_grad()
    m.eval()
    v = autoattack(m, x, y, .05, attacks=('apgd-ce','apgd-t','fab-t'), **quiet)
    assert len(v.stages)==3 and not v.flags
    three = nn.Sequential(m, nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match="3 classes and apgd-t needs 4: pass attacks=") as e: autoattack(three, x, y.clamp(max=2), .05, **quiet)
    autoattack(three, x, y.clamp(max=2), .05, attacks=('apgd-ce','fab-t'), **quiet)

class Dynamic(nn.Module):
    "A defence that optimises inside, as the package's check expects it: it calls something named `grad`"
    def __init__(self, m): super().__init__(); self.m = m
    def grad(self, x): return x
    def forward(self, x): return self.m(self.grad(x))

class Noisy(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x)+torch.rand(1)

def test_flags_are_caught_and_do_not_stick(plain, test, caplog, capsys):
    kw = dict(eps=.06, attacks=('apgd-ce',), **quiet)
    assert any('dynamic' in f for f in autoattack(Dynamic(plain), *test, **kw).flags)
    assert autoattack(plain, *test, **kw).flags==[]      # the package's counter would accuse this one too
    v = autoattack(Noisy(plain), *test, **kw)
    assert sum('randomized' in f for f in v.flags)==1
    assert capsys.readouterr()==('','') and not caplog.records

class Blind(nn.Module):
    "Rounds its input: no gradients, but Square needs none"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m((x*8).round()/8)

def test_square_helping_is_flagged(plain, test):
    v = autoattack(Blind(plain), test[0][:20], test[1][:20], .15, attacks=('apgd-ce','square'), **quiet)
    assert any('Square' in f and 'sees no gradients' in f for f in v.flags)

# --- no trace ---

@pytest.mark.parametrize('where', ['ends', 'interrupted'])
def test_leaves_no_trace(where, test):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256,10)).train()
    m[1].eval()
    m[0].weight.requires_grad_(False)
    m[4].weight.grad = torch.ones_like(m[4].weight)
    x,y = test[0][:8],m(test[0][:8]).argmax(1)
    x0 = x.clone()
    tracer = lambda *a: None
    n = 0
    def count(*a):
        nonlocal n
        n += 1
        if where=='interrupted' and n==40: raise KeyboardInterrupt
    before,rng = _trace(m),torch.get_rng_state()
    h = m.register_forward_hook(count)
    old = sys.gettrace()
    sys.settrace(tracer)
    try:
        autoattack(m, x, y, .05, attacks=('apgd-ce','fab-t'), **quiet)
        assert where=='ends'
    except KeyboardInterrupt: assert where=='interrupted'
    finally:
        seen = sys.gettrace()
        sys.settrace(old)
    h.remove()
    assert seen is tracer
    assert _same(before, _trace(m)) and torch.equal(rng, torch.get_rng_state()) and torch.equal(x, x0)
    attacked(m, x, y, Threat(eps=.05, steps=3))
    eps_curve(m, x, y, [.05], steps=3)
    sanity(m, x, y, .05, queries=20)
    assert _same(before, _trace(m)) and torch.equal(rng, torch.get_rng_state())

def test_the_result_says_that_the_mode_was_switched(plain, test):
    m = copy.deepcopy(plain).train()
    v = autoattack(m, *test, .06, attacks=('apgd-ce',), **quiet)
    assert m.training and any('training mode' in f for f in v.flags)
    assert torch.equal(v.stands, autoattack(plain, *test, .06, attacks=('apgd-ce',), **quiet).stands)

# --- what is handled, what is refused ---

def test_half_double_channels_last_and_int32(plain, test):
    x,y = test
    kw = dict(eps=.06, attacks=('apgd-ce',), **quiet)
    ref = autoattack(plain, x, y, **kw)
    same = lambda m,x=x,y=y: torch.equal(autoattack(m, x, y, **kw).stands, ref.stands)
    assert same(plain, y=y.int()) and same(plain, x=x.double()) and same(copy.deepcopy(plain).double())
    assert same(copy.deepcopy(plain).to(memory_format=torch.channels_last), x=x.to(memory_format=torch.channels_last))
    h = copy.deepcopy(plain).half()
    v = autoattack(h, x, y, **kw)
    assert any('float32 copy' in f for f in v.flags) and next(h.parameters()).dtype==torch.float16
    with torch.autocast('cpu', dtype=torch.bfloat16): assert same(plain)
    with torch.no_grad(): assert same(plain)
    with torch.inference_mode(): assert same(plain, x=x.clone())

@pytest.mark.parametrize('f', [lambda m,x,y: clean(m, x, y), lambda m,x,y: attacked(m, x, y), lambda m,x,y: autoattack(m, x, y, **quiet),
                               lambda m,x,y: sanity(m, x, y), lambda m,x,y: eps_curve(m, x, y)])
@pytest.mark.parametrize('bad,word', [(lambda m,x,y: (m, (x-.5)/.2, y), 'on_pixels'), (lambda m,x,y: (m, (x*255).byte(), y), '255'),
    (lambda m,x,y: (m, x/0*0, y), 'NaN'), (lambda m,x,y: (nn.Sequential(m, nn.Softmax(1)), x, y), 'softmax'), (lambda m,x,y: (m, x, y+1), 'outside 0..9'),
    (lambda m,x,y: (m, x, y[:-1]), 'same number'), (lambda m,x,y: (m, x[:0], y[:0]), 'at least one'),
    (lambda m,x,y: (nn.Sequential(m, nn.Unflatten(1,(2,5))), x, y), 'logits'), (lambda m,x,y: (m, x, F.one_hot(y,10).float()), 'class numbers'),
    (lambda m,x,y: (nn.Sequential(m, nn.Threshold(1e9, math.nan)), x, y), 'NaN')])
def test_bad_input_gets_one_sentence(f, bad, word, plain, test):
    with pytest.raises(ValueError, match=word) as e: f(*bad(plain, *test))
    assert '\n' not in str(e.value)

def test_unknown_names(plain, test):
    for kw,word in [(dict(norm='l7'),'linf, l2, l1'), (dict(version='rand'),'standard'), (dict(attacks=('pgd',)),'choose from apgd-ce'), (dict(eps=8),'8/255')]:
        with pytest.raises(ValueError, match=word): autoattack(plain, *test, **(quiet|kw))
    with pytest.raises(ValueError, match='use one of fgsm'): attacked(plain, *test, attack='nope')

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
    assert attacked(plain, x, y, Threat(eps=.1), lambda m,a,b,t: a*math.nan).accuracy==v.accuracy

def test_order_of_strength_and_examples_are_real(robust, test):
    x,y = test
    t = Threat(eps=.1, steps=20)
    v = {k: attacked(robust, x, y, t, k) for k in ('noise','fgsm','pgd','margin')}
    assert v['noise'].accuracy>=v['fgsm'].accuracy>=v['pgd'].accuracy>.3
    for r in v.values():
        assert torch.equal(robust(r.adv).argmax(1)==y, r.stands)
        assert distance(x, r.adv, 'linf').max()<=.1+1e-6 and r.adv.min()>=0 and r.adv.max()<=1
    assert v['pgd'].name=='pgd20' and v['margin'].name=='cw20' and v['fgsm'].backwards==(robust(x).argmax(1)==y).sum()
    assert attacked(robust, x, y, t).stands.equal(attacked(robust, x, y, t).stands)   # same seed

def test_margin_loss():
    logits = torch.tensor([[1.,5.,2.],[1.,5.,2.]])
    assert margin_loss(logits, torch.tensor([1,2])).tolist()==[-3,3]

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

def test_curve_starts_clean(plain, test):
    x,y = test
    c = eps_curve(plain, x, y, [.5,0,.05])
    assert c.eps==[0,.05,.5] and c.accuracy[0]==clean(plain, x, y).accuracy and c.accuracy[-1]==0
    assert (c.smallest[~c.stands[0]]==0).all() and c.smallest.isfinite().all()

# --- false defences ---

class Scaled(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return 1e4*self.m(x)

class Shifted(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(x.roll(torch.randint(-1,2,()).item(), 3))

def test_honest_networks_pass(plain, robust, test):
    for m in (plain, robust):
        s = sanity(m, *test, eps=.1, queries=300, verdict=autoattack(m, *test, .1, attacks=('apgd-ce',), **quiet), surrogate=plain if m is robust else robust)
        assert s.ok, s
        assert all(r['verdict']=='pass' for r in s.rows), s

@pytest.mark.parametrize('defence,symptoms', [(Blind, {'gradients','large eps','noise','transfer'}), (Scaled, {'gradients','two losses'}),
                                              (Shifted, {'deterministic'})])
def test_false_defences_are_caught(defence, symptoms, plain, test):
    s = sanity(defence(plain), *test, eps=.15, queries=300, surrogate=plain)
    assert not s.ok and symptoms<=set(s.suspicious), s

def test_sanity_wants_the_same_images(plain, test):
    with pytest.raises(ValueError, match='run both on the same'): sanity(plain, *test, .1, verdict=clean(plain, test[0][:9], test[1][:9]), queries=5)

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
