"The generators as modules and as Mixers: on every backbone, without traces, with small batches, through AOM"
import copy
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from advmix.core import *
from advmix.models import *
from advmix.mix import *
from advmix.aom import *
from advmix.attention import *
from advmix.generator import *

BOTH = (AdAutoMixGenerator, AutoMixGenerator)

def small(size=8, c=1): return get_model('convnet', 10, c_in=c, size=size)
def loud(gen):
    for p in gen.parameters(): nn.init.normal_(p, std=.3)
    return gen
def data(b=6, c=1, h=8, w=8): return torch.rand(b,c,h,w),torch.randint(10, (b,))

@pytest.mark.parametrize('cls', BOTH)
def test_contract(cls):
    net = small()
    x,y = data()
    m = loud(cls.for_model(net, x))(x, y, net)
    n = m.idx.shape[1]
    assert (m.x.shape,m.idx.shape,m.w.shape,m.mask.shape)==(x.shape,(6,n),(6,n),(6,n,8,8)) and m.idx.dtype==torch.int64
    assert m.mask.min()>0 and m.mask.max()<1
    torch.testing.assert_close(m.mask.sum(1), torch.ones(6,8,8), atol=1e-6, rtol=0)
    torch.testing.assert_close(m.w.sum(1), torch.ones(6))
    assert torch.equal(m.w, m.lam) and torch.equal(m.idx[:,0], torch.arange(6)) and not cls.blend
    torch.testing.assert_close(m.x, compose(x, m.idx, m.mask))

@pytest.mark.parametrize('n', (2,3,4))
def test_label_is_the_ratio_whatever_the_masks(n):
    x,y  = data()
    z,c  = torch.randn(6,8,4,4),torch.randn(6,10).double()
    gens = [AdAutoMixGenerator(8, n_mix=n, per_sample=True),loud(AdAutoMixGenerator(8, n_mix=n))]
    idx,lam = gens[0].draw(x)
    a,b = (g.mix(x, z, idx, lam) for g in gens)
    assert torch.equal(a.w, lam) and torch.equal(b.w, lam) and not torch.allclose(a.mask, b.mask)
    w     = lam.double()
    items = sum(w[:,k]*F.cross_entropy(c, y[idx[:,k]], reduction='none') for k in range(n)).mean()
    soft  = F.cross_entropy(c, (w[...,None]*F.one_hot(y, 10)[idx]).sum(1))
    torch.testing.assert_close(items, soft, atol=1e-12, rtol=0)

def test_mixture_is_equivariant():
    gen = loud(AdAutoMixGenerator(8, n_mix=3, per_sample=True)).double()
    x,z = torch.rand(6,3,9,7).double(),torch.randn(6,8,3,3).double()
    idx,lam = gen.draw(x)
    lam = lam.double()
    order,rows = torch.tensor([2,0,1]),torch.randperm(6)
    torch.testing.assert_close(gen.mix(x, z, idx[:,order], lam[:,order]).x, gen.mix(x, z, idx, lam).x, atol=1e-12, rtol=0)
    torch.testing.assert_close(gen.mix(x, z, idx[rows], lam[rows]).x, gen.mix(x, z, idx, lam).x[rows], atol=1e-12, rtol=0)

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0,9999), b=st.integers(1,9), n=st.integers(2,5), per_sample=st.booleans(), alpha=st.sampled_from((.05,.2,1.,8.)))
def test_draw(seed, b, n, per_sample, alpha):
    torch.manual_seed(seed)
    idx,lam = AdAutoMixGenerator(4, n_mix=n, alpha=alpha, per_sample=per_sample).draw(torch.zeros(b,1))
    assert idx.shape==lam.shape==(b,n) and torch.equal(idx[:,0], torch.arange(b)) and lam.min()>=0
    assert all(torch.equal(c.sort()[0], torch.arange(b)) for c in idx.T)
    torch.testing.assert_close(lam.sum(1), torch.ones(b))
    if not per_sample: assert (lam==lam[0]).all()

def test_ratio_laws():
    u = AdAutoMixGenerator(4, n_mix=2, per_sample=True).draw(torch.zeros(20000,1))[1][:,0]
    assert abs(u.std()-12**-.5)<.01                                            # uniform
    t = AdAutoMixGenerator(4, n_mix=3, per_sample=True).draw(torch.zeros(20000,1))[1]
    ref = torch.rand(20000,3)
    ref = ref/ref.sum(1, keepdim=True)
    assert (t.quantile(torch.tensor([.1,.5,.9]))-ref.quantile(torch.tensor([.1,.5,.9]))).abs().max()<.01
    assert abs(AutoMixGenerator(4, per_sample=True).draw(torch.zeros(20000,1))[1][:,0].std()-.05**.5)<.01   # Beta(2,2)
    assert {AdAutoMixGenerator(4, n_mix=(2,3)).draw(torch.zeros(4,1))[0].shape[1] for _ in range(30)}=={2,3}

