"The contract of all `MIXES`; each method's ratios against its formula; fastai's and torchvision's own as references"
import math, pickle, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from scipy import stats
from scipy.special import erf
from advmix.mix import MixUp, CutMix, Mixed, as_terms, compose
from advmix.zoo import MIXES, RandomMix, ResizeMix, FMix, GridMix, GridMixup, SmoothMix
from advmix.zoo import _enlarge as enlarge, _fmix_mask as fmix_mask, _low_freq as low_freq, _sieve_mask as sieve_mask
from sync import check_meta, check_no_reads

ATTACKS = ('pgd','iat','aom')   # they move pixels, so labels aren't shares
NAMES   = [n for n in MIXES if n not in (*ATTACKS,'manifold')]
MOVING = ('resizemix','snapmix','puzzlemix')   # content doesn't keep its place, so there is no mask
SIZES  = [(8,8),(32,20),(20,32),(65,33),(7,13)]

def some_map(x, y=None):
    "A saliency that doesn't depend on the image"
    g = torch.Generator().manual_seed(x.shape[-1])
    return (torch.rand(1, *x.shape[-2:], generator=g)**3).expand(len(x), -1, -1).to(x.device)
def flat_map(x, y=None): return torch.zeros(len(x), *x.shape[-2:], device=x.device)
ARG = dict(saliencymix='saliency', attentivemix='attention', snapmix='cam', puzzlemix='saliency')
def make(name, look=some_map, **kw): return MIXES[name](**({ARG[name]:look} if name in ARG else {}), **kw)

def probe(n, h, w):
    "Image i is 1 in channel i and 0 elsewhere: channel means are shares"
    return torch.eye(n)[:,:,None,None].expand(n, n, h, w).contiguous(),torch.arange(n)

class Net(nn.Module):
    def __init__(self, c=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c,6,3,padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                                  nn.Conv2d(6,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5))
        self.head = nn.Linear(8,4)
    def forward(self, x): return self.head(self.body(x).mean((2,3)))

VARIANTS = [(n,{}) for n in NAMES if n!='snapmix'] + [('mixup',dict(per_sample=True)), ('cutmix',dict(per_sample=True)),
    ('fmix',dict(max_soft=.3)), ('fmix',dict(released=True)), ('gridmix',dict(n=20)),
    ('gridmixup',dict(alpha=1., nx=3, area=(.3,1.), aspect=(.3,3.))), ('saliencymix',dict(per_sample=True)),
    ('attentivemix',dict(alpha=1.)),
    ('puzzlemix',dict(transport=False)), ('puzzlemix',dict(t_size=2))]

@pytest.mark.parametrize('name,kw', VARIANTS)
@pytest.mark.parametrize('size', SIZES)
def test_label_share_is_pixel_share(name, kw, size):
    x,y = probe(4, *size)
    mixer = make(name, **kw)
    for _ in range(4):
        m = mixer(x, y)
        assert m.w.dtype==torch.float32 and m.idx.dtype==torch.int64 and m.w.shape==m.idx.shape==m.lam.shape==(4,2)
        assert (m.x.mean((2,3))-m.soft(y,4)).abs().max() < 1e-5
        assert (m.w.sum(1)-1).abs().max()<1e-6 and (m.w>=0).all()

def test_snapmix_flat_evidence_is_area():
    x,y = probe(6, 32, 20)
    for _ in range(10):
        m = make('snapmix', flat_map)(x, y)
        own,other = m.x.mean((2,3))[y,y],m.idx[:,1]!=y
        assert torch.allclose(own[other], m.w[other,0], atol=1e-5)

@pytest.mark.parametrize('name,kw', [v for v in VARIANTS if v[0] not in MOVING]+[('puzzlemix',dict(transport=False))])
@pytest.mark.parametrize('size', SIZES)
def test_recomposition(name, kw, size):
    x = torch.rand(5, 3, *size)
    m = make(name, **kw)(x, torch.arange(5)%3)
    assert m.mask.shape==(5,2,*size) and m.mask.dtype==torch.float32
    assert torch.allclose(m.mask.sum(1), torch.ones(5,*size), atol=1e-6)
    assert torch.allclose(compose(x, m.idx, m.mask), m.x, atol=1e-6)
    assert torch.allclose(m.mask.mean((2,3)), m.w, atol=1e-6)

