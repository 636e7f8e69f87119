"A zoo of false defences, each flagged and brought down to the bare network; honest networks, none flagged"
import itertools
import pytest, torch, torch.nn.functional as F
from torch import nn
from advmix.aom import AOM
from advmix.attack import Threat, pgd
from advmix.autoattack import autoattack
from advmix.evaluate import attacked, clean
from advmix.mix import MixUp
from advmix.sanity import Sanity, _excess, _same, _trace, _weaker, sanity
from advmix.verdict import Verdict
from zoo_of_defences import DEFENCES, Around, Rounding

EPS = .15

@pytest.fixture(scope='module')
def data():
    from sklearn.datasets import load_digits
    d = load_digits()
    return torch.tensor(d.images/16).float()[:,None],torch.tensor(d.target)

def conv(n=10, norm=False):
    ns = [nn.BatchNorm2d(16)]*norm
    return nn.Sequential(nn.Conv2d(1,16,3,padding=1), *ns, nn.ReLU(), nn.Conv2d(16,32,3,stride=2,padding=1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(512,n))

def train(m, x, y, epochs, mixer=None, lr=4e-3):
    opt = torch.optim.Adam(m.train().parameters(), lr)
    for b in itertools.chain(*[torch.randperm(len(x)).split(64) for _ in range(epochs)]):
        opt.zero_grad()
        if mixer is None: F.cross_entropy(m(x[b]), y[b]).backward()
        else:
            mixed = mixer(x[b], y[b], m)
            mixed.loss(F.cross_entropy, m(mixed.x), y[b]).backward()
        opt.step()
    return m.eval()

@pytest.fixture(scope='module')
def plain(data):
    torch.manual_seed(0)
    return train(conv(), data[0][:1300], data[1][:1300], 10)

@pytest.fixture(scope='module')
def some(data): return data[0][1300:1360],data[1][1300:1360]

@pytest.fixture(scope='module')
def bare(plain, some): return sanity(plain, *some, EPS, verdict=autoattack(plain, *some, EPS, attacks=('apgd-ce','apgd-t'), progress=False))

# --- false defences ---

SYMPTOMS = dict(scale='saturated', saturated='gradients', rounding='gradients', detach='gradients', numpy='gradients', pil='gradients',
                jpeg='gradients', dead_zone='gradients', thermometer='gradients', random_backward='directions', flipped='directions',
                no_backward='gradients', high_frequency='directions', noise='deterministic', dropout='deterministic',
                seeded_noise='continuous', batch_statistics='batch')

# These change the answers too, for the worse, and end up lower: noise that an attacker may choose by choosing the image,
# and statistics that an attacker who owns the batch may choose.
LOWER = {'seeded_noise','batch_statistics'}

def test_the_zoo_is_complete(): assert set(SYMPTOMS)==set(DEFENCES) and len(DEFENCES)>=12

@pytest.mark.parametrize('name', DEFENCES)
def test_a_false_defence_gets_the_number_it_deserves(name, plain, some, bare):
    torch.manual_seed(0)
    m = DEFENCES[name](plain).eval()
    s = sanity(m, *some, EPS, queries=60 if name=='jpeg' else 300)
    assert not s.ok and SYMPTOMS[name] in s.suspicious, s
    assert s.worst.accuracy<=bare.worst.accuracy+.05, s
    if name not in LOWER: assert s.worst.accuracy>=bare.worst.accuracy-.05, s
    assert [b=='' for b in s.worst.by]==s.worst.stands.tolist() and s.worst.name=='worst case'
    fell = {b for b in s.worst.by if b}
    if SYMPTOMS[name] in ('gradients','directions'): assert fell & {'square','shortcut','smoothed','differences','surrogate'}
    d = (s.worst.adv-some[0]).flatten(1).abs().amax(1)
    assert d.max()<=EPS+1e-6 and s.worst.adv.min()>=0 and s.worst.adv.max()<=1 and (d[s.worst.stands]==0).all()
    if name in ('noise','dropout'):   # not by luck: the examples fool most draws, and what stands is not fooled by most
        rate = torch.stack([m(s.worst.adv).argmax(1)!=some[1] for _ in range(100)]).float().mean(0)
        assert (rate[~s.worst.stands]>.5).float().mean()>.9 and (rate[s.worst.stands]<.5).all()
    if not {'deterministic','batch'} & set(s.suspicious): assert torch.equal(m(s.worst.adv).argmax(1)==some[1], s.worst.stands)

@pytest.mark.parametrize('name', ['rounding','detach','random_backward','scale'])
def test_what_pgd_alone_would_have_said(name, plain, some, bare):
    torch.manual_seed(0)
    assert attacked(DEFENCES[name](plain), *some, Threat(EPS, steps=20)).accuracy>bare.worst.accuracy+.5

def test_a_stand_in_for_the_layer(plain, some, bare):
    class Steps(nn.Module):
        def forward(self, x): return (x*20).round()/20
    class Squeezed(Around):
        def __init__(self, net): super().__init__(net); self.steps = Steps()
        def before(self, x): return self.steps(x)
    seen = []
    def soft(u):
        seen.append(len(u))
        return u
    s = sanity(Squeezed(plain), *some, EPS, stand_in=dict(steps=soft), queries=20)
    assert seen and 'stand-in steps' in s.worst.by and s.worst.accuracy<=bare.worst.accuracy+.05
    with pytest.raises(ValueError, match='no layer'): sanity(plain, *some, EPS, stand_in=dict(nothing=soft), queries=5)

def test_a_network_that_can_not_be_asked_about_one_image(plain, some):
    "Batch norm without running statistics refuses a batch of one, and attacks come down to one"
    m = nn.Sequential(*plain, nn.BatchNorm1d(10, affine=False, track_running_stats=False)).eval()
    s = sanity(m, *some, EPS, queries=20)
    assert 'batch' in s.suspicious and s.worst.accuracy<.3

def test_l2_too(plain, some):
    b = sanity(plain, *some, 1., 'l2', queries=100)
    s = sanity(Rounding(plain), *some, 1., 'l2', queries=100)
    assert b.ok and not s.ok and s.worst.accuracy<=b.worst.accuracy+.05
    assert (s.worst.adv-some[0]).flatten(1).norm(dim=1).max()<=1.+1e-5

def test_without_modules_inside_the_other_attacks_remain(plain, some, bare):
    "No hook finds an end: the network is a function, and what it calls is hidden"
    class Function(nn.Module):
        def __init__(self, f): super().__init__(); self.f = [f]
        def forward(self, x):
            with torch.no_grad(): return self.f[0]((x*20).round()/20)
    s = sanity(Function(plain), *some, EPS, queries=1000)
    assert not s.ok and s.worst.accuracy<=bare.worst.accuracy+.1, s   # answers only: ten points, not five
    assert not any('shortcut' in b for b in s.worst.by)

# --- honest networks ---

def honest(kind, x, y):
    torch.manual_seed(0)
    if kind=='pgd':   return train(conv(), x, y, 8, lambda x,y,m: _as_mixed(pgd(m, x, y, Threat(EPS, step=.05, steps=5)), y))
    if kind=='aom':   return train(conv(), x, y, 10, AOM(eps=EPS, steps=3))
    if kind=='mixup': return train(conv(), x, y, 12, MixUp())
    if kind=='batchnorm': return train(conv(norm=True), x, y, 8)
    if kind=='smooth':
        return train(nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.Tanh(), nn.Linear(64,64), nn.GELU(), nn.Linear(64,10)), x, y, 10)
    if kind=='overconfident': return train(conv(), x, y, 40, lr=1e-2)
    return train(nn.Sequential(nn.Flatten(), nn.Linear(64,10)), x, y, 10)   # small

