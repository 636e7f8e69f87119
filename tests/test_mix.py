"MixUp, CutMix and the contract: shares, recomposition, sizes, types, extreme ratios, refusals, terms, losses, speed's side effects"
import copy
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from hypothesis import given, settings, strategies as st
from scipy import stats
from advmix.core import trusted
from advmix.mix import Mixed, MixUp, CutMix, as_terms, check_positive, compose, rand_lam, rand_pairs, with_loss
from sync import check_meta, check_no_reads, reads

MIXERS = [MixUp(), MixUp(.2, per_sample=True), CutMix(), CutMix(per_sample=True), CutMix(alpha=.3)]
ids    = ['mixup','mixup_each','cutmix','cutmix_each','cutmix_.3']
mixers = pytest.mark.parametrize('mixer', MIXERS, ids=ids)
SIZES  = [(8,8),(32,20),(20,32),(65,33),(7,13),(1,1),(1,9)]

def probe(n, h, w):
    "Image i is 1 in channel i and 0 elsewhere: channel means are shares"
    return torch.eye(n)[:,:,None,None].expand(n, n, h, w).contiguous()

def plain(x, idx, mask):
    "The formula as it stands in the notebook's head, image by image"
    return torch.stack([sum(mask[i,n]*x[idx[i,n]] for n in range(idx.shape[1])) for i in range(len(idx))])

# ---------------------------------------------------------------- the contract
@mixers
@pytest.mark.parametrize('size', SIZES)
def test_label_share_is_pixel_share(mixer, size):
    for _ in range(5):
        m = mixer(probe(4, *size))
        assert m.w.dtype==torch.float32 and m.idx.dtype==torch.int64 and m.w.shape==m.idx.shape==m.lam.shape==(4,2)
        assert (m.x.mean((2,3))-m.soft(torch.arange(4),4)).abs().max()<1e-6
        assert (m.w.sum(1)-1).abs().max()<1e-6 and (m.w>=0).all()

@mixers
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('n', [1,2,5])
def test_recomposition(mixer, size, n):
    x = torch.rand(n, 3, *size)
    m = mixer(x)
    assert m.mask.shape==(n,2,*size) and m.mask.dtype==torch.float32 and torch.equal(m.mask.sum(1), torch.ones(n,*size))
    assert torch.equal(m.x, plain(x, m.idx, m.mask)) and torch.equal(m.idx[:,0], torch.arange(n))
    assert torch.equal(m.x, compose(x, m.idx, m.mask)) and torch.equal(m.x, compose(x, m.idx, m.mask, own=True))
    assert sorted(m.idx[:,1].tolist())==list(range(n))
    if n==1: assert torch.allclose(m.x, x, atol=1e-6)

@mixers
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_types(mixer, dtype):
    x = torch.rand(4,3,16,12).to(dtype)
    torch.manual_seed(1)
    m = mixer(x)
    torch.manual_seed(1)
    f = mixer(x.float())
    assert m.x.dtype==dtype and m.w.dtype==m.mask.dtype==torch.float32 and torch.equal(m.w, f.w) and torch.equal(m.idx, f.idx)
    assert torch.allclose(m.x.float(), f.x, atol=1e-2)

@mixers
def test_channels_last_stays(mixer):
    x = torch.rand(4,3,16,12).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    m = mixer(x)
    torch.manual_seed(1)
    assert m.x.is_contiguous(memory_format=torch.channels_last) and torch.equal(m.x, mixer(x.contiguous()).x)
    assert mixer(x.contiguous()).x.is_contiguous()

@mixers
def test_no_read_from_the_device(mixer):
    check_no_reads(mixer, torch.rand(4,3,16,12))
    check_meta(mixer, torch.rand(4,3,16,12))

@mixers
def test_inputs_stay_and_views_work(mixer):
    base = torch.rand(3,1,1)
    for x in (base.expand(4,3,8,8), torch.rand(8,8,3,4).permute(3,2,0,1), torch.rand(5,3,8,8)[1:], torch.rand(4,3,8,8,requires_grad=True)):
        before,version = x.detach().clone(),x._version
        m = mixer(x)
        assert torch.equal(x, before) and x._version==version and m.x.data_ptr()!=x.data_ptr()

# ---------------------------------------------------------------- compose
@settings(max_examples=40, deadline=None)
@given(b=st.integers(1,5), n=st.integers(1,4), c=st.integers(1,4), h=st.integers(1,9), w=st.integers(1,9), own=st.booleans(),
       flat=st.booleans(), seed=st.integers(0,999))
