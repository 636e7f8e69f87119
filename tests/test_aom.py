"AOM-style mixing: the identities that need no paper, in float64 where rounding would flip signs"
import json, inspect, importlib
from functools import partial
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from advmix import aom as module
from advmix.aom import AOM, _pull_back as pull_back
from advmix.attack import PGD, Threat, pgd
from advmix.labels import geometric_weight
from advmix.mix import CutMix, Mixed, MixUp, as_terms, compose, rand_pairs, with_loss
from advmix.ratio import TrustRegion, ratio_grad, _ratio_pgd as ratio_pgd
from sync import check_meta, check_no_reads

def named(kw):
    "Settings as a test id without object addresses, which differ between processes"
    if not isinstance(kw, dict): return str(kw)
    return ",".join(f"{k}={v if isinstance(v, (str, int, float)) else type(v).__name__}" for k,v in kw.items()) or "default"

WHERE = 'endpoints', 'mix', 'shared'
BIG = dict(eps=.15, step=.04)

def net(seed=0, shape=(3,4,6), n=5):
    torch.manual_seed(seed)
    n_in = shape[0]*shape[1]*shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in,32), nn.Tanh(), nn.Linear(32,n)).double()

def batch(b=12, shape=(3,4,6), n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, *shape, generator=g, dtype=torch.float64), torch.randint(0, n, (b,), generator=g)

class At:
    "Blend at given ratios, in double precision"
    blend = True
    def __init__(self, lam, perm=None): self.w, self.perm = torch.stack([lam,1-lam],1), perm
    def __call__(self, x, y=None, model=None):
        idx = rand_pairs(x) if self.perm is None else torch.stack([torch.arange(len(x)), self.perm], 1)
        mask = self.w[:,:,None,None].expand(-1,-1,*x.shape[-2:])
        return Mixed(compose(x,idx,mask), idx, self.w, mask, self.w)