class _as_mixed:
    "The attacked batch, with the interface of a mixture"
    def __init__(self, x, y): self.x,self.y = x,y
    def loss(self, f, pred, y): return f(pred, y)

@pytest.mark.parametrize('kind,n', [('pgd',60), ('aom',60), ('mixup',60), ('batchnorm',60), ('smooth',60), ('overconfident',60),
                                    ('small',17)])
def test_an_honest_network_is_not_accused(kind, n, data):
    x,y = data
    m = honest(kind, x[:1300], y[:1300])
    s = sanity(m, x[1300:1300+n], y[1300:1300+n], EPS if kind!='small' else .08, queries=300)
    assert s.ok and not any('suspicious' in r['verdict'] for r in s.rows), s
    assert not any('masked' in r['says'] for r in s.rows)
    assert clean(m, x[1300:1300+n], y[1300:1300+n]).accuracy>.8

def test_an_honest_network_of_two_classes(data):
    x,y = data
    k = (y<2).nonzero()[:,0]
    x,y = x[k],y[k]
    torch.manual_seed(0)
    m = train(conv(2), x[:200], y[:200], 8)
    a,b = x[200:240],y[200:240]
    s = sanity(m, a, b, .2, queries=300, verdict=autoattack(m, a, b, .2, attacks=('apgd-ce',), progress=False))
    assert s.ok, s

