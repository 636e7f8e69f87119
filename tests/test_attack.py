"Attacks: closed forms, independent implementations, and the promise to leave no trace"
import copy, math
from dataclasses import replace
import pytest, torch, torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from advmix.attack import Threat, fgsm, pgd

def net(c=1, sz=8, n=10, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(),
                      nn.Linear(8*math.ceil(sz/2)**2, n)).to(dtype)
    return m.eval()

def batch(b=16, c=1, sz=8, n=10, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, c, sz, sz, generator=g, dtype=dtype), torch.randint(n, (b,), generator=g)

@pytest.fixture(scope='module')
def digits():
    "A network trained on real digits and images it has not seen"
    from sklearn.datasets import load_digits
    d = load_digits()
    x,y = torch.tensor(d.images/16).float()[:,None],torch.tensor(d.target)
    m = net().train()
    opt = torch.optim.Adam(m.parameters(), 5e-3)
    for _ in range(10):
        for b in torch.randperm(1300).split(64):
            F.cross_entropy(m(x[b]), y[b]).backward()
            opt.step()
            opt.zero_grad()
    return m.eval(),x[1300:1500],y[1300:1500]

def acc(m, x, y): return (m(x).argmax(1)==y).float().mean().item()

# --- against somebody else's code ---

@pytest.mark.parametrize('eps', [.01, 8/255, .15])
def test_fgsm_equals_foolbox_and_the_formula(digits, eps):
    fb = pytest.importorskip('foolbox')
    m,x,y = digits
    z = fgsm(m, x, y, Threat(eps=eps))
    assert torch.equal(z, fb.attacks.FGSM(random_start=False)(fb.PyTorchModel(m, bounds=(0,1)), x, y, epsilons=eps)[0])
    xr = x.clone().requires_grad_()
    g = torch.autograd.grad(F.cross_entropy(m(xr), y), xr)[0]
    assert torch.equal(z, (x+eps*g.sign()).clamp(0,1))

@pytest.mark.parametrize('norm,eps', [('linf',8/255), ('linf',.15), ('l2',.5), ('l2',1.5)])
def test_pgd_equals_foolbox(digits, norm, eps):
    fb = pytest.importorskip('foolbox')
    m,x,y = digits
    t = Threat(eps=eps, step=eps/3, steps=10, norm=norm, random_start=False)
    other = dict(linf=fb.attacks.LinfPGD, l2=fb.attacks.L2PGD)[norm](abs_stepsize=t.step, steps=10, random_start=False)
    ref = other(fb.PyTorchModel(m, bounds=(0,1)), x, y, epsilons=eps)[0]
    z = pgd(m, x, y, t)
    if norm=='linf': assert torch.equal(z, ref)
    else: assert (z-ref).abs().max()<1e-5
    assert acc(m, z, y)==acc(m, ref, y)

def test_targeted_equals_foolbox(digits):
    fb = pytest.importorskip('foolbox')
    m,x,y = digits
    to = (y+1)%10
    other = fb.attacks.LinfPGD(abs_stepsize=.05, steps=10, random_start=False)
    ref = other(fb.PyTorchModel(m, bounds=(0,1)), x, fb.criteria.TargetedMisclassification(to), epsilons=.2)[0]
    z = pgd(m, x, to, Threat(eps=.2, step=.05, random_start=False), targeted=True)
    assert torch.equal(z, ref) and acc(m, z, to)>acc(m, x, to)

# --- closed forms ---

class Linear(nn.Module):
    def __init__(self, d, n=2):
        super().__init__()
        torch.manual_seed(3)
        self.lin = nn.Linear(d, n).double()
    def forward(self, x): return self.lin(x.flatten(1))