@pytest.mark.parametrize('arch,h,w,stage', [
    ('resnet18',32,32,-2), ('resnet18',224,160,2), ('resnext50',32,32,-2), ('preact_resnet18',32,24,'stage2'),
    ('swin_t',64,64,2), ('swin_t',64,64,'features.6'), ('convnext_t',64,96,-2), ('wrn34_10',8,8,-1)])
def test_any_backbone(arch, h, w, stage):
    net = get_model(arch, 10, size=min(h,w)).eval()
    x,y = data(2, 3, h, w)
    for cls,kw in ((AdAutoMixGenerator,dict(n_mix=2)), (AutoMixGenerator,{})):
        m = cls.for_model(net, x, stage=stage, **kw)(x, y, net)
        assert m.mask.shape==(2,2,h,w) and m.x.isfinite().all()
        torch.testing.assert_close(m.mask.sum(1), torch.ones(2,h,w), atol=1e-6, rtol=0)

@pytest.mark.parametrize('fail', (False,True))
def test_leaves_no_trace(fail):
    net = small()
    x,y = data()
    gen = AdAutoMixGenerator.for_model(net, x)
    net.train()
    net.net.stage1.eval()
    net.net.head.weight.requires_grad_(False)
    net(x).sum().backward()
    state = lambda: [*(m.training for m in net.modules()), *(p.requires_grad for p in net.parameters()), x.clone(),
                     *(t.clone() for t in net.state_dict().values()),
                     *(None if p.grad is None else p.grad.clone() for p in net.parameters())]
    before = state()
    if fail:
        with pytest.raises(RuntimeError): gen(torch.rand(6,5,8,8), y, net)
    else: gen(x, y, net).x.sum().backward()
    for a,b in zip(before, state()): assert torch.equal(a, b) if torch.is_tensor(a) else a is b
    assert not any(len(m._forward_hooks) for m in net.modules())

def test_masks_carry_a_gradient_to_the_generator_only():
    net = small()
    x,y = data()
    gen = AdAutoMixGenerator.for_model(net, x)
    gen(x, y, net).mask[:,0].sum().backward()
    assert all(p.grad is not None for p in gen.parameters()) and all(p.grad is None for p in net.parameters())
    with torch.no_grad(): assert not gen(x, y, net).x.requires_grad

@pytest.mark.parametrize('cls', BOTH)
def test_copies_and_saves(cls, tmp_path):
    net = small()
    x,y = data()
    gen,other = loud(cls.for_model(net, x)),cls.for_model(net, x)
    torch.save(gen.state_dict(), tmp_path/'g.pt')
    other.load_state_dict(torch.load(tmp_path/'g.pt', weights_only=True))
    def out(g): torch.manual_seed(1); return g(x, y, net).x
    assert torch.equal(out(gen), out(other)) and torch.equal(out(gen), out(copy.deepcopy(gen)))

@pytest.mark.parametrize('where', ('endpoints','mix','shared'))
@pytest.mark.parametrize('cls', BOTH)
def test_attack_through_it(cls, where):
    net = small().eval()
    x,y = data(8)
    gen = loud(cls.for_model(net, x))
    def loss(mixer):
        torch.manual_seed(4)
        m = mixer(x, y, net)
        return m.loss(F.cross_entropy, net(m.x), y).item()
    assert loss(AOM(mixer=gen, eps=.1, step=.03, steps=4, where=where))>loss(gen)
    with pytest.raises(ValueError, match='needs a mixer whose mask is the ratio'): AOM(mixer=gen, ratio='ce')

def test_half_precision_images():
    net = small().eval()
    x,y = data()
    gen = AdAutoMixGenerator.for_model(net, x)
    with torch.autocast('cpu', dtype=torch.bfloat16): m = gen(x, y, net)
    assert m.mask.dtype==m.w.dtype==m.x.dtype==torch.float32
    m = gen.mix(x.half(), torch.randn(6,64,4,4).half(), *gen.draw(x))
    assert (m.x.dtype,m.mask.dtype,m.w.dtype)==(torch.float16,torch.float32,torch.float32)