class Three:
    "Three images: strips, the middle one a blend of all"
    def __call__(self, x, y=None, model=None):
        n,_,h,w = x.shape
        idx = torch.stack([torch.arange(n), torch.randperm(n), torch.randperm(n)], 1)
        mask = F.one_hot(torch.arange(w)*3//w, 3).T[None,:,None].expand(n,3,h,w).double()
        mask = torch.where(torch.arange(w)==w//2, torch.tensor([.5,.25,.25]).view(1,3,1,1), mask)
        s = mask.mean((2,3))
        return Mixed(compose(x,idx,mask), idx, s, mask, s)

def lams(b=12, seed=0): return torch.rand(b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def mixers(b=12): return dict(lam=At(lams(b)), edge=At(torch.linspace(0,1,b).double()), cutmix=CutMix(per_sample=True), three=Three())

def run(f, x, y, seed=0, **kw):
    torch.manual_seed(seed)
    return AOM(**kw)(x, y, f)

KINDS = [dict(where=w) for w in WHERE] + [dict(ratio='kl', label='distance'), dict(mixer=CutMix())]

# ---- nothing left when nothing moves

@pytest.mark.parametrize('where', WHERE)
@pytest.mark.parametrize('name', ('default','cutmix','three'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_without_an_attack_it_is_the_mixer_to_the_bit(where, name, dtype):
    x,y = batch()
    x, f, mixer = x.to(dtype), net().to(dtype), None if name=='default' else mixers()[name]
    torch.manual_seed(0)
    want = (mixer or MixUp(per_sample=True))(x, y)
    for kw in (dict(eps=0.), dict(steps=0, random_start=False), dict(eps=0., ratio='kl', radius=0.) if name=='default' else dict(eps=0.)):
        m = run(f, x, y, where=where, mixer=mixer, **kw)
        for a,b in zip((m.x, m.idx, m.w, m.mask, m.lam), (want.x, want.idx, want.w, want.mask, want.lam)): assert torch.equal(a, b)

def test_defaults_draw_one_ratio_per_image():
    x,y = batch()
    m = run(net(), x, y)
    assert m.w[:,0].unique().numel()==12 and torch.equal(m.w, m.lam) and m.w.dtype==torch.float32

# ---- equivalences

@pytest.mark.parametrize('name', ('lam','edge','cutmix','three'))
@pytest.mark.parametrize('seed', range(3))
def test_endpoints_are_the_mix_under_sign_steps(name, seed):
    x,y = batch(seed=seed)
    a,b = (run(net(seed), x, y, seed, where=w, mixer=mixers()[name], random_start=False, clamp=False, **BIG).x for w in ('endpoints','mix'))
    assert (a-b).abs().max()<=1e-12

@pytest.mark.parametrize('ratio', ('ce','kl'))
def test_also_when_the_ratio_moves(ratio):
    x,y = batch()
    kw = dict(ratio=ratio, random_start=False, clamp=False, **BIG)
    a,b = (run(net(), x, y, where=w, mixer=mixers()['lam'], **kw) for w in ('endpoints','mix'))
    assert (a.x-b.x).abs().max()<=1e-12 and (a.lam-b.lam).abs().max()<=1e-12 and (a.lam[:,0]-lams()).abs().max()>.1

@pytest.mark.parametrize('name', ('lam','cutmix','three'))
def test_with_valid_pixels_endpoints_stay_inside_the_box_round_the_mix(name):
    x,y = batch()
    x = (x*2-.5).clamp(0,1)   # many black and white pixels
    torch.manual_seed(0)
    mix = mixers()[name](x, y).x
    a = run(net(), x, y, where='endpoints', mixer=mixers()[name], random_start=False, **BIG).x
    assert (a-mix).abs().max()<=.15+1e-12 and a.min()>=0 and a.max()<=1
    inner = .2+.6*x           # nothing to clamp
    a,b = (run(net(), inner, y, where=w, mixer=mixers()[name], random_start=False, **BIG).x for w in ('endpoints','mix'))
    assert (a-b).abs().max()<=1e-12

@pytest.mark.parametrize('where,start', [('mix',True), ('shared',True), ('mix',False), ('shared',False), ('endpoints',False)])
def test_ratio_one_is_pgd_training(where, start):
    x,y = batch()
    f, mixer = net(), At(torch.ones(12).double(), torch.arange(12).roll(1))
    torch.manual_seed(7)
    want = pgd(f, x, y, Threat(.15, .04, 10, random_start=start))
    got = run(f, x, y, 7, where=where, mixer=mixer, random_start=start, **BIG)
    assert (got.x-want).abs().max()<=1e-12

# ---- gradients

def test_shared_gradient_in_closed_form_and_by_autograd():
    x,y = batch()
    lam, perm = lams(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    m, f = At(lam, perm)(x), net()
    d = torch.zeros_like(x).requires_grad_()
    z = compose(x+d, m.idx, m.mask)
    want, g = torch.autograd.grad(sum((m.w[:,n]*F.cross_entropy(f(z), y[m.idx[:,n]], reduction='none')).sum() for n in range(2)), (d, z))
    j = perm.argsort()   # the mixture in which image i is the partner
    col = lambda v: v.view(-1,1,1,1)
    assert (pull_back(g, m.idx, m.mask, 12)-want).abs().max()<=1e-12
    assert (col(lam)*g + col(1-lam[j])*g[j]-want).abs().max()<=1e-12

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0,2**31), b=st.integers(1,5), n=st.integers(1,4), s=st.integers(1,6))
def test_pull_back_is_the_adjoint_of_compose(seed, b, n, s):
    "<compose(x), g> = <x, pull_back(g)>, any masks, any indices, repeated ones too"
    torch.manual_seed(seed)
    x, g = torch.randn(s,2,3,4).double(), torch.randn(b,2,3,4).double()
    idx, mask = torch.randint(0,s,(b,n)), torch.randn(b,n,3,4).double()
    assert abs((compose(x,idx,mask)*g).sum()-(x*pull_back(g,idx,mask,s)).sum())<=1e-10

def reference(f, x, y, lam0, perm, where, objective, eps, step, K, r):
    "The whole attack by autograd through perturbations, ratio, soft label and entropy: slow, and independent of the closed forms"
    one = lambda v: F.one_hot(v,5).double()
    d, lam = [torch.zeros_like(x) for _ in range(1 if where!='endpoints' else 2)], lam0
    box = lambda z,c: torch.min(torch.max(z, (c-eps).clamp(min=0)), (c+eps).clamp(max=1))
    L = lambda l: l.view(-1,1,1,1)
    for _ in range(K):
        v = [t.clone().requires_grad_() for t in (*d, lam)]
        *p,l = v
        a, b = (x, x[perm]) if where=='mix' else (x+p[0], x[perm]+(p[1] if where=='endpoints' else p[0][perm]))
        z = L(l)*a + (1-L(l))*b + (p[0] if where=='mix' else 0)
        target = l[:,None]*one(y) + (1-l)[:,None]*one(y[perm])
        ce = -(target*f(z).log_softmax(1)).sum(1)
        gp = torch.autograd.grad(ce.sum(), p, retain_graph=True)
        H = torch.where(y==y[perm], 0*l, -l*l.log()-(1-l)*(1-l).log())
        gl, = torch.autograd.grad((ce-H if objective=='kl' else ce).sum(), l)
        lam = (lam + r/4*gl.sign()).clamp(lam0-r, lam0+r).clamp(0,1) if objective!='fixed' else lam
        if where=='mix': c = [L(lam)*x+(1-L(lam))*x[perm]]
        else: c = [x, x[perm]]
        d = [box(q+t+step*g.sign(), q)-q for q,t,g in zip(c, d, gp)]
    if where=='mix': return c[0]+d[0], lam
    return L(lam)*(x+d[0]) + (1-L(lam))*(x[perm]+(d[1] if where=='endpoints' else d[0][perm])), lam

@pytest.mark.parametrize('where', WHERE)
@pytest.mark.parametrize('objective', ('fixed','ce','kl'))
def test_against_a_reference_by_autograd(where, objective):
    x,y = batch()
    lam, perm, f = .3+.4*lams(), torch.arange(12).roll(5), net()   # r=.25 stays off 0 and 1, where autograd's entropy is NaN
    want, end = reference(f, x, y, lam, perm, where, objective, .15, .04, 6, .25)
    got = run(f, x, y, where=where, ratio=objective, mixer=At(lam, perm), random_start=False, steps=6, **BIG)
    assert (got.x-want).abs().max()<=1e-10 and (got.lam[:,0]-end).abs().max()<=1e-12

@pytest.mark.parametrize('ratio', ('ce','kl'))
@pytest.mark.parametrize('where', WHERE)
def test_without_epsilon_only_the_ratio_is_attacked(ratio, where):
    x,y = batch()
    lam, perm, f = lams(), torch.arange(12).roll(1), net()
    m = run(f, x, y, where=where, ratio=ratio, mixer=At(lam, perm), eps=0.)
    want = ratio_pgd(f, x, x[perm], torch.stack([y,y[perm]],1), lam, ratio)
    assert (m.lam[:,0]-want).abs().max()<=1e-12
    assert torch.allclose(m.x, compose(x, m.idx, m.mask), atol=1e-12)

# ---- constraints

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0,2**31), b=st.integers(1,5), where=st.sampled_from(WHERE), ratio=st.sampled_from(['fixed','ce','kl','random']),
       label=st.sampled_from(['ratio','projection','distance']), start=st.booleans(), direction=st.sampled_from(['gradient','random']),
       eps=st.sampled_from([0.,8/255,.15,1.]), radius=st.sampled_from([0.,.1,.25,1.]))
def test_limits_and_label_sums(seed, b, where, ratio, label, start, direction, eps, radius):
    x,y = batch(b, seed=seed)
    f, x = net().float(), (x*1.4-.2).clamp(0,1).float()
    aom = AOM(eps, step=eps/3, steps=4, where=where, ratio=ratio, label=label, random_start=start, radius=radius, direction=direction)
    torch.manual_seed(seed)
    m0 = aom.mixer(x, y)
    torch.manual_seed(seed)
    m = aom(x, y, f)
    assert torch.equal(m.idx, m0.idx) and m.x.shape==x.shape and not m.x.requires_grad
    assert m.x.isfinite().all() and m.x.min()>=0 and m.x.max()<=1
    assert ((m.lam-m0.lam).abs()<=radius+1e-6).all() and (m.lam>=0).all() and (m.lam<=1).all()
    for w in (m.w, m.lam, m.mask): assert (w>=0).all() and (w.sum(1)-1).abs().max()<=1e-6
    assert (m.soft(y,5).sum(1)-1).abs().max()<=1e-6
    assert torch.allclose(m.mask.mean((2,3)), m.lam, atol=1e-6)
    mix = compose(x, m.idx, m.mask)   # clean mixture at the final ratio
    assert (m.x-mix).abs().max()<=eps+1e-6
    if label=='ratio': assert torch.equal(m.w, m.lam)
    else: assert torch.allclose(m.w[:,0], geometric_weight(m.x, *x[m.idx].unbind(1), label, m.lam[:,0]), atol=1e-6)

@pytest.mark.parametrize('where', WHERE)
@pytest.mark.parametrize('name', ('lam','cutmix','three'))
def test_every_source_stays_a_valid_image_near_its_own(where, name):
    x,y = batch()
    x, mixer = (x*1.4-.2).clamp(0,1), mixers()[name]
    aom = AOM(where=where, mixer=mixer, **BIG)
    torch.manual_seed(0)
    m = mixer(x, y)
    z,idx,mask,_ = aom._climb(net(), x, y, m)
    src = aom._sources(x, m)[0]
    assert (z-src).abs().max()<=.15+1e-7 and z.min()>=0 and z.max()<=1
    assert len(z)=={'mix':12, 'shared':12, 'endpoints':12*m.idx.shape[1]}[where]

def test_an_image_the_mask_hides_does_not_move():
    x,y = batch()
    aom = AOM(mixer=CutMix(per_sample=True), random_start=False, **BIG)
    torch.manual_seed(0)
    m = aom.mixer(x, y)
    z,idx,mask,_ = aom._climb(net(), x, y, m)
    d = (z[idx]-x[m.idx]).abs().amax(2)   # (B,N,H,W)
    assert (d[m.mask==0]==0).all() and (d[m.mask==1]>0).float().mean()>.8

# ---- strength

@pytest.fixture(scope='module')
def digits():
    from sklearn.datasets import load_digits
    d = load_digits()
    x, y = torch.tensor(d.images/16, dtype=torch.float32)[:,None], torch.tensor(d.target)
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(64,128), nn.ReLU(), nn.Linear(128,10))
    opt = torch.optim.Adam(f.parameters(), lr=5e-3)
    for _ in range(100):
        b = torch.randint(0, 1300, (128,))
        F.cross_entropy(f(x[b]), y[b]).backward()
        opt.step(), opt.zero_grad()
    return f, x[1300:1500], y[1300:1500]

def attacked(f, x, y, **kw):
    m = run(f, x, y, 5, **kw)
    with torch.no_grad(): return m.loss(F.cross_entropy, f(m.x), y).item()

@pytest.mark.parametrize('mixer', (MixUp(per_sample=True), CutMix(per_sample=True)), ids=('mixup','cutmix'))
def test_every_attack_is_stronger_than_no_attack(digits, mixer):
    clean = attacked(*digits, eps=0., mixer=mixer)
    ce = {w: attacked(*digits, where=w, mixer=mixer, **BIG) for w in WHERE}
    assert min(ce.values())>2*clean
    assert ce['shared']<ce['mix'] and abs(ce['endpoints']-ce['mix'])<.15*ce['mix']

def test_a_moving_ratio_makes_it_stronger(digits):
    for w in WHERE: assert attacked(*digits, where=w, ratio='ce', **BIG)>attacked(*digits, where=w, **BIG)

# ---- what every Mixer promises

class Noted(nn.Module):
    "A network with everything an attack might disturb: batch norm, a frozen one, dropout; counts its calls, can fail at one"
    def __init__(self, fail=None):
        super().__init__()
        self.bn, self.frozen, self.drop, self.lin = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout(.5), nn.Linear(72,5)
        self.fail, self.modes = fail, []
    def forward(self, z):
        self.modes.append(self.training)
        if len(self.modes)==self.fail: raise RuntimeError('midway')
        return self.lin(self.drop(self.frozen(self.bn(z)).flatten(1)))

def noted(fail=None):
    torch.manual_seed(0)
    f = Noted(fail).double().train()
    f.frozen.eval()
    f.lin.weight.requires_grad_(False)
    F.cross_entropy(f(torch.rand(4,3,4,6).double()), torch.arange(4)).backward()
    f.modes.clear()
    return f

@pytest.mark.parametrize('fail', (None, 3))
@pytest.mark.parametrize('kw', [*KINDS, dict(bn='as_is')], ids=named)
def test_no_trace(kw, fail):
    f,(x,y) = noted(fail),batch()
    state = {k:v.clone() for k,v in f.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in f.parameters()]
    flags, needs, x0, y0, v = [m.training for m in f.modules()], [p.requires_grad for p in f.parameters()], x.clone(), y.clone(), x._version
    if fail:
        with pytest.raises(RuntimeError, match='midway'): AOM(**kw)(x, y, f)
    else: AOM(**kw)(x, y, f)
    assert all(torch.equal(t, state[k]) for k,t in f.state_dict().items())
    for p,g in zip(f.parameters(), grads): assert (p.grad is None and g is None) or torch.equal(p.grad, g)
    assert flags==[m.training for m in f.modules()] and needs==[p.requires_grad for p in f.parameters()]
    assert torch.equal(x, x0) and torch.equal(y, y0) and x._version==v and not x.requires_grad
    assert set(f.modes)=={kw.get('bn')=='as_is'}
    assert torch.is_grad_enabled()

def test_works_under_no_grad_and_with_inputs_that_want_gradients():
    x,y = batch()
    want = run(net(), x, y).x
    with torch.no_grad(): assert torch.equal(run(net(), x, y).x, want)
    m = run(net(), x.clone().requires_grad_(), y)
    assert torch.equal(m.x, want) and not m.x.requires_grad

def test_same_seed_same_mixture_other_seed_another():
    x,y = batch()
    assert torch.equal(run(net(), x, y, 1).x, run(net(), x, y, 1).x) and not torch.equal(run(net(), x, y, 1).x, run(net(), x, y, 2).x)

@pytest.mark.parametrize('b', (1, 3))
@pytest.mark.parametrize('where', WHERE)
def test_small_batches(b, where):
    x,y = batch(b)
    for kw in (dict(), dict(ratio='kl', label='projection'), dict(mixer=CutMix())):
        m = run(net(), x, y, where=where, **kw, **BIG)
        assert m.x.shape==x.shape and m.x.isfinite().all() and m.w.isfinite().all()

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
@pytest.mark.parametrize('where', WHERE)
def test_half_precision(dtype, where):
    x,y = batch()
    m = run(net().to(dtype), x.to(dtype), y, where=where, ratio='kl', **BIG)
    assert m.x.dtype==dtype and m.w.dtype==torch.float32 and m.x.isfinite().all() and m.x.min()>=0 and m.x.max()<=1

def test_non_contiguous_images():
    x,y = batch()
    want = run(net(), x, y, random_start=False).x   # a random start follows the layout in memory
    for v in (x.to(memory_format=torch.channels_last), x.flip(-1).flip(-1), x.repeat_interleave(2,0)[::2]):
        assert (run(net(), v, y, random_start=False).x-want).abs().max()<=1e-12

@pytest.mark.parametrize('where', WHERE)
def test_a_generator_gets_its_gradient_through_the_attacked_mixture(where):
    class Generator(nn.Module):
        "Masks with parameters, as learned mixing has them"
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.randn(2,4,6).double())
        def forward(self, x, y=None, model=None):
            idx, mask = rand_pairs(x), self.logits.softmax(0).expand(len(x),-1,-1,-1)
            w = torch.full((len(x),2), .5)
            return Mixed(compose(x,idx,mask), idx, w, mask, w)
    x,y = batch()
    g, f = Generator(), net()
    m = run(f, x, y, where=where, mixer=g, **BIG)
    loss = m.loss(F.cross_entropy, f(m.x), y)
    got,up = torch.autograd.grad(loss, (g.logits, m.x), retain_graph=True)
    torch.manual_seed(0)
    c = g(x)
    z,idx,*_ = AOM(where=where, mixer=g, **BIG)._climb(f, x, y, c)
    mix  = c.x if where=='mix' else compose(z, idx, c.mask)   # under 'mix' what was added is a constant, else it has its share, too
    want = torch.autograd.grad(mix, g.logits, up)[0]
    assert torch.allclose(got, want, atol=1e-14) and want.abs().sum()>1e-3
    with torch.no_grad(): same = run(f, x, y, where=where, mixer=g, **BIG)
    assert torch.equal(m.x, same.x)

