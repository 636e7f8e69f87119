"The AOM-style ratio attack: closed form, biases and the exact answer by grid, in float64"
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from advmix.ratio import *
from advmix.ratio import _ratio_pgd as ratio_pgd
from advmix.ratio import _label_entropy as label_entropy, _ratio_grid as ratio_grid

def net(seed=0, n_in=12, n=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in,16), nn.Tanh(), nn.Linear(16,n)).double()

def batch(b=16, n=5, seed=0, shape=(3,2,2)):
    g = torch.Generator().manual_seed(seed)
    a, c, lam = (torch.rand(b, *s, generator=g, dtype=torch.float64) for s in (shape, shape, ()))
    labels = torch.randint(0, n, (b,2), generator=g)
    labels[:4,1] = labels[:4,0]   # same-class rows included
    return a, c, labels, lam

def mix(a, b, lam): return lam.view(-1,1,1,1)*a + (1-lam).view(-1,1,1,1)*b

def value(model, a, b, labels, lam, objective):
    l, same = source_losses(model(mix(a,b,lam)), labels), labels[:,0]==labels[:,1]
    return lam*l[:,0] + (1-lam)*l[:,1] - (label_entropy(lam, same) if objective=='kl' else 0)

def gradient(model, a, b, labels, lam, objective):
    z = mix(a,b,lam).requires_grad_()
    l = source_losses(model(z), labels)
    g, = torch.autograd.grad((lam*l[:,0]+(1-lam)*l[:,1]).sum(), z)
    return ratio_grad(g, a, b, l.detach(), lam, labels[:,0]==labels[:,1], objective)

@pytest.mark.parametrize('objective', ('ce','kl'))
def test_closed_form_is_the_central_difference(objective):
    a,b,labels,lam = batch()
    lam, h, f = .05+.9*lam, 1e-5, net()
    want = (value(f,a,b,labels,lam+h,objective)-value(f,a,b,labels,lam-h,objective))/(2*h)
    assert (gradient(f,a,b,labels,lam,objective)-want).abs().max()<=1e-7

@pytest.mark.parametrize('objective', ('ce','kl'))
def test_the_value_is_torch_s(objective):
    "CE against soft labels, and `kl_div`, both by torch"
    a,b,labels,lam = batch()
    f = net()
    y = lam[:,None]*F.one_hot(labels[:,0],5) + (1-lam)[:,None]*F.one_hot(labels[:,1],5)
    lp = f(mix(a,b,lam)).log_softmax(1)
    want = -(y*lp).sum(1) if objective=='ce' else F.kl_div(lp, y, reduction='none').sum(1)
    assert (value(f,a,b,labels,lam,objective)-want).abs().max()<=1e-12

def test_gradient_at_the_ends_is_finite_and_clamped_in_the_logarithm_only():
    a,b,labels,lam = batch()
    differ = labels[:,0]!=labels[:,1]
    for e in (0.,1.):
        ce,kl = (gradient(net(),a,b,labels,torch.full_like(lam,e),o) for o in ('ce','kl'))
        gone = (1-2*e)*torch.tensor((1-1e-6)/1e-6).double().log()
        assert torch.allclose(kl, ce-gone*differ, atol=1e-6)
    near = torch.full_like(lam, 2e-6)   # not clamped yet
    ce,kl = (gradient(net(),a,b,labels,near,o) for o in ('ce','kl'))
    assert torch.allclose(ce-kl, ((1-near)/near).log()*differ, atol=1e-9)

@pytest.mark.parametrize('objective', ('ce','kl'))
@pytest.mark.parametrize('seed', range(3))
def test_closed_form_with_perturbed_ends(objective, seed):
    "The ratio blends the images as they are, perturbations included; the gradient is of the loss summed over the batch"
    a,b,labels,lam = batch(seed=seed)
    torch.manual_seed(seed)
    za,zb = (t+.2*(2*torch.rand_like(t)-1) for t in (a,b))
    lam, h, f = .05+.9*lam, 1e-5, net()
    want = (value(f,za,zb,labels,lam+h,objective)-value(f,za,zb,labels,lam-h,objective))/(2*h)
    got = gradient(f,za,zb,labels,lam,objective)
    z = mix(za,zb,lam).requires_grad_()
    l = source_losses(f(z), labels)
    g, = torch.autograd.grad((lam*l[:,0]+(1-lam)*l[:,1]).sum(), z)
    clean = ratio_grad(g, a, b, l.detach(), lam, labels[:,0]==labels[:,1], objective)
    assert (got-want).abs().max()<=1e-7 and (clean-want).abs().max()>1e-3
    one = torch.cat([gradient(f,za[i:i+1],zb[i:i+1],labels[i:i+1],lam[i:i+1],objective) for i in range(16)])
    assert torch.allclose(got, one, atol=1e-12)   # the size of the batch does not enter