@pytest.mark.parametrize('name', MOVING)
def test_moving_content_has_no_mask(name):
    assert make(name)(torch.rand(4,3,32,32), torch.arange(4)).mask is None

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('n', [1,3])
def test_small_and_odd_batches(name, n):
    x = torch.rand(n,3,9,8)
    for _ in range(5):
        m = make(name)(x, torch.arange(n))
        assert m.x.shape==x.shape and m.x.isfinite().all() and m.w.isfinite().all()
        if n==1 and name not in MOVING: assert torch.allclose(m.x, x, atol=1e-6)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_types(name, dtype):
    m = make(name)(torch.rand(4,3,16,12).to(dtype), torch.arange(4))
    assert m.x.dtype==dtype and m.w.dtype==torch.float32 and m.x.isfinite().all() and m.w.isfinite().all()

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('c', [1,2,13])
def test_any_channels_on_grey_digits_size(name, c):
    m = make(name)(torch.rand(4,c,8,8), torch.arange(4))
    assert m.x.shape==(4,c,8,8) and m.x.isfinite().all()

@pytest.mark.parametrize('name', NAMES)
def test_seed(name):
    x,y,mixer = torch.rand(8,3,32,32),torch.arange(8),make(name)
    def run(s):
        torch.manual_seed(s)
        return [mixer(x, y).x for _ in range(3)]
    a,b = run(3),run(3)
    assert all(torch.equal(p,q) for p,q in zip(a,b)) and not torch.equal(a[0],a[1]) and not torch.equal(a[1],a[2])

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', NAMES)
def test_same_geometry_on_gpu(name):
    x,y,res = torch.rand(8,3,32,32),torch.arange(8),[]
    for d in ('cpu','cuda'):
        torch.manual_seed(5)
        m = make(name)(x.to(d), y.to(d))
        res.append((m.x.cpu(), m.w.cpu(), m.idx.cpu()))
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a,b in zip(*res))

@pytest.mark.parametrize('name', NAMES)
def test_inputs_unmodified_whatever_their_layout(name):
    base = torch.rand(6,16,12,3)
    ro   = np.ascontiguousarray(base.permute(0,3,1,2).numpy())
    ro.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # numpy's flag can't be kept, says torch
        read_only = torch.from_numpy(ro)
    views,outs = [base.permute(0,3,1,2), base.permute(0,3,1,2).contiguous(memory_format=torch.channels_last), read_only],[]
    for x in views:
        before,version = x.clone(),x._version
        y = torch.arange(6)
        torch.manual_seed(1)
        outs.append(make(name)(x, y).x)
        assert torch.equal(x, before) and x._version==version and torch.equal(y, torch.arange(6))
    assert all(torch.allclose(o, outs[0], atol=1e-6) for o in outs)
    make(name)(torch.rand(3,1,1).expand(4,3,16,16), torch.arange(4))

@pytest.mark.parametrize('name', NAMES)
def test_values_within_the_sources_range(name):
    x = torch.rand(6,3,32,32)*torch.linspace(.2,1,6)[:,None,None,None]
    m = make(name)(x, torch.arange(6))
    top = x.amax((1,2,3))[m.idx].amax(1)
    assert (m.x.amax((1,2,3))<=top+1e-6).all() and m.x.min()>=-1e-6