def test_any_loss():
    x,y = batch()
    from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
    want = run(net(), x, y).x
    for lf in (F.cross_entropy, nn.CrossEntropyLoss(), CrossEntropyLossFlat()):
        assert torch.equal(run(net(), x, y, loss=lf).x, want)
        run(net(), x, y, loss=lf, ratio='kl')
    for lf in (nn.CrossEntropyLoss(label_smoothing=.2), FocalLossFlat(), LabelSmoothingCrossEntropyFlat(), 
               nn.CrossEntropyLoss(weight=torch.rand(5)), nn.CrossEntropyLoss(ignore_index=2),
               partial(F.cross_entropy, label_smoothing=.2)):
        assert run(net().float(), x.float(), y, loss=lf, ratio='ce').x.isfinite().all()
        with pytest.raises(ValueError, match='cross-entropy only'): AOM(loss=lf, ratio='kl')

# ---- cost

@pytest.mark.parametrize('kw', [*KINDS, dict(ratio='ce')], ids=named)
@pytest.mark.parametrize('K', (0, 1, 7))
def test_k_forwards(kw, K):
    f,(x,y) = noted(),batch()
    m = AOM(steps=K, **kw)(x, y, f)
    assert len(f.modes)==K
    m.loss(F.cross_entropy, f(m.x), y)
    assert len(f.modes)==K+1