@pytest.mark.parametrize('norm,dual', [('linf',1), ('l2',2)])
def test_linear_model_matches_its_closed_form(norm, dual):
    m = Linear(27)
    x = .3+.4*torch.rand(500, 3, 3, 3, dtype=torch.float64)   # so far from the bounds that they never bite
    y = m(x).argmax(1)
    w = m.lin.weight[0]-m.lin.weight[1]
    margin = (m(x)[:,0]-m(x)[:,1]).abs()
    for eps in (.02, .1, .25):
        z = pgd(m, x, y, Threat(eps=eps, norm=norm, steps=20))
        assert torch.equal(m(z).argmax(1)==y, margin>eps*w.norm(p=dual))

@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('random_start', [True, False])
def test_eps_zero_returns_the_input_bit_for_bit(norm, random_start):
    (x,y),m = batch(),net()
    assert torch.equal(pgd(m, x, y, Threat(eps=0, step=.1, norm=norm, random_start=random_start)), x)
    assert torch.equal(fgsm(m, x, y, Threat(eps=0, norm=norm)), x)

def test_no_steps_is_the_start():
    (x,y),m = batch(),net()
    assert torch.equal(pgd(m, x, y, Threat(steps=0, random_start=False)), x)

# --- geometry ---

@settings(max_examples=60, deadline=None)
@given(eps=st.floats(0, 1), norm=st.sampled_from(['linf','l2']), seed=st.integers(0, 99), far=st.floats(0, 5), b=st.integers(1, 4))
def test_project_is_inside_idempotent_and_keeps_what_is_inside(eps, norm, seed, far, b):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(b, 2, 3, 3, generator=g, dtype=torch.float64)
    t = Threat(eps=eps, norm=norm)
    z = t.project(x, x+far*torch.randn(x.shape, generator=g, dtype=torch.float64))
    d = (z-x).flatten(1)
    assert (d.abs().amax(1) if norm=='linf' else d.norm(dim=1)).max()<=eps+1e-9
    assert z.min()>=0 and z.max()<=1
    assert torch.allclose(t.project(x, z), z, atol=1e-12)

@settings(max_examples=30, deadline=None)
@given(eps=st.floats(1e-3, 1), norm=st.sampled_from(['linf','l2']), seed=st.integers(0, 99))
def test_starts_are_inside(eps, norm, seed):
    torch.manual_seed(seed)
    x = torch.rand(3, 1, 4, 4)
    z = Threat(eps=eps, norm=norm).start(x)
    d = (z-x).flatten(1)
    assert (d.abs().amax(1) if norm=='linf' else d.norm(dim=1)).max()<=eps+1e-6 and z.min()>=0 and z.max()<=1
    assert not torch.equal(z, x)

def test_ascend_has_length_step_and_survives_a_zero_gradient():
    x,g = torch.rand(4,1,3,3),torch.randn(4,1,3,3)
    g[0] = 0
    z = Threat(norm='l2', step=.3).ascend(x, g)-x
    assert torch.allclose(z.flatten(1).norm(dim=1), torch.tensor([0,.3,.3,.3]), atol=1e-5)
    z = Threat(norm='linf', step=.3).ascend(x, g)-x
    assert torch.allclose(z.abs(), torch.where(g==0, 0., .3), atol=1e-6)

@settings(max_examples=20, deadline=None)
@given(eps=st.floats(0, 1), step=st.floats(0, 1), steps=st.integers(0, 4), norm=st.sampled_from(['linf','l2']),
       early=st.booleans(), restarts=st.integers(1, 3), b=st.integers(1, 5))
def test_every_attack_stays_in_the_ball_and_in_the_pixels(eps, step, steps, norm, early, restarts, b):
    (x,y),m = batch(b),net()
    z = pgd(m, x, y, Threat(eps=eps, step=step, steps=steps, norm=norm, restarts=restarts), early_stop=early)
    d = (z-x).flatten(1)
    assert z.shape==x.shape and z.min()>=0 and z.max()<=1
    assert (d.abs().amax(1) if norm=='linf' else d.norm(dim=1)).max()<=eps+1e-6