@pytest.mark.parametrize('name', [*NAMES,*ATTACKS])
@pytest.mark.parametrize('fails', [False,True])
def test_model_untouched(name, fails):
    net = Net().train()
    net.body[1].eval()   # one frozen batch norm
    for p in net.body[3].parameters(): p.requires_grad_(False)
    x,y = torch.rand(4,3,16,16),torch.arange(4)
    net.head(torch.rand(2,8)).sum().backward()   # some .grad are tensors, some None
    if fails: net.head = nn.Sequential(nn.Linear(9,4))
    def state(): return ([None if p.grad is None else p.grad.clone() for p in net.parameters()], [b.clone() for b in net.buffers()],
                         [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
                         [len(m._forward_hooks) for m in net.modules()])
    before,mixer = state(),MIXES[name]()
    if fails and (name in ATTACKS or getattr(mixer, 'needs_model', False)):
        with pytest.raises((RuntimeError,ValueError)): mixer(x, y, net)
    else: mixer(x, y, net)
    def same(p, q): return (p is q) if p is None or q is None else torch.equal(torch.as_tensor(p), torch.as_tensor(q))
    for a,b in zip(before, state()): assert all(same(p, q) for p,q in zip(a,b))

@pytest.mark.parametrize('name', NAMES)
def test_defaults_work_inside_no_grad_and_autocast(name):
    net,x,y = Net(1),torch.rand(4,1,8,8),torch.arange(4)
    with torch.no_grad(): assert not MIXES[name]()(x, y, net).x.requires_grad
    with torch.autocast('cpu', dtype=torch.bfloat16): assert MIXES[name]()(x, y, net).x.dtype==torch.float32
    assert not MIXES[name]()(x, y, net).x.requires_grad

@pytest.mark.parametrize('name', [n for n in MIXES if n not in NAMES[:8]])
def test_without_a_model_the_error_says_what_works(name):
    works = r'these need none: mixup, cutmix, resizemix, fmix, gridmix, gridmixup, smoothmix, saliencymix$'
    words = works if name in ('attentivemix','snapmix') else r'\(x, y, model\)'
    with pytest.raises(ValueError, match=words): MIXES[name]()(torch.rand(2,3,8,8), torch.arange(2))

@pytest.mark.parametrize('name', NAMES)
def test_what_is_no_batch_of_images_is_refused(name):
    net,y = Net(),torch.arange(4)
    with pytest.raises(ValueError, match='divide by 255'): make(name)(torch.zeros(4,3,8,8,dtype=torch.uint8), y, net)
    with pytest.raises(ValueError, match=r'\(B,C,H,W\)'): make(name)(torch.rand(4,8), y, net)

@pytest.mark.parametrize('name', NAMES)
def test_channels_last_stays(name):
    x = torch.rand(4,3,16,12).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        m = make(name)(x, torch.arange(4))
        assert m.x.is_contiguous(memory_format=torch.channels_last) and make(name)(x.contiguous(), torch.arange(4)).x.is_contiguous()

@pytest.mark.parametrize('name', MIXES)
def test_no_mixer_reads_from_the_device(name):
    "The batch, the network, and all that comes of them stay where they are, but for checks in the first batch"
    net,x,y = Net(),torch.rand(4,3,16,12),torch.arange(4)
    for seed in range(3):   # random branches
        torch.manual_seed(seed)
        check_no_reads(MIXES[name](), x, y, net)
    check_meta(MIXES[name](), x, y, net)
    if name in ARG: check_no_reads(make(name), x, y)
    if name in ('fmix','mixup','cutmix','saliencymix'):
        check_no_reads(RandomMix([name,'cutmix'], p=.9), x, y, net)
        if name!='fmix': check_no_reads(MIXES[name](per_sample=True), x, y)

LIMITS = ('mixup','cutmix','fmix','gridmix','saliencymix','attentivemix')
@pytest.mark.parametrize('name', LIMITS)
@pytest.mark.parametrize('lam', [0.,1.])
def test_limits(name, lam, monkeypatch):
    for mod in ('mix','zoo','saliency'): monkeypatch.setattr(f'advmix.{mod}.rand_lam', lambda a,n: torch.full((n,), lam))
    def halves(*s, **k): return torch.full(s[0] if s and isinstance(s[0], (tuple,list,torch.Size)) else s, .5)
    monkeypatch.setattr(torch, 'rand', halves)   # boxes in the middle
    x = torch.linspace(0,1,4*3*16*16).view(4,3,16,16)
    mid = lambda x, y=None: F.pad(torch.ones(len(x),1,1), (8,7,8,7))
    m = make(name, mid, **(dict(alpha=1.) if name=='attentivemix' else {}))(x, torch.arange(4))
    want = x if lam else x[m.idx[:,1]]
    if name=='attentivemix' and not lam: assert (m.w[:,0]<=1/49+.05).all()   # at least one cell stays
    else: assert torch.equal(m.x, want) and torch.equal(m.w[:,0], torch.full((4,), lam))

def test_limits_of_those_without_a_beta():
    x = torch.rand(4,3,16,16)
    m = ResizeMix((1,1))(x)
    assert torch.equal(m.x, x[m.idx[:,1]]) and torch.equal(m.w[:,1], torch.ones(4))
    assert torch.allclose(SmoothMix((1e4,1e4))(x).x, x, atol=1e-5)
    for lam in (0.,1.): assert torch.equal(fmix_mask(lam, 9, 7, max_soft=.3), torch.full((9,7), lam))

@pytest.mark.parametrize('name', NAMES)
def test_unknown_options_raise(name):
    with pytest.raises(TypeError): MIXES[name](grid_size=32)

@pytest.mark.parametrize('name', ARG)
@pytest.mark.parametrize('value', [0.,.5])
def test_flat_saliency_and_constant_images_stay_finite(name, value):
    x = torch.full((4,3,16,16), value)
    for look in (flat_map, lambda x, y=None: flat_map(x)+1):
        m = make(name, look)(x, torch.arange(4))
        assert torch.allclose(m.x, x) and m.w.isfinite().all()

@pytest.mark.parametrize('name', NAMES)
def test_mixers_pickle(name):
    x,y = torch.rand(4,3,8,8),torch.arange(4)
    mixer = make(name)
    again = pickle.loads(pickle.dumps(mixer))
    res = []
    for m in (mixer,again):
        torch.manual_seed(0)
        res.append(m(x, y).x)
    assert torch.equal(*res)

# ---------------------------------------------------------------- registry, RandomMix
def test_registry():
    assert list(MIXES)==['mixup','cutmix','resizemix','fmix','gridmix','gridmixup','smoothmix','saliencymix','attentivemix','snapmix',
                         'puzzlemix','manifold','pgd','iat','aom']
    assert all(isinstance(c, type) for c in MIXES.values()) and 'cutmix' in MIXES and MIXES.get('nope') is None and len(MIXES)==15
    assert dict(MIXES)['puzzlemix'].__module__=='advmix.puzzle' and all(MIXES[n].blend==(n=='mixup') for n in NAMES)
    assert [n for n in MIXES if n not in ATTACKS and not getattr(MIXES[n], 'needs_model', False)]==NAMES[:8]
    with pytest.raises(KeyError, match="'nope' unknown: use one of mixup, cutmix"): MIXES['nope']

def test_random_mix():
    x,y,net = torch.rand(4,3,16,16),torch.arange(4),Net()
    m = RandomMix(['cutmix','puzzlemix',('snapmix',2)])
    for _ in range(6): m(x, y, net)
    assert m.needs_model and not m.blend and RandomMix(['mixup', MixUp(.3)]).blend
    assert all(torch.equal(RandomMix(['mixup'], p=0.)(x, y).x, x) for _ in range(3))
    counts = sum(RandomMix([('cutmix',1),('mixup',1)], p=.5)(x).x is x for _ in range(300))
    assert 110<counts<190

def test_random_mix_follows_its_weights():
    coin  = RandomMix([(lambda *a: 'heads', 3), (lambda *a: 'tails', 1)])
    heads = sum(coin(None)=='heads' for _ in range(2000))
    assert abs(heads/2000-.75)<.04

def test_random_mix_passes_terms_on_and_binds_losses():
    x,y = torch.rand(4,3,16,16),torch.arange(4)
    class Two:
        loss = None
        def __call__(self, x, y=None, model=None): return [(.5, Mixed.unmixed(x)), (.5, MixUp()(x))]
    two = Two()
    assert [w for w,_ in as_terms(RandomMix([two])(x, y))]==[.5,.5]
    outer = RandomMix([RandomMix([two,'cutmix']), two, MixUp()])
    bound = outer.with_loss(F.nll_loss)
    assert bound.mixers[0].mixers[0].loss is F.nll_loss and bound.mixers[1].loss is F.nll_loss and bound.mixers[2] is outer.mixers[2]
    assert two.loss is None and outer.mixers[1] is two and bound.weights is outer.weights

def fastai_mixup():
    from fastai.callback.mixup import MixUp as Theirs
    return Theirs

WRONG = dict(
    empty   = (lambda: RandomMix([]),                       ValueError, 'must be a list of mixers'),
    name    = (lambda: RandomMix('cutmix'),                 ValueError, 'must be a list'),
    mixer   = (lambda: RandomMix(MixUp()),                  ValueError, 'must be a list'),
    mapping = (lambda: RandomMix(dict(cutmix=1)),           ValueError, 'must be a list'),
    weight  = (lambda: RandomMix([('cutmix',-1)]),          ValueError, 'weight=-1 must be'),
    zero    = (lambda: RandomMix([('cutmix',0)]),           ValueError, 'weight=0 must be'),
    unknown = (lambda: RandomMix(['cutmx']),                KeyError,   'use one of mixup'),
    triple  = (lambda: RandomMix([('cutmix',1,2)]),         ValueError, 'must be a pair'),
    single  = (lambda: MIXES.make(('cutmix',.5)),           TypeError,  r"write pairs in a list, \[\('cutmix', 0.5\)"),
    p       = (lambda: RandomMix(['mixup'], p=2),           ValueError, 'no probability'),
    p_none  = (lambda: RandomMix(['mixup'], p=None),        ValueError, 'no probability'),
    weights = (lambda: RandomMix(['mixup','cutmix'], [1,2]), ValueError, 'weights go into pairs'),
    a_class = (lambda: MIXES.make(MixUp),                   TypeError,  r'MixUp is a class: give an instance, MixUp\(\)'),
    classes = (lambda: MIXES.make([MixUp,CutMix]),          TypeError,  'MixUp is a class'),
    none    = (lambda: MIXES.make(None),                    TypeError,  'is no mixer'),
    tensor  = (lambda: MIXES.make(torch.rand(2)),           TypeError,  'is no mixer'),
    theirs  = (lambda: MIXES.make(fastai_mixup()()),        TypeError,  r'MixUp is a callback.*advmix.mix.MixUp\(\)'),
    them    = (lambda: MIXES.make([fastai_mixup()]),        TypeError,  'MixUp is a callback'))
@pytest.mark.parametrize('name', WRONG)
def test_what_is_no_mixer_is_refused_at_once(name):
    call,exc,words = WRONG[name]
    with pytest.raises(exc, match=words): call()

def test_make():
    m,f,net = MixUp(),lambda x, y=None, model=None: Mixed.unmixed(x),nn.Linear(1,1)
    assert MIXES.make(m) is m and MIXES.make(f) is f and MIXES.make(net) is net and isinstance(MIXES.make('cutmix'), CutMix)
    r = MIXES.make(('cutmix',(m,3),f))
    assert isinstance(r, RandomMix) and r.weights.tolist()==[1,3,1] and r.mixers[1:]==[m,f]

@pytest.mark.parametrize('bad', [lambda: ResizeMix((.8,.1)), lambda: ResizeMix((0,2)), lambda: FMix(alpha=0), lambda: FMix(decay=-1),
    lambda: FMix(max_soft=2), lambda: GridMix(n=0), lambda: GridMix(local=True), lambda: GridMixup(nx=0), lambda: GridMixup(alpha=(0,2)),
    lambda: SmoothMix((0,1)), lambda: SmoothMix(.3)])
def test_bad_settings(bad):
    with pytest.raises(ValueError): bad()

# ---------------------------------------------------------------- the others' own
def fastai_learner(cb, n=6):
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders, DataLoader
    from fastai.losses import CrossEntropyLossFlat
    x,y = torch.rand(n,3,20,14),torch.arange(n)%4
    dl  = DataLoader(list(zip(x,y)), bs=n)
    learn = Learner(DataLoaders(dl,dl), Net(), loss_func=CrossEntropyLossFlat(), cbs=cb)
    learn.xb,learn.yb,learn.dl,learn.training = (x,),(y,),dl,True
    learn.model.train()
    cb.before_train()
    return learn,x,y

def test_mixup_agrees_with_fastai(monkeypatch):
    from fastai.callback.mixup import MixUp as Theirs
    cb = Theirs(.4)
    learn,x,y = fastai_learner(cb)
    torch.manual_seed(0)
    cb.before_batch()
    theirs,pred = learn.xb[0],torch.randn(6,4)
    loss = cb.lf(pred, y)
    torch.manual_seed(0)
    lam = cb.distrib.sample((6,))
    lam = torch.maximum(lam, 1-lam)
    monkeypatch.setattr('advmix.mix.rand_lam', lambda a,n: lam)
    m = MixUp(.4, per_sample=True)(x, y)   # the permutation comes next from the generator
    assert torch.allclose(m.x, theirs, atol=1e-6)
    assert torch.allclose(m.loss(nn.CrossEntropyLoss(), pred, y), loss, atol=1e-6)

def test_cutmix_agrees_with_fastai(monkeypatch):
    from fastai.callback.mixup import CutMix as Theirs
    cb = Theirs(1.)
    for seed in range(5):
        learn,x,y = fastai_learner(cb)
        clean = x.clone()   # fastai pastes into the batch itself
        torch.manual_seed(seed)
        cb.before_batch()
        torch.manual_seed(seed)
        lam  = cb.distrib.sample((1,))
        perm = torch.randperm(6)
        l,t,r,b = (int(v) for v in cb.rand_bbox(14, 20, lam))
        monkeypatch.setattr('advmix.mix.rand_lam',   lambda a,n: lam.view(1))
        monkeypatch.setattr('advmix.mix.rand_pairs', lambda x: torch.stack([torch.arange(6), perm], 1))
        monkeypatch.setattr('advmix.mix.CutMix.rand_box',   lambda *a: torch.tensor([[t,b,l,r]]))
        m = CutMix()(clean, y)
        assert torch.allclose(m.x, learn.xb[0])
        assert torch.allclose(m.w[:,0], torch.as_tensor(cb.lam).float().view(-1).expand(6), atol=1e-6)

@pytest.mark.parametrize('ours,theirs', [(MixUp,'MixUp'),(CutMix,'CutMix')])
def test_agrees_with_torchvision(ours, theirs, monkeypatch):
    from torchvision.transforms import v2
    x,y = torch.rand(6,3,20,14),torch.arange(6)
    tv  = getattr(v2, theirs)(alpha=1., num_classes=6)
    roll = torch.stack([torch.arange(6), torch.arange(6).roll(1)], 1)
    for seed in range(8):
        torch.manual_seed(seed)
        want,soft = tv(x, y)
        torch.manual_seed(seed)
        lam = float(tv._dist.sample(()))
        if theirs=='CutMix': rx,ry = torch.randint(14, (1,)),torch.randint(20, (1,))
        with monkeypatch.context() as mp:
            mp.setattr('advmix.mix.rand_lam',   lambda a,n: torch.tensor([lam]))
            mp.setattr('advmix.mix.rand_pairs', lambda x: roll)
            if theirs=='CutMix': mp.setattr(torch, 'rand', lambda *s: torch.stack([(ry+.5)/20, (rx+.5)/14], 1))
            m = ours()(x, y)
        assert torch.allclose(m.x, want, atol=1e-6) and torch.allclose(m.soft(y, 6), soft, atol=1e-6)

# ---------------------------------------------------------------- ratios and areas against formulas
def own_weights(mixer, k, size=(32,32)): return torch.stack([mixer(torch.zeros(1,1,*size)).w[0,0] for _ in range(k)]).double().numpy()
def ks(sample, cdf): return stats.kstest(sample, cdf).statistic
TOL = .06   # of the distribution function; 1,000 draws exceed it by chance in 0.2 % of seeds

@pytest.mark.parametrize('alpha', [.2,1.,2.])
def test_beta_ratios(alpha):
    for mixer in (MixUp(alpha), FMix(alpha)):
        ms = [mixer(torch.zeros(1,1,32,32)) for _ in range(1000)]
        w,lam = (torch.stack([getattr(m, k)[0,0] for m in ms]).double().numpy() for k in ('w','lam'))
        assert ks(lam, stats.beta(alpha,alpha).cdf)<TOL and np.abs(w-lam).max()<1/1024   # FMix rounds to a pixel, by a coin

def test_cutmix_area():
    lam,rng = np.random.default_rng(0).beta(1,1,200_000),np.random.default_rng(1)
    half = (32*np.sqrt(1-lam)).astype(int)//2
    c    = rng.integers(0, 32, (2,len(lam)))
    side = np.minimum(c+half, 32)-np.maximum(c-half, 0)
    want = 1-side.prod(0)/1024
    assert abs(own_weights(CutMix(), 3000).mean()-want.mean())<.02 and abs(want.mean()-.70)<.01

def test_resizemix_area():
    w = own_weights(ResizeMix(), 1000, (64,64))
    assert ks(w, lambda v: 1-(np.sqrt(np.clip(1-v,0,1))-.1)/.7)<TOL
    assert w.min()>=1-.8**2-1e-6 and w.max()<=1-(6/64)**2+1e-6
    def corners(m): return (m.x[range(16),range(16)]<.5).float().flatten(1).argmax(1)
    places = torch.cat([corners(ResizeMix((.25,.25))(probe(16,32,32)[0])) for _ in range(20)])
    assert places.unique().numel()>100   # one place per image

def test_fmix_spectrum_against_numpy():
    for h,w,released in ((32,32,False),(20,33,False),(32,20,False),(32,32,True),(32,20,True),(20,32,True)):
        torch.manual_seed(2)
        got = low_freq(h, w, 3., released).numpy()
        torch.manual_seed(2)
        noise = torch.randn(h, w//2+1, 2).double().numpy()
        fx = np.fft.fftfreq(w)[:w//2+2] if w%2 else np.fft.fftfreq(w)[:w//2+1]
        fx = fx[:w//2+1]
        f  = np.maximum(np.sqrt(fx**2+np.fft.fftfreq(h)[:,None]**2), 1/max(h,w))**3
        z  = noise/f[...,None]
        z  = z[0]+1j*z[1] if released else z[...,0]+1j*z[...,1]
        want = np.fft.irfftn(z, (h,w), axes=(0,1))
        assert np.abs(got-want).max()<1e-4*np.abs(want).max()

def test_gridmix_cells():
    own = np.round(own_weights(GridMix(), 1700)*16).astype(int)   # uniform ratio, binomial count: every count is equally likely
    assert np.abs(np.bincount(own, minlength=17)/1700-1/17).max()<.025
    m = GridMix(n=5)(torch.rand(1,1,33,21)).mask[0,0]
    assert all((m[(torch.arange(33)*5//33)==i][:,(torch.arange(21)*5//21)==j]).unique().numel()==1 for i in range(5) for j in range(5))

def test_gridmixup_holes():
    for lam in np.linspace(.1,.9,9):
        for nx in (2,4,8):
            hole = min(max(1, int(64//nx*(1-lam)**.5)), 64//nx-1)
            assert abs(sieve_mask(lam, 64, 64, nx).mean().item()-(1-(hole*nx/64)**2))<1e-6
    w = own_weights(GridMixup(nx=1), 1000, (128,128))
    assert ks(w, stats.uniform(.1,.8).cdf)<TOL
    for size,shares in ((32,.2),(64,.2),(224,.2),(8,.15)):   # by default ratios vary at every size
        w = own_weights(GridMixup(), 300, (size,size))
        assert w.std()>shares, size
    for aspect in (.01,.2,5,100):   # tall and wide rectangles stay inside and are never empty
        for _ in range(20): assert 0<1-sieve_mask(.5, 16, 24, 3, .5, aspect).mean()<1

def test_smoothmix_mean_is_the_gaussian_integral():
    for _ in range(50):
        torch.manual_seed(_)
        m = SmoothMix()(torch.zeros(1,1,64,48)).mask[0,0]
        torch.manual_seed(_)
        sigma = torch.empty(()).uniform_(.25,.5).item()*48
        c     = (torch.rand(2)*torch.tensor([64,48])).floor().numpy()
        side  = [sigma*math.sqrt(math.pi/2)*(erf((s-.5-k)/sigma/2**.5)-erf((-.5-k)/sigma/2**.5))/s for s,k in zip((64,48),c)]
        assert abs(m.mean().item()-np.prod(side))<1e-3
    w = own_weights(SmoothMix(), 1000)
    assert abs(w.mean()-.43)<.02 and w.min()>.1 and w.max()<.74

def test_enlarge_and_from_mask():
    assert torch.equal(enlarge(torch.tensor([[1.,0.]]), 2, 4), torch.tensor([[1.,1,0,0]]*2))
    x = torch.rand(3,2,4,4)
    m = Mixed.from_mask(x, torch.rand(3,4,4), torch.tensor([.5]), torch.tensor([[0,1],[1,2],[2,0]]))
    assert isinstance(m, Mixed) and torch.equal(m.lam, torch.full((3,2), .5))
    for bad in (torch.rand(3,4,5), torch.rand(3,5,4), torch.rand(4,4), torch.rand(3,1,4,4)):
        with pytest.raises(ValueError, match='at most one value per pixel'): Mixed.from_mask(x, bad)
    cells = Mixed.from_mask(x, torch.rand(3,3,2), idx=m.idx)   # cells of a grid become blocks
    assert all(cells.mask[:,0,[i*4//3 for i in range(3)]].unique().numel()<=18 for _ in range(1)) and cells.mask.shape==(3,2,4,4)