def test_a_training_step_is_2k_plus_3_forwards():
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import resnet18
    torch.manual_seed(0)
    f, x, y, K = resnet18(num_classes=10), torch.rand(2,3,32,32), torch.tensor([1,2]), 2
    f.conv1, f.maxpool = nn.Conv2d(3,64,3,padding=1,bias=False), nn.Identity()
    def flops(g):
        with FlopCounterMode(display=False) as c: g()
        return c.get_total_flops()
    def step(**kw):
        m = AOM(steps=K, **kw)(x, y, f)
        m.loss(F.cross_entropy, f(m.x), y).backward()
    F1 = flops(lambda: f(x))
    for kw in (dict(where='mix'), dict(ratio='kl', label='distance')): assert abs(flops(lambda: step(**kw))/F1/(2*K+3)-1)<=.01

# ---- bad input

def test_clear_errors():
    x,y = batch()
    bad = [(dict(where='both'), "'endpoints', 'mix', 'shared'"), (dict(ratio='kld'), "'fixed', 'kl', 'ce'"),
           (dict(label='angle'), "'projection', 'distance'"), (dict(bn='train'), 'as_is'),
           (dict(ratio='kl', mixer=CutMix()), 'CutMix'), (dict(label='distance', mixer=CutMix()), 'mask is the ratio'),
           (dict(eps=8.), 'eps=8/255'), (dict(alpha=0.), 'alpha'), (dict(radius=2.), 'radius'),
           (dict(eps=.01, step=.1), 'wide'), (dict(c_clean=-1.), 'c_clean=-1'), (dict(c_clean='a'), 'positive'),
           (dict(early_stop=True), 'early_stop'),
           (dict(direction='up'), 'gradient, random'), (dict(ratio='random', mixer=CutMix()), 'CutMix')]
    for kw,msg in bad:
        with pytest.raises(ValueError, match=msg): AOM(**kw)
    for args in ((x, y), (x, y, None)):
        with pytest.raises(ValueError, match='with the model'): AOM()(*args)
    with pytest.raises(ValueError, match='labels 0..5.*more outputs'): AOM()(x, torch.arange(12).clamp(max=5), net())
    with pytest.raises(ValueError, match='negative labels'): AOM()(x, y-9, net())
    with pytest.raises(ValueError, match='softmax'): AOM()(x, y, nn.Sequential(net(), nn.Softmax(1)))
    with pytest.raises(TypeError): AOM(.1, .1)
    with pytest.raises(TypeError, match='nonsense'): AOM(nonsense=1)
    with pytest.raises(ValueError, match=r'not in \[0,1\]'): AOM()(2*x-1, y, net())
    with pytest.raises(ValueError, match='NaN'): AOM()(x/0*0, y, net())
    with pytest.raises(ValueError, match='class numbers'): AOM()(x, y.double(), net())
    AOM(clamp=False)(2*x-1, y, net())   # the only way out of the pixel range, and asked for