def perfect(z): return z.flatten(1).clamp_min(1e-12).log()
ENDS = torch.eye(2, dtype=torch.float64)[:,:,None,None]

def test_ce_runs_to_one_half_on_a_network_without_fault():
    lam = torch.linspace(.02, .98, 17, dtype=torch.float64)
    a,b,labels = ENDS[:1].expand(17,-1,-1,-1), ENDS[1:].expand(17,-1,-1,-1), torch.tensor([[0,1]]).expand(17,-1)
    end = ratio_pgd(Stub(perfect), a, b, labels, lam, 'ce', TrustRegion(1.))
    assert TrustRegion(1.).step==.05 and (end-.5).abs().max()<=.05+1e-12
    assert gradient(perfect, a, b, labels, lam, 'kl').abs().max()<=1e-10
    assert value(perfect, a, b, labels, lam, 'kl').abs().max()<=1e-10

def test_kl_runs_from_one_half_on_a_network_that_says_nothing():
    silent = Stub(lambda z: z.flatten(1)[:,:1].expand(-1,10)*0.)
    a,b,_,_ = batch(6)
    labels, lam = torch.tensor([[0,1]]).expand(6,2), torch.tensor([.1,.3,.45,.55,.7,.9]).double()
    end = ratio_pgd(silent, a, b, labels, lam, 'kl')
    assert torch.allclose(end, torch.where(lam<.5, lam-.25, lam+.25).clamp(0,1), atol=1e-12)
    assert torch.equal(ratio_pgd(silent, a, b, labels, lam, 'ce'), lam)
    assert torch.equal(ratio_pgd(silent, a, b, labels[:,[0,0]], lam, 'kl'), lam)   # one class: no entropy, nothing to climb
    l, v = ratio_grid(silent, a, b, labels, 'kl', n=11)
    H = torch.special.entr(l)+torch.special.entr(1-l)
    assert (v-(torch.tensor(10.).double().log()-H)).abs().max()<=1e-12

class Stub(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, z): return self.f(z)

@pytest.fixture(scope='module')
def trained():
    from sklearn.datasets import load_digits
    d = load_digits()
    x, y = torch.tensor(d.images/16)[:,None], torch.tensor(d.target)
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.Tanh(), nn.Linear(64,10)).double()
    opt = torch.optim.Adam(f.parameters(), lr=1e-2)
    for _ in range(150):
        b = torch.randint(0, 1300, (128,))
        F.cross_entropy(f(x[b]), y[b]).backward()
        opt.step(), opt.zero_grad()
    return f, x[1300:1400], y[1300:1400]

@pytest.mark.parametrize('objective', ('ce','kl'))
def test_never_above_the_exact_maximum_and_above_the_start(trained, objective):
    f,x,y = trained
    torch.manual_seed(1)
    p, lam0, tr = torch.randperm(100), torch.rand(100).double(), TrustRegion()
    labels = torch.stack([y,y[p]],1)
    end = ratio_pgd(f, x, x[p], labels, lam0, objective, tr)
    lams, vals = ratio_grid(f, x, x[p], labels, objective, tr.project(lam0,lam0-1), tr.project(lam0,lam0+1), n=1001)
    at = lambda l: value(f, x, x[p], labels, l, objective).detach()
    best = vals.max(1).values
    assert lams.shape==vals.shape==(100,1001)
    assert (at(end)<=best+1e-3).all() and at(end).mean()>at(lam0).mean()
    assert (at(end)-at(lam0)).mean()>.5*(best-at(lam0)).mean()

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0,2**31), radius=st.floats(0,1), steps=st.integers(0,12), objective=st.sampled_from(['ce','kl']))
def test_ratios_stay_in_the_trust_region(seed, radius, steps, objective):
    a,b,labels,lam = batch(5, seed=seed)
    t = []
    end = ratio_pgd(net(seed%7), a, b, labels, lam, objective, TrustRegion(radius), steps, t)
    for l in t: assert ((l-lam).abs()<=radius+1e-12).all() and (l>=0).all() and (l<=1).all()
    assert len(t)==steps+1 and t[-1] is end and torch.equal(t[0], lam)