def test_the_bare_network_is_weak_and_honest(bare, plain, some):
    assert bare.ok and bare.worst.accuracy<.3, bare
    assert all(r['verdict']=='pass' for r in bare.rows if r['name']!='transfer')
    s = sanity(plain, *some, EPS, surrogate=train(conv(), *some, 20), queries=50)
    assert s.ok and [r['verdict'] for r in s.rows if r['name']=='transfer']==['pass']

# --- how much is suspicious ---

@pytest.mark.parametrize('k,n,share,no', [(3,92,.05,True), (10,92,.05,True), (11,92,.05,False), (2,7,.05,True), (3,7,.05,False),
                                          (1,1,.05,True), (0,0,.05,True), (60,1000,.05,True), (80,1000,.05,False), (92,92,1,True)])
def test_chance(k, n, share, no): assert _excess(k, n, share)==(not no)

def test_weaker_is_one_sided():
    a,b = torch.arange(100)<40,torch.arange(100)<50
    assert _weaker(b, a) and not _weaker(a, b) and not _weaker(a, a)
    assert not _weaker(torch.arange(100)<43, a)   # three images are chance

def test_autoattack_must_not_be_weaker_than_pgd(plain, some, bare):
    "The direction matters: a verdict that leaves more than PGD is suspicious, one that leaves less is what AutoAttack is for"
    row = lambda v: [r['verdict'] for r in sanity(plain, *some, EPS, verdict=v, queries=5).rows if r['name']=='PGD ≥ AutoAttack']
    c = clean(plain, *some)
    assert row(Verdict('autoattack', c.stands))==['suspicious']
    assert row(Verdict('autoattack', torch.zeros_like(c.stands)))==['pass']
    assert row(None)==['skipped']

def test_a_given_verdict_counts_in_the_worst_case(plain, some):
    v = Verdict('autoattack', torch.zeros(60, dtype=torch.bool), adv=some[0].clone(), by=['apgd-t']*60)
    s = sanity(plain, *some, EPS, verdict=v, queries=5)
    assert s.worst.accuracy==0 and 'apgd-t' in s.worst.by and s.ok

def test_it_wants_the_same_images(plain, some):
    with pytest.raises(ValueError, match='run both on the same'):
        sanity(plain, *some, .1, verdict=clean(plain, some[0][:9], some[1][:9]), queries=5)

# --- what it leaves behind, what it says ---

@pytest.mark.parametrize('name', ['rounding','noise','batch_statistics','numpy'])
def test_leaves_no_trace_of_the_pursuit(name, plain, some):
    m = DEFENCES[name](plain).train()
    before,rng = _trace(m),torch.get_rng_state()
    s = sanity(m, some[0][:12], some[1][:12], EPS, queries=10)
    assert _same(before, _trace(m)) and torch.equal(rng, torch.get_rng_state()) and s.rows[-1]['verdict']=='pass'
    assert not any(k._forward_hooks or k._forward_pre_hooks for k in m.modules())

def test_a_network_that_changes_itself_is_seen(plain, some):
    class Learns(Around):
        def __init__(self, net): super().__init__(net); self.seen = nn.Parameter(torch.zeros(()), requires_grad=False)
        def before(self, x):
            with torch.no_grad(): self.seen += 1
            return x
    assert 'no trace' in sanity(Learns(plain), *some, EPS, queries=5).suspicious

def test_rows_and_repr(bare):
    assert isinstance(bare, Sanity) and [set(r) for r in bare.rows]==[{'name','verdict','says'}]*len(bare.rows) and len(bare.rows)==16
    assert 'worst case' in repr(bare) and bare.worst.row()['by'].keys()>={'clean'} and bare.worst.row()['eps']==EPS
    assert bare.worst.forwards>0 and bare.worst.seconds>0