def test_mixers_without_usable_masks():
    x,y = batch()
    class Moves:
        "Content changes place: shrinks the partner, so its mask can't put the image together again"
        def __call__(self, x, y=None, model=None):
            m = CutMix()(x)
            return Mixed(m.x.flip(-1), m.idx, m.w, m.mask, m.lam)
    class Maskless(Moves):
        def __call__(self, x, y=None, model=None):
            m = super().__call__(x)
            m.mask = None
            return m
    class Blend3(Three): blend = True
    for mixer in (Moves(), Maskless()):
        for w in ('endpoints','shared'):
            with pytest.raises(ValueError, match="use where='mix'"): AOM(where=w, mixer=mixer)(x, y, net())
        assert AOM(where='mix', mixer=mixer)(x, y, net()).x.shape==x.shape
    with pytest.raises(ValueError, match='Blend3 mixes 3 images'): AOM(ratio='kl', mixer=Blend3())(x, y, net())

def test_a_mask_in_half_precision_still_blends():
    "A generator under autocast makes masks of eight bits; its images were mixed with finer ones"
    x,y = batch()
    class Coarse:
        def __call__(self, x, y=None, model=None):
            m = MixUp(per_sample=True)(x)
            m.mask = m.mask.bfloat16()
            return m
    torch.manual_seed(0)
    m = Coarse()(x)
    assert not torch.allclose(compose(x, m.idx, m.mask), m.x)
    for w in ('endpoints','shared'): assert run(net(), x, y, where=w, mixer=Coarse()).x.isfinite().all()