def test_compose_is_the_formula(b, n, c, h, w, own, flat, seed):
    g = torch.Generator().manual_seed(seed)
    x,idx = torch.rand(b,c,h,w,generator=g),torch.randint(b,(b,n),generator=g)
    if own: idx[:,0] = torch.arange(b)
    mask = torch.rand(b,n,1,1,generator=g).expand(-1,-1,h,w) if flat else torch.rand(b,n,h,w,generator=g)
    assert torch.equal(compose(x, idx, mask, own=own), plain(x, idx, mask))

def test_compose_gradients():
    idx = torch.tensor([[0,1,1],[1,0,2],[2,2,0]])
    for own in (False,True):
        x,m = torch.rand(3,2,3,2,dtype=torch.double,requires_grad=True),torch.rand(3,3,3,2,dtype=torch.double,requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, m: compose(x, idx, m, own=own), (x,m))
        got  = torch.autograd.grad(compose(x, idx, m, own=own).pow(2).sum(), (x,m))
        want = torch.autograd.grad(plain(x, idx, m).pow(2).sum(), (x,m))
        assert all(torch.allclose(a, b, atol=1e-12) for a,b in zip(got, want))
    (g,) = torch.autograd.grad(compose(x, idx, m.detach()).pow(2).sum(), x, create_graph=True)
    assert torch.autograd.grad(g.sum(), x)[0].isfinite().all()

def test_gradient_of_a_mixer():
    x = torch.rand(4,3,8,8,dtype=torch.double,requires_grad=True)
    for mixer in MIXERS:
        m = mixer(x)
        assert torch.allclose(torch.autograd.grad(m.x.sum(), x)[0], torch.autograd.grad(plain(x, m.idx, m.mask.double()).sum(), x)[0])

@pytest.mark.parametrize('bad', [(2,1,4,4),(1,2,4,4),(2,2,4,5),(2,2,4)])
def test_compose_refuses_masks_that_do_not_fit(bad):
    with pytest.raises(ValueError, match=r'needs \(B,N,H,W\)'): compose(torch.rand(2,3,4,4), torch.tensor([[0,1],[1,0]]), torch.rand(bad))

@mixers
@pytest.mark.parametrize('shape', [(8,10),(3,8,8),(2,3,4,8,8)])
def test_what_is_no_batch_of_images_is_refused(mixer, shape):
    for x in (torch.rand(shape), torch.zeros(4,3,8,8,dtype=torch.uint8), torch.zeros(4,3,8,8,dtype=torch.long)):
        words = 'divide by 255' if x.ndim==4 else r'must be a tensor \(B,C,H,W\)'
        refused(mixer, x, words)

def refused(mixer, x, words):
    with pytest.raises(ValueError, match=words): mixer(x)
    with trusted(), pytest.raises(ValueError, match=words): mixer(x)

# ---------------------------------------------------------------- who, how much, where
@pytest.mark.parametrize('alpha', [1e-6,1e-3,2e-3,.01,.2,1.,5.,np.float32(.4),np.float64(1e-4),2])
def test_beta_ratios_for_any_alpha(alpha):
    lam = rand_lam(alpha, 4000)
    assert lam.dtype==torch.float32 and lam.shape==(4000,) and lam.isfinite().all() and (lam>=0).all() and (lam<=1).all()
    def mid(t): return ((t>.01)&(t<.99)).float().mean().item()
    a   = float(alpha)
    assert abs(mid(lam)-(stats.beta(a,a).cdf(.99)-stats.beta(a,a).cdf(.01)))<.04 and abs(lam.mean()-.5)<.05
    for mixer in (MixUp(alpha), CutMix(alpha), MixUp(alpha, per_sample=True)):
        m = mixer(torch.rand(4,3,8,8))
        assert m.x.isfinite().all() and (m.w.sum(1)-1).abs().max()<1e-6

@pytest.mark.parametrize('alpha', [0,-1,float('nan'),float('inf'),'1',None,np.float32(0)])
def test_no_other_alpha(alpha):
    for cls in (MixUp,CutMix):
        with pytest.raises(ValueError, match='alpha=.* must be a positive number'): cls(alpha)

def test_per_sample_draws_one_ratio_per_image():
    x = torch.rand(64,1,32,32)
    for cls in (MixUp,CutMix):
        each,one = cls(per_sample=True)(x),cls()(x)
        assert each.lam[:,0].unique().numel()==64 and one.lam[:,0].unique().numel()==1
        assert each.w[:,0].unique().numel()>20 and one.w[:,0].unique().numel()==1
        assert (one.mask==one.mask[:1]).all() and not (each.mask==each.mask[:1]).all()