def test_other_bounds():
    (x,y),m = batch(),net()
    t = Threat(eps=16/255, bounds=(-1.,1.))
    z = pgd(m, 2*x-1, y, t)
    assert z.min()>=-1 and z.max()<=1 and (z-(2*x-1)).abs().max()<=16/255+1e-6
    with pytest.raises(ValueError, match='pixels'): pgd(m, 4*x-2, y, t)

# --- what the options promise ---

def test_early_stop_gives_the_same_or_more_fooled_and_less_work(digits):
    m,x,y = digits
    seen = []
    h = m.register_forward_hook(lambda m,i,o: seen.append(len(o)))
    t = Threat(eps=.1, steps=20)
    torch.manual_seed(0); full = pgd(m, x, y, t); a = sum(seen)
    torch.manual_seed(0); early = pgd(m, x, y, t, early_stop=True); b = sum(seen)-a
    h.remove()
    assert b<a
    assert ((m(full).argmax(1)!=y)<=(m(early).argmax(1)!=y)).all()   # an image fooled at the end was never lost

def test_restarts_keep_the_worst(digits):
    m,x,y = digits
    t = Threat(eps=.1, steps=5)
    torch.manual_seed(0); one = pgd(m, x, y, t)
    torch.manual_seed(0); many = pgd(m, x, y, replace(t, restarts=4))
    fooled = lambda z: m(z).argmax(1)!=y
    assert (fooled(one)<=fooled(many)).all() and fooled(many).sum()>fooled(one).sum()
    lost = lambda z: F.cross_entropy(m(z), y, reduction='none')
    same = fooled(one)==fooled(many)
    assert (lost(many)>=lost(one)-1e-6)[same].all()

def test_trace_and_cost(digits):
    m,x,y = digits
    calls,trace = [],[]
    h = m.register_forward_hook(lambda *a: calls.append(1))
    pgd(m, x, y, Threat(eps=.15, steps=7), trace=trace)
    h.remove()
    assert len(calls)==7==len(trace)
    assert [t['step'] for t in trace]==list(range(7)) and trace[0]['loss'].shape==(len(x),)
    assert trace[-1]['loss'].mean()>trace[0]['loss'].mean() and trace[-1]['fooled'].sum()>=trace[0]['fooled'].sum()

def test_trace_with_early_stop_and_restarts(digits):
    m,x,y = digits
    trace = []
    z = pgd(m, x, y, Threat(eps=.1, steps=5, restarts=3), trace=trace, early_stop=True)
    n = [t['fooled'].sum().item() for t in trace]
    assert n==sorted(n) and not trace[-1]['loss'].isnan().any()
    assert (m(z).argmax(1)!=y).sum()>=n[-1]

def test_losses_of_every_kind_raise_themselves(digits):
    m,x,y = digits
    t = Threat(eps=.1, steps=5, random_start=False)
    ref = pgd(m, x, y, t)
    assert torch.equal(pgd(m, x, y, t, loss=nn.CrossEntropyLoss()), ref)
    assert torch.equal(pgd(m, x, y, t, loss=F.cross_entropy), ref)
    assert torch.equal(pgd(m, x, F.one_hot(y, 10).float(), t), ref)
    margin = lambda o,y: -(o.gather(1, y[:,None])[:,0]-o.scatter(1, y[:,None], -math.inf).amax(1))
    assert acc(m, pgd(m, x, y, t, loss=margin), y)<acc(m, x, y)

def test_the_batch_does_not_matter():
    (x,y),m = batch(8, dtype=torch.float64),net(dtype=torch.float64)
    t = Threat(eps=.1, random_start=False)
    assert torch.equal(pgd(m, x, y, t), torch.cat([pgd(m, x[i:i+1], y[i:i+1], t) for i in range(8)]))

# --- no trace ---

class Boom(nn.Module):
    def __init__(self, m, at): super().__init__(); self.m,self.left = m,at
    def forward(self, x):
        self.left -= 1
        if self.left<0: raise RuntimeError('boom')
        return self.m(x)