# ---- what the training loop needs

LOSSES = dict(smooth=nn.CrossEntropyLoss(label_smoothing=.2), weight=nn.CrossEntropyLoss(weight=torch.arange(1.,6).double()),
              ignore=nn.CrossEntropyLoss(ignore_index=2))

def test_the_loss_of_the_loop_is_climbed_and_the_mixer_s_too():
    from fastai.losses import CrossEntropyLossFlat
    x,y = batch()
    a = AOM(mixer=PGD(steps=1), where='mix', **BIG)
    b = with_loss(a, LOSSES['smooth'])
    assert b is not a and b.loss is b.mixer.loss is LOSSES['smooth'] and a.loss is None and a.mixer.loss is None
    assert with_loss(AOM(loss=F.cross_entropy), LOSSES['smooth']).loss is F.cross_entropy   # a loss given stays
    def bound(lf, **kw):
        f = net()
        torch.manual_seed(0)
        return with_loss(AOM(**kw, **BIG), lf)(x, y, f).x
    for lf in LOSSES.values():
        assert torch.equal(bound(lf), run(net(), x, y, loss=lf, **BIG).x) and not torch.equal(bound(lf), run(net(), x, y, **BIG).x)
        with pytest.raises(ValueError, match="ratio='ce'"): with_loss(AOM(ratio='kl'), lf)
    for lf in (F.cross_entropy, nn.CrossEntropyLoss(), CrossEntropyLossFlat()):
        assert torch.equal(bound(lf, ratio='kl'), run(net(), x, y, ratio='kl', **BIG).x)

def test_an_ignored_class_is_not_attacked():
    x,y = batch()
    lf = nn.CrossEntropyLoss(ignore_index=2)
    same = torch.full_like(y, 2)
    m = run(net(), x, same, loss=lf, random_start=False, **BIG)
    assert torch.equal(m.x, compose(x, m.idx, m.mask))
    for k in (0,2):
        with pytest.raises(ValueError, match='cross-entropy only'): AOM(loss=nn.CrossEntropyLoss(ignore_index=k), ratio='kl')
    AOM(loss=nn.CrossEntropyLoss(ignore_index=-1), ratio='kl')   # no class is called -1

def test_growing_steps():
    x,y = batch()
    f,a = noted(),AOM(steps=(1,4), ratio='kl')
    for p,K in ((0.,1), (.3,2), (.6,3), (.9,4), (1.,4)):
        f.modes.clear()
        a.at(p)(x, y, f)
        assert len(f.modes)==K
    f.modes.clear(); a(x, y, f)
    assert len(f.modes)==4 and a.threat.steps==(1,4) and a.at(.3).mixer is a.mixer