def test_source_losses():
    torch.manual_seed(0)
    pred, labels = torch.randn(6,5), torch.randint(0,5,(6,3))
    want = torch.stack([F.cross_entropy(pred, labels[:,n], reduction='none') for n in range(3)], 1)
    assert torch.allclose(source_losses(pred, labels), want) and source_losses(pred.double(), labels).dtype==torch.float64
    assert source_losses(pred.bfloat16(), labels).dtype==torch.float32
    smooth = nn.CrossEntropyLoss(label_smoothing=.1)
    want = torch.stack([F.cross_entropy(pred, labels[:,n], reduction='none', label_smoothing=.1) for n in range(3)], 1)
    assert torch.allclose(source_losses(pred, labels, smooth), want) and smooth.reduction=='mean'

def test_no_trace_also_when_the_model_raises():
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.lin, self.calls = nn.BatchNorm2d(3), nn.Linear(12,5), 0
        def forward(self, z):
            self.calls += 1
            if self.calls==4: raise RuntimeError('no more')
            return self.lin(self.bn(z).flatten(1))
    f = Fussy().double().train()
    f.bn.eval()   # frozen on its own
    before = {k:v.clone() for k,v in f.state_dict().items()}
    a,b,labels,lam = batch()
    with pytest.raises(RuntimeError, match='no more'): ratio_pgd(f, a, b, labels, lam)
    assert f.training and not f.bn.training and all(torch.equal(v, before[k]) for k,v in f.state_dict().items())
    assert all(p.grad is None for p in f.parameters())

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_half_precision_logits_are_promoted(dtype):
    torch.manual_seed(0)
    pred, labels = 20*torch.randn(64,10).to(dtype), torch.randint(0,10,(64,2))
    got = source_losses(pred, labels)
    assert got.dtype==torch.float32 and torch.equal(got, source_losses(pred.float(), labels))
    lf = nn.CrossEntropyLoss(label_smoothing=.1)
    assert source_losses(pred, labels, lf).dtype==torch.float32

def test_steps_and_their_defaults():
    lam, g = torch.tensor([.5,.5,.5]), torch.tensor([-3.,0.,1e-9])
    for r,s in ((.25,.0625), (.1,.025), (1.,.05), (.999,.24975), (0.,0.)):
        assert TrustRegion(r).step==s and torch.equal(TrustRegion(r).ascend(lam, g), lam+s*torch.tensor([-1.,0.,1.]))
    assert TrustRegion(.3, .2).step==.2 and TrustRegion(1., 0.).step==0

def test_no_trace_in_a_network_that_learns():
    "Buffers, flags and gradients stay, and what `trace` and the grid return carries no gradient"
    f = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(.5), nn.Flatten(), nn.Linear(12,5)).double().train()
    f(torch.rand(8,3,2,2).double()).sum().backward()
    before = [v.clone() for v in f.state_dict().values()],[p.grad.clone() for p in f.parameters()]
    a,b,labels,lam = batch()
    end = [ratio_pgd(f, a, b, labels, lam, 'kl') for _ in range(2)]
    assert torch.equal(*end) and not end[0].requires_grad   # dropout was off
    assert not ratio_grid(f, a, b, labels, n=3)[1].requires_grad
    assert all(map(torch.equal, before[0], f.state_dict().values())) and f.training and f[0].training
    assert all(torch.equal(g, p.grad) for g,p in zip(before[1], f.parameters()))

def test_a_grid_between_limits_per_pair_and_in_half_precision():
    a,b,labels,lam = batch()
    lams,vals = ratio_grid(net(), a, b, labels, 'ce', lam*.5, lam, n=3)
    assert torch.allclose(lams, lam[:,None]*torch.tensor([.5,.75,1.]).double()) and vals.shape==(16,3)
    lams,_ = ratio_grid(net().bfloat16(), a.bfloat16(), b.bfloat16(), labels, n=2)
    assert lams.dtype==torch.float32 and lams[0].tolist()==[0,1]

def test_clear_errors():
    a,b,labels,lam = batch()
    with pytest.raises(ValueError, match="'ce' or 'kl'"): ratio_pgd(net(), a, b, labels, lam, 'mse')
    for r in (-.1, 1.1):
        with pytest.raises(ValueError, match=r'in \[0,1\]'): TrustRegion(r)
    with pytest.raises(ValueError, match='quarter'): TrustRegion(.25, -1.)
    with pytest.raises(ValueError, match='more outputs'): ratio_pgd(net(n=3), a, b, labels.clamp(min=3), lam)
    with pytest.raises(ValueError, match='labels -1'): ratio_grid(net(), a, b, labels*0-1, n=2)
