"Attacks: closed forms, independent implementations, and the promise to leave no trace"
import copy, inspect, math
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from advmix.attack import PGD, Threat, fgsm, pgd
from advmix.mix import Mixed, as_terms, with_loss
from sync import check_meta, check_no_reads

def net(c=1, sz=8, n=10, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(),
                      nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8*math.ceil(sz/2)**2, n)).to(dtype)
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

def test_the_random_start_is_uniform_in_the_linf_ball():
    "Every pixel by itself: mean 0, variance eps^2/3, as many draws in each sixth of the range, nothing outside, neighbours unrelated"
    x = torch.full((500,2,4,4), .5, dtype=torch.float64)
    d = (Threat(eps=.2).start(x)-x)/.2
    n = d.numel()
    assert d.abs().max()<=1 and d.abs().max()>.999 and abs(d.mean())<4*(1/3/n)**.5 and abs(d.var()-1/3)<4*(4/45/n)**.5
    share = torch.histc(d, 6, -1, 1)/n
    assert (share-1/6).abs().max()<4*(5/36/n)**.5
    a,b = d[:,0,0,0],d[:,0,0,1]
    assert abs((a*b).mean())<4/3/len(a)**.5 and abs((d.sign().flatten(1)).mean(0)).max()<5/len(x)**.5

def test_the_random_start_is_uniform_in_the_l2_ball():
    "By volume: P(norm <= r*eps) = r^dim, and the direction has no favourite"
    x = torch.full((4000,1,1,3), .5, dtype=torch.float64)
    d = (Threat(eps=.2, norm='l2').start(x)-x).flatten(1)/.2
    r = d.norm(dim=1)
    assert r.max()<=1+1e-12
    for q in (.3,.5,.7,.9): assert abs((r<=q).double().mean()-q**3)<4*(q**3*(1-q**3)/4000)**.5
    u = d/r[:,None]
    assert u.mean(0).abs().max()<4/(3*4000)**.5 and (u.T@u/4000-torch.eye(3, dtype=u.dtype)/3).abs().max()<.03

def test_a_wide_start_is_uniform_too_and_off_the_ball():
    x = torch.full((500,1,4,4), .5, dtype=torch.float64)
    d = Threat(eps=.1, random_start=2., confine=False).start(x)-x
    assert d.abs().max()<=.2 and d.abs().max()>.1999 and abs(d.var()-.04/3)<.001
    half = Threat(eps=.1, random_start=.5).start(x)-x
    assert half.abs().max()<=.05 and half.abs().max()>.0499

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
    z = Threat(1., norm='l2', step=.3).ascend(x, g)-x
    assert torch.allclose(z.flatten(1).norm(dim=1), torch.tensor([0,.3,.3,.3]), atol=1e-5)
    z = Threat(1., norm='linf', step=.3).ascend(x, g)-x
    assert torch.allclose(z.abs(), torch.where(g==0, 0., .3), atol=1e-6)

@settings(max_examples=20, deadline=None)
@given(eps=st.floats(0, 1), share=st.floats(0, 2), steps=st.integers(0, 4), norm=st.sampled_from(['linf','l2']),
       early=st.booleans(), restarts=st.integers(1, 3), b=st.integers(1, 5), direction=st.sampled_from(['gradient','random']))
def test_every_attack_stays_in_the_ball_and_in_the_pixels(eps, share, steps, norm, early, restarts, b, direction):
    (x,y),m = batch(b),net()
    t = Threat(eps=eps, step=share*eps, steps=steps, norm=norm, restarts=restarts, direction=direction)
    z = pgd(m, x, y, t, early_stop=early)
    d = (z-x).flatten(1)
    assert z.shape==x.shape and z.min()>=0 and z.max()<=1
    assert (d.abs().amax(1) if norm=='linf' else d.norm(dim=1)).max()<=eps+1e-6

def test_other_bounds():
    (x,y),m = batch(),net()
    t = Threat(eps=16/255, bounds=(-1.,1.))
    z = pgd(m, 2*x-1, y, t)
    assert z.min()>=-1 and z.max()<=1 and (z-(2*x-1)).abs().max()<=16/255+1e-6
    with pytest.raises(ValueError, match='pixels'): pgd(m, 4*x-2, y, t)
    z = (2*x-1).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(m(z), y, reduction='sum'), z)
    assert torch.equal(fgsm(m, 2*x-1, y, t), (z.detach()+16/255*g.sign()).clamp(-1,1))

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