@pytest.mark.parametrize('label', ('ratio','projection','distance'))
@pytest.mark.parametrize('ratio', ('fixed','kl','ce'))
@pytest.mark.parametrize('where', WHERE)
def test_the_clean_mixture_has_the_ratio_as_its_label(where, ratio, label):
    x,y = batch()
    kw = dict(where=where, ratio=ratio, label=label, **BIG)
    alone = run(net(), x, y, **kw)
    (one,adv),(c,clean) = run(net(), x, y, c_clean=.5, **kw)
    assert (one,c)==(1.,.5) and torch.equal(adv.x, alone.x) and torch.equal(adv.w, alone.w)
    assert torch.equal(clean.w, alone.lam) and torch.equal(clean.lam, alone.lam) and torch.equal(clean.idx, alone.idx)
    assert torch.equal(clean.x, compose(x, clean.idx, clean.mask)) and (clean.mask.mean((2,3))-clean.lam).abs().max()<1e-6
    if label!='ratio': assert (adv.w-clean.w).abs().max()>1e-4

def test_the_clean_mixture_of_mixers_without_masks_and_of_cutmix():
    x,y = batch()
    class Moves:
        "No masks: the partner is turned upside down"
        def __call__(self, x, y=None, model=None):
            m = CutMix(per_sample=True)(x)
            return Mixed(m.x.flip(-2), m.idx, m.w)
    for mixer in (Moves(), CutMix(per_sample=True), Three()):
        torch.manual_seed(0); want = mixer(x, y)
        (_,adv),(_,clean) = run(net(), x, y, mixer=mixer, where='mix', c_clean=1., **BIG)
        assert torch.equal(clean.x, want.x) and torch.equal(clean.w, want.w) and (adv.x-clean.x).abs().max()<=.15+1e-12
        assert torch.equal(adv.w, want.w)