def test_same_seed_same_mixture():
    x = torch.rand(6,3,16,16)
    for mixer in MIXERS:
        res = []
        for s in (1,1,2):
            torch.manual_seed(s)
            res.append(mixer(x).x)
        assert torch.equal(res[0], res[1]) and not torch.equal(res[0], res[2])

@pytest.mark.parametrize('h,w', [(32,32),(20,33),(1,1),(5,64)])
def test_boxes(h, w):
    lam = rand_lam(1., 500)
    box = CutMix.rand_box(lam, h, w)
    t,b,l,r = box.T
    assert box.dtype==torch.int64 and (t>=0).all() and (b<=h).all() and (l>=0).all() and (r<=w).all() and (t<=b).all() and (l<=r).all()
    m = CutMix.box_mask(box, h, w)
    assert m.shape==(500,h,w) and torch.allclose(1-m.mean((1,2)), ((b-t)*(r-l)).float()/(h*w), atol=1e-6)
    at  = torch.tensor([[h//2,w//2]]).expand(500, -1)
    box = CutMix.rand_box(lam, h, w, at)
    half = torch.stack([(h*(1-lam).sqrt()).long()//2, (w*(1-lam).sqrt()).long()//2], 1)
    assert torch.equal(box[:,0], (h//2-half[:,0]).clamp_min(0)) and torch.equal(box[:,3], (w//2+half[:,1]).clamp_max(w))
    assert torch.equal(CutMix.rand_box(torch.zeros(1), 16, 8, torch.tensor([[8,4]])), torch.tensor([[0,16,0,8]]))

def test_cutmix_label_as_drawn_on_request():
    for each in (False,True):
        torch.manual_seed(3)
        a = CutMix(correct_lam=False, per_sample=each)(torch.rand(4,3,16,16))
        torch.manual_seed(3)
        b = CutMix(per_sample=each)(torch.rand(4,3,16,16))
        assert torch.equal(a.w, a.lam) and torch.equal(a.mask, b.mask) and torch.equal(b.w[:,0], b.mask[:,0].mean((1,2)))

# ---------------------------------------------------------------- Mixed, terms, losses
def test_soft_labels_and_loss():
    x,y,pred = torch.rand(4,3,8,8),torch.tensor([0,2,1,2]),torch.randn(4,3)
    for mixer in MIXERS:
        m = mixer(x)
        want = torch.stack([sum(m.w[i,n]*F.one_hot(y[m.idx[i,n]],3) for n in range(2)) for i in range(4)])
        assert torch.allclose(m.soft(y,3), want) and torch.allclose(m.loss(F.cross_entropy, pred, y), F.cross_entropy(pred, want))

def test_unmixed():
    x,y = torch.rand(4,3,8,6),torch.arange(4)
    m = Mixed.unmixed(x)
    assert m.x is x and torch.equal(compose(x, m.idx, m.mask), x) and torch.equal(m.soft(y,4), torch.eye(4)) and m.mask.shape==(4,2,8,6)
    check_meta(Mixed.unmixed, x)

def test_as_terms():
    m = Mixed.unmixed(torch.rand(2,1,4,4))
    assert as_terms(m)==[(1.,m)] and as_terms([(.5,m),(2,m)])==[(.5,m),(2,m)] and as_terms(((.5,m),))==[(.5,m)]
    for bad in (None, m.x, [], [m], [(m,.5)], [(.5,m,1)], [[.5,m]], (m.x,m.w)):
        with pytest.raises(TypeError, match='must return a Mixed or a list'): as_terms(bad)

class Climber:
    def __init__(self, loss=None, inner=()): self.loss,self.inner = loss,inner
class Holder:
    def __init__(self, *inner): self.inner = inner
    def with_loss(self, loss): return Holder(*[with_loss(m, loss) for m in self.inner])

def test_with_loss_fills_in_what_is_open_and_nothing_else():
    lf = nn.CrossEntropyLoss()
    open_,closed,none = Climber(),Climber(F.nll_loss),MixUp()
    assert with_loss(open_, lf).loss is lf and open_.loss is None and with_loss(open_, lf) is not open_
    assert with_loss(closed, lf) is closed and with_loss(none, lf) is none
    h = with_loss(Holder(open_, closed, Holder(open_), none), lf)
    assert [m.loss for m in h.inner[:2]]==[lf, F.nll_loss] and h.inner[2].inner[0].loss is lf and h.inner[3] is none
    def func(x, y, model=None): return Mixed.unmixed(x)
    assert with_loss(func, lf) is func

def test_check_positive_names_the_first_fault():
    check_positive(a=1, b=np.float32(.4), c=np.int64(3))
    with pytest.raises(ValueError, match="b=0 must be"): check_positive(a=1, b=0, c=-1)

class Copies(TorchFunctionMode):
    "How often something goes from the host to another device, and how often the host waits for it"
    n = waits = 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if func is Tensor.to and args[0].is_cpu and not res.is_cpu:
            self.n,self.waits = self.n+1,self.waits+(not (kwargs or {}).get('non_blocking'))
        return res

@pytest.mark.parametrize('mixer', [*MIXERS, lambda x: CutMix.rand_box(torch.rand(4), 16, 12, x[:,:2,0,0].long())], ids=[*ids,'centred'])
def test_the_host_does_not_wait_for_its_copies(mixer):
    with trusted(), Copies() as c: mixer(torch.rand(4,3,16,12, device='meta'))
    assert c.n and not c.waits

class Gathers(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten.index.Tensor and args[0].ndim==4
        return func(*args, **(kwargs or {}))

@mixers
def test_images_are_copied_once_for_each_partner(mixer):
    "The image itself is where it is already"
    with Gathers() as g: mixer(torch.rand(4,3,16,12))
    assert g.n==1

def test_what_can_be_differentiated_by_the_ratio(): assert MixUp.blend and not CutMix.blend

def test_mixers_copy():
    for m in MIXERS: assert vars(copy.deepcopy(m))==vars(m)

def test_pairs():
    for n in (0,1,7):
        idx = rand_pairs(torch.rand(n,1))
        assert idx.shape==(n,2) and sorted(idx[:,1].tolist())==list(range(n)) and idx.dtype==torch.int64

# ---------------------------------------------------------------- the detector itself
READERS = dict(
    item=lambda z: z.sum().item(), tolist=lambda z: z.tolist(), cpu=lambda z: z.cpu(), to=lambda z: z.to('cpu'),
    numpy=lambda z: z.numpy(), array=lambda z: np.asarray(z), bool=lambda z: bool((z>1).any()), float=lambda z: float(z[0]),
    index=lambda z: z[z>.5], put=lambda z: z.index_put((z>.5,), torch.ones(1)), nonzero=lambda z: z.nonzero(),
    where=lambda z: torch.where(z>.5), select=lambda z: z.masked_select(z>.5), unique=lambda z: z.unique(),
    equal=lambda z: torch.equal(z,z), allclose=lambda z: torch.allclose(z,z), max=lambda z: max(z[0],z[1]),
    format=lambda z: f'{z.sum():.2f}', range=lambda z: range(int(z.sum())), tensor=lambda z: torch.tensor([z[0],z[1]]),
    slice=lambda z: z[:z.sum().long()], repeat=lambda z: torch.repeat_interleave(z, (3*z).long().abs()))

@pytest.mark.parametrize('name', READERS)
def test_the_detector_sees(name):
    def step(z): return READERS[name](z.clone().mul_(2)-1)   # far from the batch itself
    seen = reads(step, torch.rand(4))
    assert len(seen)>=1 and all(' at test_mix.py:' in s for s in seen)
    if name not in ('format','allclose','put'):   # these give an answer there
        with pytest.raises((RuntimeError,NotImplementedError,TypeError)): READERS[name](torch.rand(4, device='meta'))

def test_the_detector_sees_parameters_backward_and_in_place():
    net = nn.Sequential(nn.Linear(4,4), nn.BatchNorm1d(4))
    def by_gradient(x):
        for p in net.parameters(): p.grad = None
        net(x.clone()).sum().backward()
        return net[0].weight.grad.norm().item()
    def by_copy(x):
        z = torch.zeros(3,4)
        z.copy_(x)
        return z.sum().item()
    x = torch.rand(3,4)
    assert len(reads(by_gradient, x, also=net))==1 and len(reads(by_copy, x))==1
    assert len(reads(lambda: net[0].bias.sum().item(), also=net))==1 and len(reads(lambda: net[1].running_mean.tolist(), also=net))==1
    with pytest.raises(AssertionError, match='_local_scalar_dense at test_mix.py.*in by_copy'): check_no_reads(by_copy, x)

def test_the_detector_lets_pass():
    def fine(x):
        lam = rand_lam(1., 3)
        n   = int(3*lam[0].item())+len(x)+x.shape[1]
        idx = torch.randperm(len(x)).tolist()
        return (x[idx]*lam.mean().item()+n).sort().values.where(x>0, x).masked_fill(x>.5, 0.).argmax(1)
    assert reads(fine, torch.rand(3,4))==[]