def test_the_loss_is_summed_so_that_gradients_do_not_shrink_with_the_batch(monkeypatch):
    from advmix import attack
    (x,y),m = batch(),net()
    seen = []
    monkeypatch.setattr(attack, 'input_grad', lambda loss, z: [seen.append(loss.item()), torch.autograd.grad(loss, z)[0]][1])
    pgd(m, x, y, Threat(steps=1, random_start=False))
    assert abs(seen[0]-F.cross_entropy(m(x), y, reduction='sum').item())<1e-4

def test_half_images_raise_a_loss_256_times_as_high_unless_autocast_is_on(monkeypatch):
    from advmix import attack
    (x,y),m = batch(),nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    seen,want = [],F.cross_entropy(m(x.half().float()), y, reduction='sum').item()
    monkeypatch.setattr(attack, 'input_grad', lambda loss, z: [seen.append(loss.item()), torch.autograd.grad(loss, z)[0]][1])
    t = Threat(steps=1, random_start=False)
    pgd(copy.deepcopy(m).half(), x.half(), y, t)
    with torch.autocast('cpu', dtype=torch.bfloat16): pgd(m, x.half(), y, t)
    assert abs(seen[0]/want-256)<3 and abs(seen[1]/want-1)<.02

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
    with pytest.raises(RuntimeError, match='boom') if at==3 else nullcontext(): pgd(boom, x, y, Threat(steps=6), bn=bn)
    assert all(torch.equal(a, b) for a,b in zip(before[0].values(), m.state_dict().values()))
    assert before[1]==[c.training for c in m.modules()] and before[2]==[p.requires_grad for p in m.parameters()]
    assert torch.equal(m[3].weight.grad, torch.ones_like(m[3].weight)) and m[6].weight.grad is None
    assert torch.equal(x, before[3]) and not x.requires_grad

def test_works_without_grad_and_returns_none():
    (x,y),m = batch(),net()
    with torch.no_grad(): z = pgd(m, x.to(memory_format=torch.channels_last), y)
    assert not z.requires_grad and z.is_contiguous() and z.dtype==torch.float32
    assert not pgd(m, x.clone().requires_grad_(), y).requires_grad

def test_the_memory_format_stays():
    (x,y),m = batch(4, 3),net(3)
    t = Threat(random_start=False)
    z = pgd(m, x.to(memory_format=torch.channels_last), y, t)
    assert z.is_contiguous(memory_format=torch.channels_last) and (z-pgd(m, x, y, t)).abs().max()<=1e-6
    assert pgd(m, x.flip(-1).transpose(2,3), y, t).is_contiguous()

def test_plain_tensors_come_back_whatever_loss_and_images():
    from fastai.losses import CrossEntropyLossFlat
    from fastai.torch_core import TensorImage
    (x,y),m = batch(),net()
    for loss in (None, CrossEntropyLossFlat()): assert type(pgd(m, TensorImage(x), y, Threat(steps=1), loss=loss)) is torch.Tensor

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

@pytest.mark.parametrize('kw,word', [
    (dict(eps=8), '8/255'), (dict(eps=-.1), 'negative'), (dict(eps=math.nan), 'finite'), (dict(eps='1'), 'finite'),
    (dict(step=-1), 'step'), (dict(step=1), 'wide.*0.00784'), (dict(eps=.1, step=.2001, norm='l2'), 'wide'), (dict(bounds=(0,)), 'lowest'),
    (dict(random_start=2.), 'confine=False'), (dict(random_start='yes'), 'radius'), (dict(random_start=-1.), 'radius'),
    (dict(direction='down'), 'gradient, random'), (dict(steps=(10,2)), 'first, last'), (dict(steps=(1,2,3)), 'first, last'),
    (dict(steps=1.5), 'whole'), (dict(steps=-1), 'whole'), (dict(norm='l7'), 'linf'), (dict(restarts=0), 'restarts'),
    (dict(restarts=2, random_start=False), 'same'),
    (dict(bounds=(1,0)), 'bounds')])
def test_impossible_threats_are_refused(kw, word):
    with pytest.raises(ValueError, match=word) as e: Threat(**kw)
    assert '\n' not in str(e.value)

def test_threat_is_frozen_hashable_and_takes_eps_over_four():
    assert Threat()==Threat(eps=8/255, step=2/255) and hash(Threat())==hash(Threat(step=2/255))
    assert Threat(eps=.2).step==.05 and Threat(eps=40., norm='l2').eps==40
    assert Threat(eps=.1, step=.2).step==.2 and Threat(eps=0, step=.1).step==.1 and Threat(steps=[2,10])==Threat(steps=(2,10))
    with pytest.raises(FrozenInstanceError): Threat().eps = 1