@pytest.mark.parametrize('bn', ['eval', 'as_is'])
@pytest.mark.parametrize('at', [3, 99])
def test_leaves_no_trace_even_when_the_model_raises(bn, at):
    (x,y),m = batch(),net().train()
    m[1].eval()                            # one layer in another mode than its parent
    m[0].weight.requires_grad_(False)      # frozen by the user
    m[3].weight.grad = torch.ones_like(m[3].weight)
    before = copy.deepcopy(m.state_dict()),[c.training for c in m.modules()],[p.requires_grad for p in m.parameters()],x.clone()
    boom = Boom(m, at)
    try: pgd(boom, x, y, Threat(steps=6), bn=bn)
    except RuntimeError as e: assert at==3 and str(e)=='boom'
    assert all(torch.equal(a, b) for a,b in zip(before[0].values(), m.state_dict().values()))
    assert before[1]==[c.training for c in m.modules()] and before[2]==[p.requires_grad for p in m.parameters()]
    assert torch.equal(m[3].weight.grad, torch.ones_like(m[3].weight)) and m[6].weight.grad is None
    assert torch.equal(x, before[3]) and not x.requires_grad

def test_works_without_grad_and_returns_none():
    (x,y),m = batch(),net()
    with torch.no_grad(): z = pgd(m, x.to(memory_format=torch.channels_last), y)
    assert not z.requires_grad and z.is_contiguous() and z.dtype==torch.float32

def test_frozen_parameters_do_not_stop_it():
    (x,y),m = batch(),net().requires_grad_(False)
    assert not torch.equal(pgd(m, x, y), x)

# --- half precision ---

def test_half_keeps_the_sign_of_tiny_gradients():
    "A network so sure of itself that its float16 gradient underflows without the scale"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        m[1].weight.mul_(.005)
        m[1].bias[0] = 12
    x,y = .3+.4*torch.rand(8,1,4,4),torch.zeros(8, dtype=torch.long)
    h = copy.deepcopy(m).half()
    z = x.half().requires_grad_()
    naive = torch.autograd.grad(F.cross_entropy(h(z), y, reduction='sum'), z)[0]
    assert (naive==0).float().mean()>.5
    ours,ref = fgsm(h, x.half(), y, Threat(eps=.1)),fgsm(m, x, y, Threat(eps=.1))
    assert ours.dtype==torch.float16
    assert ((ours.float()-ref).abs()<.01).float().mean()>.95

# --- wrong input: one sentence ---

@pytest.mark.parametrize('kw,word', [(dict(eps=8), '8/255'), (dict(eps=-.1), 'negative'), (dict(eps=math.nan), 'finite'), (dict(eps='1'), 'finite'),
    (dict(step=-1), 'step'),
    (dict(steps=1.5), 'whole'), (dict(steps=-1), 'whole'), (dict(norm='l7'), 'linf'), (dict(restarts=0), 'restarts'),
    (dict(restarts=2, random_start=False), 'same'),
    (dict(bounds=(1,0)), 'bounds')])
def test_impossible_threats_are_refused(kw, word):
    with pytest.raises(ValueError, match=word) as e: Threat(**kw)
    assert '\n' not in str(e.value)

def test_threat_is_frozen_hashable_and_takes_eps_over_four():
    assert Threat()==Threat(eps=8/255, step=2/255) and hash(Threat())==hash(Threat(step=2/255))
    assert Threat(eps=.2).step==.05 and Threat(eps=40., norm='l2').eps==40
    with pytest.raises(Exception): Threat().eps = 1

def test_images_that_are_not_pixels_are_refused():
    (x,y),m = batch(),net()
    with pytest.raises(ValueError, match='on_pixels'): pgd(m, (x-.5)/.2, y)
    with pytest.raises(ValueError, match='255'): pgd(m, (x*255).byte(), y)
    with pytest.raises(ValueError, match='NaN'): pgd(m, x/0*0, y)
    with pytest.raises(ValueError): pgd(m, x, y, bn='train')