def test_own_attention():
    class Values(nn.Module):
        def __init__(self, c): super().__init__(); self.v = nn.Conv2d(c, 1, 1)
        def forward(self, z, idx, lam): return self.v(z)[idx][:,:,0]
    x,y = data()
    m = MaskGenerator(Values(64), n_mix=3)(x, y, small())
    torch.testing.assert_close(m.mask.sum(1), torch.ones(6,8,8), atol=1e-6, rtol=0)

class Pooled(nn.Module):
    def __init__(self): super().__init__(); self.body,self.head = nn.Sequential(nn.Conv2d(1,4,8), nn.ReLU()),nn.Linear(4,10)
    def forward(self, x): return self.head(self.body(x).flatten(1))

@pytest.mark.parametrize('f,msg', [
    (lambda x,y,net: AdAutoMixGenerator.for_model(net, x, stage=7), r'0 net.stage1 \(2, 32, 8, 8\), 1 net.stage2 \(2, 64, 4, 4\)'),
    (lambda x,y,net: AdAutoMixGenerator.for_model(net, x, stage='layer3'), "'layer3' not found"),
    (lambda x,y,net: AdAutoMixGenerator.for_model(nn.Sequential(nn.Flatten(), nn.Linear(64,10)), x), 'no stages'),
    (lambda x,y,net: AdAutoMixGenerator.for_model(net, x, stage='net.head'), 'not a feature map'),
    (lambda x,y,net: AdAutoMixGenerator(4, stage=0)(x, y, Pooled()), 'several places'),
    (lambda x,y,net: AdAutoMixGenerator(99)(x, y, net), 'z has 64 channels'),
    (lambda x,y,net: AdAutoMixGenerator(64, n_mix=9)(x, y, net), 'n_mix 9 is more than the 6 images'),
    (lambda x,y,net: AutoMixGenerator(64)(x[:1], y[:1], net), 'n_mix 2 is more than the 1 images'),
    (lambda x,y,net: AdAutoMixGenerator(64)(x), r'mixer\(x, y, model\)'),
    (lambda x,y,net: AdAutoMixGenerator(64, n_mix=1), 'two images or more'),
    (lambda x,y,net: AdAutoMixGenerator(64, n_mix=(2,1)), 'two images or more'),
    (lambda x,y,net: AdAutoMixGenerator(64, n_mix=2.5), 'two images or more'),
    (lambda x,y,net: AdAutoMixGenerator(64, alpha=0.), 'must be a positive number'),
    (lambda x,y,net: AdAutoMixGenerator(64, lam_margin=.6), r'lam_margin=0.6 is outside'),
    (lambda x,y,net: AutoMixGenerator(64, up='cubic'), "'bilinear' or 'nearest'")])
def test_faults(f, msg):
    with pytest.raises(ValueError, match=msg): f(*data(), small())

def test_a_trained_generator():
    "Masks of the one that ships: sum to 1, follow the ratio, and know where things are"
    from advmix.weights import cifar_sheet, from_pretrained
    x,y,_ = cifar_sheet()
    net,gen = from_pretrained('adautomix-cifar10'),AdAutoMixGenerator.from_pretrained('adautomix-cifar10', per_sample=True)
    assert gen.stage==-1 and gen.n_mix==(3,) and all(p.requires_grad for p in gen.parameters())
    with torch.no_grad(): m = gen(x, y, net)
    assert m.mask.shape==(100,3,32,32) and (m.mask.sum(1)-1).abs().max()<1e-5
    share,lam = (t-t.mean() for t in (m.mask.mean((2,3)), m.lam))
    assert (share*lam).sum()/lam.square().sum()>.6 and m.mask.std((2,3)).mean()>.02
    assert AdAutoMixGenerator.from_pretrained('adautomix-cifar10', n_mix=2)(x[:4], y[:4], net).mask.shape==(4,2,32,32)

@pytest.mark.parametrize('cls,name,says', [
    (AdAutoMixGenerator, 'pgd-cifar10', 'no generator of masks was trained with pgd-cifar10'),
    (AutoMixGenerator, 'adautomix-cifar10', 'the generator of adautomix-cifar10 is no AutoMixGenerator'),
    (AdAutoMixGenerator, 'nobody', 'choose one of adautomix-cifar10')])
def test_a_generator_that_is_not_there(cls, name, says):
    with pytest.raises(ValueError, match=says): cls.from_pretrained(name)