def test_images_that_are_not_pixels_are_refused():
    (x,y),m = batch(),net()
    with pytest.raises(ValueError, match='on_pixels'): pgd(m, (x-.5)/.2, y)
    with pytest.raises(ValueError, match='255'): pgd(m, (x*255).byte(), y)
    with pytest.raises(ValueError, match='NaN'): pgd(m, x/0*0, y)
    with pytest.raises(ValueError, match="use 'eval' or 'as_is'"): pgd(m, x, y, bn='train')

def test_logits_and_labels_that_do_not_fit_are_refused_with_a_sentence():
    (x,y),m = batch(),net()
    with pytest.raises(ValueError, match='labels 0..10.*more outputs'): pgd(m, x, torch.arange(16).clamp(max=10))
    with pytest.raises(ValueError, match='labels -1'): pgd(m, x, y-y-1)
    with pytest.raises(ValueError, match='softmax'): pgd(nn.Sequential(m, nn.Softmax(1)), x, y)
    with pytest.raises(ValueError, match=r'\(B,n\)'): pgd(nn.Sequential(m, nn.Unflatten(1, (2,5))), x, y)
    with pytest.raises(ValueError, match='NaN or infinite'): pgd(nn.Sequential(m, nn.Threshold(9., math.inf)), x, y)
    lf = nn.CrossEntropyLoss(ignore_index=3)   # with a loss of the user's the labels are the user's, too
    assert torch.equal(pgd(m, x, y*0+3, Threat(random_start=False), loss=lf), x)

# --- one step that does not collapse ---

def test_n_fgsm_is_noise_and_one_step_without_a_way_back():
    "de Jorge et al. 2022: uniform noise of two radii, a step of one, no projection but valid pixels"
    (x,y),m = batch(dtype=torch.float64),net(dtype=torch.float64)
    t = Threat(eps=.1, step=.1, steps=1, random_start=2., confine=False)
    torch.manual_seed(4)
    z = pgd(m, x, y, t)
    torch.manual_seed(4)
    n = (x+(2*torch.rand_like(x)-1)*.2).clamp(0,1).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(m(n), y, reduction='sum'), n)
    assert torch.equal(z, (n.detach()+.1*g.sign()).clamp(0,1))
    assert (z-x).abs().max()>.2 and (z-x).abs().max()<=.3+1e-12 and z.min()>=0 and z.max()<=1

def test_steps_grow_evenly():
    t = Threat(eps=.1, steps=(2,10))
    assert [t.at(p/18).steps for p in range(18)]==[s for s in range(2,11) for _ in range(2)] and t.at(1.).steps==10
    assert t.at(.5)==replace(t, steps=6) and Threat(steps=3).at(.2).steps==3 and Threat(steps=(4,4)).at(0.).steps==4
    (x,y),m = batch(),net()
    torch.manual_seed(0); a = pgd(m, x, y, t)
    torch.manual_seed(0); assert torch.equal(a, pgd(m, x, y, replace(t, steps=10)))   # asked without a moment: the last

# --- the control ---

def test_random_directions_look_at_nothing_and_walk_as_far():
    (x,y),m = batch(dtype=torch.float64),net(dtype=torch.float64)
    calls = []
    h = m.register_forward_hook(lambda *a: calls.append(1))
    for norm in ('linf','l2'):
        torch.manual_seed(0); z = pgd(m, .4+.2*x, y, Threat(eps=.3, step=.03, steps=5, norm=norm, random_start=False, direction='random'))
        d = (z-.4-.2*x).flatten(1)
        if norm=='linf':
            k = (d/.03).round()
            assert (d-.03*k).abs().max()<1e-12 and set(k.unique().tolist())=={-5,-3,-1,1,3,5}
            assert abs((k**2).mean()-5)<.5 and abs(k.mean())<.3   # five coins
        else: assert (d.norm(dim=1)<.15).all() and (d.norm(dim=1)>.03).all()
    h.remove()
    assert not calls

# --- PGD as a Mixer ---

def flops(f):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as c: f()
    return c.get_total_flops()