def test_a_generator_whose_weights_learn_is_attacked_at_fixed_weights():
    "`w` with a gradient must not be walked through: the attack climbs for the network as it is"
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(1).double())
        def forward(self, x, y=None, model=None):
            idx,l = rand_pairs(x),self.a.sigmoid().expand(len(x))
            w = torch.stack([l, 1-l], 1)
            mask = w[:,:,None,None].expand(-1,-1,*x.shape[-2:])
            return Mixed(compose(x, idx, mask), idx, w, mask, w)
    x,y = batch()
    g,f = Weights(),net()
    for kw in (dict(), dict(where='mix'), dict(c_clean=1.)):
        torch.manual_seed(0)
        m = as_terms(AOM(mixer=g, **kw, **BIG)(x, y, f))[-1][1]
        assert m.w.requires_grad and m.x.requires_grad and g.a.grad is None
        m.loss(F.cross_entropy, f(m.x), y).backward()
        assert g.a.grad.abs()>0
        g.a.grad = None
    Weights.blend = True
    m = run(f, x, y, mixer=g, ratio='kl', **BIG)   # a ratio that was found by climbing is a constant
    assert not m.w.requires_grad and not m.lam.requires_grad and not m.x.requires_grad

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_half_precision_images_are_attacked_in_float32(dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(module, 'compose', lambda x, *a: [seen.append(x.dtype), compose(x, *a)][1])
    x,y = batch()
    (_,m),(_,c) = run(net().to(dtype), x.to(dtype), y, c_clean=1., **BIG)
    assert set(seen)=={torch.float32} and m.x.dtype==c.x.dtype==dtype
    assert (m.x.float()-c.x.float()).abs().max()<=.15+.004

# ---- the ratio's gradient is that of the loop, not of clean images

@pytest.mark.parametrize('where', WHERE)
def test_the_ratio_moves_by_perturbed_ends_and_the_summed_loss(where, monkeypatch):
    x,y = batch()
    f,lam,perm,calls = net(),lams(),torch.arange(12).roll(1),[]
    def spy(g, a, b, l, lam, same, objective):
        calls.append((g, a, b, l, lam))
        return ratio_grad(g, a, b, l, lam, same, objective)
    monkeypatch.setattr(module, 'ratio_grad', spy)
    run(f, x, y, where=where, ratio='kl', mixer=At(lam, perm), steps=3, **BIG)
    for k,(g,a,b,l,v) in enumerate(calls):
        clean = (a-x).abs().max()==0 and (b-x[perm]).abs().max()==0
        assert clean==(where=='mix') and not l.requires_grad
        if where=='mix': continue
        c = v.view(-1,1,1,1)
        z = (c*a+(1-c)*b).requires_grad_()
        w = torch.stack([v,1-v],1)
        want, = torch.autograd.grad(sum((w[:,n]*F.cross_entropy(f(z), t, reduction='none')).sum() for n,t in enumerate((y,y[perm]))), z)
        each = torch.stack([F.cross_entropy(f(z), t, reduction='none') for t in (y,y[perm])], 1)
        assert (g-want).abs().max()<=1e-12 and (l-each).abs().max()<1e-12
    assert len(calls)==3

# ---- the controls: everything but adversarial

def test_a_random_ratio_goes_as_far_one_way_or_the_other():
    x,y = batch(200)
    lam = torch.full((200,), .5).double()
    m = run(net(), x, y, ratio='random', mixer=At(lam), **BIG)
    d = m.lam[:,0]-lam
    assert torch.allclose(d.abs(), torch.tensor(.25).double()) and 70<(d>0).sum()<130
    few = run(net(), x, y, ratio='random', mixer=At(lam), steps=2, **BIG)
    assert torch.allclose((few.lam[:,0]-lam).abs(), torch.tensor(.125).double())
    edge = run(net(), x, y, ratio='random', mixer=At(torch.linspace(0,1,200).double()), **BIG).lam
    assert edge.min()>=0 and edge.max()<=1

@pytest.mark.parametrize('where', WHERE)
def test_random_directions_share_start_step_and_limits(where):
    x,y = batch()
    x = .3+.4*x
    kw = dict(where=where, mixer=At(lams()), direction='random', random_start=False, eps=.2, step=.02)
    m = run(net(), x, y, steps=3, **kw)
    d = (m.x-compose(x, m.idx, m.mask))/.02
    k = d.round()
    if where!='shared': assert (d-k).abs().max()<1e-9 and set(k.unique().tolist())=={-3,-1,1,3}   # both ends take the same steps
    else: assert d.abs().max()<=3+1e-9
    assert d.mean().abs()<.2 and torch.equal(m.x, run(net(5), x, y, steps=3, **kw).x)   # whatever the network

@pytest.mark.parametrize('kw,K', [(dict(direction='random'), 0), (dict(direction='random', ratio='random'), 0), (dict(ratio='random'), 7),
                                  (dict(direction='random', ratio='kl'), 7)], ids=named)
@pytest.mark.parametrize('where', WHERE)
def test_a_control_costs_what_it_needs(where, kw, K):
    f,(x,y) = noted(),batch()
    AOM(steps=7, where=where, **kw)(x, y, f)
    assert len(f.modes)==K

@pytest.mark.parametrize('where', WHERE)
def test_only_the_random_part_is_random(where):
    "A random ratio leaves the draws of pairs, ratios and starts alone; random pixels leave the ratio's ascent alone"
    x,y = batch()
    a,b = run(net(), x, y, where=where, **BIG),run(net(), x, y, where=where, ratio='random', **BIG)
    assert torch.equal(a.idx, b.idx) and ((b.lam-a.lam).abs()<=.25+1e-6).all()
    lam,perm = lams(),torch.arange(12).roll(1)
    m = run(net(), x, y, where=where, direction='random', ratio='kl', mixer=At(lam, perm), eps=0.)
    assert (m.lam[:,0]-ratio_pgd(net(), x, x[perm], torch.stack([y,y[perm]],1), lam, 'kl')).abs().max()<=1e-12

# ---- nothing waits for the device

@pytest.mark.parametrize('kw', [dict(where=w, ratio=r, label=l, c_clean=c) for w in WHERE for r,l,c in
                                (('fixed','ratio',0.), ('kl','distance',1.), ('random','projection',0.))], ids=named)
def test_a_trusted_step_reads_no_value(kw):
    x,y = batch()
    x,f = x.float(),net().float()
    check_no_reads(AOM(steps=2, **kw), x, y, f)
    check_meta(AOM(steps=2, **kw), x, y, f)

# ---- names, defaults and whose reading this is

def test_the_signature_is_short_and_its_defaults_are_those_of_pgd():
    p = inspect.signature(AOM).parameters
    assert len(p)<=12 and all(v.kind in (v.KEYWORD_ONLY, v.VAR_KEYWORD) for k,v in p.items() if k!='eps')
    q = inspect.signature(PGD).parameters
    for k in set(p)&set(q): assert p[k].default==q[k].default, k
    promised = dict(eps=.1, step=.02, steps=2, alpha=.5, where='mix', ratio='kl', label='distance',
                    random_start=False, clamp=False, mixer=MixUp())
    a = AOM(**promised, radius=.1, bn='as_is', c_clean=1., loss=F.cross_entropy)
    assert a.threat==Threat(.1, .02, 2, random_start=False, bounds=(-float('inf'), float('inf')))
    assert a.trust==TrustRegion(.1) and a.attack.bn=='as_is' and a.c_clean==1 and AOM(eps=.1).threat.step==.025 and AOM().threat==Threat()
    assert 'kl' in repr(a) and AOM(alpha=.3).mixer.alpha==.3 and AOM().mixer.per_sample

def test_the_module_and_its_notebooks_say_aom_style():
    for mod in ('labels','ratio','aom'): assert 'AOM-style' in importlib.import_module(f'advmix.{mod}').__doc__
    assert 'AOM-style' in AOM.__doc__
    books = sorted((Path(__file__).parents[1]/'nbs').glob('2[123]_*.ipynb'))
    assert len(books)==3
    for p in books:
        assert any('AOM-style' in ''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type']=='markdown'), p.name