def test_a_pgd_step_is_2k_plus_3_forwards_and_its_control_3():
    f,(x,y) = net(3, 16),batch(4, 3, 16)
    F1 = flops(lambda: f(x))
    def step(**kw):
        m = PGD(**kw)(x, y, f)
        m.loss(F.cross_entropy, f(m.x), y).backward()
    first = 2*4*16*16*8*27/F1   # the image's gradient of the first layer isn't part of a training step's backward pass
    for K in (1,5): assert abs(flops(lambda: step(steps=K))/F1-(2*K+3-first))<1e-6
    assert abs(flops(lambda: step(direction='random'))/F1-(3-first))<1e-6

@pytest.mark.parametrize('loss', [None, F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1),
                                  nn.CrossEntropyLoss(weight=torch.arange(1.,11)),
                                  lambda o,y: F.cross_entropy(o, y)], ids=['none','f','smooth','weight','mean'])
@pytest.mark.parametrize('bn', ['eval','as_is'])
@pytest.mark.parametrize('norm', ['linf','l2'])
def test_the_mixer_is_pgd_against_the_loss_per_item(loss, bn, norm):
    from advmix.core import item_losses
    (x,y),m = batch(),net().train()
    eps = dict(linf=.1, l2=1.)[norm]
    torch.manual_seed(2)
    want = pgd(m, x, y, Threat(eps, steps=3, norm=norm), loss=loss and partial(item_losses, loss), bn=bn)
    torch.manual_seed(2)
    got = with_loss(PGD(eps, steps=3, norm=norm, bn=bn), loss)(x, y, m)
    assert isinstance(got, Mixed) and torch.equal(got.x, want) and got.mask is None and got.w is got.lam
    assert torch.equal(got.idx, torch.arange(16)[:,None]) and torch.equal(got.w, torch.ones(16,1)) and as_terms(got)==[(1., got)]
    assert torch.equal(got.soft(y, 10), F.one_hot(y, 10).float())

def test_the_mixer_passes_its_settings_on():
    p = PGD(.1, step=.05, steps=(1,3), norm='l2', random_start=2., confine=False, direction='random')
    assert p.threat==Threat(.1, .05, (1,3), 'l2', 2., confine=False, direction='random')
    assert p.at(.99).threat.steps==3 and p.threat.steps==(1,3)
    q = PGD()
    assert q.at(.3) is q and q.threat==Threat() and 'eps' in repr(q)
    own = PGD(loss=F.cross_entropy)
    assert with_loss(own, nn.CrossEntropyLoss()) is own and with_loss(q, F.cross_entropy).loss is F.cross_entropy and q.loss is None

def test_defaults_are_those_of_threat_and_pgd():
    "One default per setting at all doors"
    p = inspect.signature(PGD).parameters
    assert len(p)<=12 and all(v.kind==v.KEYWORD_ONLY for k,v in p.items() if k!='eps')
    t,f = Threat.__dataclass_fields__,inspect.signature(pgd).parameters
    for k,v in p.items(): assert v.default==(t[k].default if k in t else f[k].default), k

def test_early_stop_gives_the_same_images_until_they_fool(digits):
    m,x,y = digits
    torch.manual_seed(0); a = PGD(.1, steps=6, early_stop=True)(x, y, m).x
    torch.manual_seed(0); b = PGD(.1, steps=6)(x, y, m).x
    held = m(a).argmax(1)==y
    assert torch.equal(a[held], b[held]) and not torch.equal(a, b)

def test_clear_errors_of_the_mixer():
    (x,y),m = batch(),net()
    with pytest.raises(ValueError, match='with the model'): PGD()(x, y)
    with pytest.raises(ValueError, match='as_is'): PGD(bn='train')
    with pytest.raises(ValueError, match='8/255'): PGD(8)
    with pytest.raises(TypeError): PGD(.1, .1)

@pytest.mark.parametrize('kw', [{}, dict(norm='l2'), dict(bn='as_is'), dict(direction='random'), dict(random_start=2., confine=False),
                                dict(loss=nn.CrossEntropyLoss(label_smoothing=.1))], ids=['default','l2','as_is','random','n-fgsm','loss'])
def test_a_trusted_step_reads_no_value(kw):
    (x,y),m = batch(4, 3),net(3)
    check_no_reads(PGD(steps=2, **kw), x, y, m)
    check_meta(PGD(steps=2, **kw), x, y, m)

def test_an_early_stop_does_read():
    "And the documentation says so"
    (x,y),m = batch(4, 3),net(3)
    with pytest.raises(AssertionError, match='boolean index'): check_no_reads(PGD(.3, steps=2, early_stop=True), x, y, m)
