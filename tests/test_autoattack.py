"AutoAttack: its own verdicts image by image, few classes, no gradients, kills and parts"
import copy, itertools, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import nn
from advmix.aom import AOM
from advmix.attack import Threat, pgd
from advmix.autoattack import _Job, _State, _asked, _name, _narrowed, _square_helped, autoattack
from advmix.evaluate import _distance
from advmix.verdict import Verdict
from zoo_of_defences import Detached, Rounding, ThroughJPEG, ThroughNumpy

root  = Path(__file__).resolve().parents[1]
quiet = dict(progress=False)

def mlp(n=10): return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, n))

@pytest.fixture(scope='module')
def data():
    from sklearn.datasets import load_digits
    d = load_digits()
    return torch.tensor(d.images/16).float()[:,None],torch.tensor(d.target)

def train(data, epochs, how='plain'):
    torch.manual_seed(0)
    (x,y),m = data,mlp()
    opt,aom = torch.optim.Adam(m.parameters(), 4e-3),AOM(eps=.1, steps=3)
    for b in itertools.chain(*[torch.randperm(1300).split(64) for _ in range(epochs)]):
        a,t = x[b],y[b]
        opt.zero_grad()
        if how=='aom':
            mixed = aom(a, t, m)
            mixed.loss(F.cross_entropy, m(mixed.x), t).backward()
        else: F.cross_entropy(m(pgd(m, a, t, Threat(eps=.1, step=.03, steps=5)) if how=='pgd' else a), t).backward()
        opt.step()
    return m.eval()

@pytest.fixture(scope='module')
def nets(data): return {k: train(data, n, k) for k,n in dict(plain=8, pgd=12, aom=8).items()}

@pytest.fixture(scope='module')
def plain(nets): return nets['plain']

@pytest.fixture
def test(data): return data[0][1300:1360],data[1][1300:1360]

# --- the package's own verdict, image by image ---

init = AutoAttack.__init__
def fewer_queries(self, *args, **kw):
    init(self, *args, **kw)
    self.square.n_queries = 500

def official(m, x, y, bs, eps, norm='Linf', seed=0, version='standard', attacks=None):
    aa = AutoAttack(m, eps=eps, norm=norm, seed=seed, version=version)
    if attacks: aa.attacks_to_run = list(attacks)
    return aa.run_standard_evaluation(x, y, batch_size=bs)[0]

@pytest.mark.parametrize('name', ['plain','pgd','aom'])
@pytest.mark.parametrize('norm,eps', [('linf',.1), ('l2',.6)])
def test_verdict_equals_the_packages_own(name, norm, eps, nets, test, monkeypatch):
    "Square's 5,000 queries take most of the time: for two of the networks both sides make 500"
    if name!='plain': monkeypatch.setattr(AutoAttack, '__init__', fewer_queries)
    m,x,y = nets[name],test[0][:8],test[1][:8]
    v,z = autoattack(m, x, y, eps, norm, **quiet),official(m, x, y, 250, eps, dict(linf='Linf', l2='L2')[norm])
    assert torch.equal(v.stands, m(z).argmax(1)==y) and torch.equal(v.adv, z)
    assert 0<v.accuracy<1 and v.name=='autoattack' and [s['name'] for s in v.stages]==['apgd-ce','apgd-t','fab-t','square']
    acc = [s['accuracy'] for s in v.stages]
    assert acc==sorted(acc, reverse=True) and acc[-1]==v.accuracy and _distance(x, v.adv, norm).max()<=eps*(1+1e-5)+1e-6
    assert sum(s['forwards'] for s in v.stages)==v.forwards and [b=='' for b in v.by]==v.stands.tolist()
    most = autoattack.passes(10)
    for s in v.stages: assert s['forwards']<=8*most[s['name']][0] and s['backwards']<=8*most[s['name']][1]

def shifted(test, n=24):
    "Two wrong labels: the images to attack don't fill the batches, so their grouping depends on the order"
    x,y = test[0][:n],test[1][:n].clone()
    y[[3,10]] = (y[[3,10]]+1)%10
    return x,y

def test_in_the_packages_order_also_over_several_batches(plain, test):
    x,y = shifted(test)
    only = ('apgd-ce','apgd-t')
    v = autoattack(plain, x, y, .6, 'l2', bs=8, attacks=only, order='attack', **quiet)
    z = official(plain, x, y, 8, .6, 'L2', attacks=only)
    assert torch.equal(v.stands, plain(z).argmax(1)==y) and torch.equal(v.adv, z)

STORED = {('linf',.05): '1011111100111111111111111110111111111001', ('l2',.4): '1011101100101111111111111110111111111001'}

def test_stored_verdicts(data):
    "Of version 0.0.1, on a network that needs no training, the nearest class mean; no image is within .008 (linf) of its verdict changing"
    x,y = data
    mean = torch.stack([x[:1300][y[:1300]==k].mean(0) for k in range(10)]).flatten(1)
    m = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        m[1].weight.copy_(2*mean)
        m[1].bias.copy_(-mean.square().sum(1))
    kw = dict(attacks=('apgd-ce','apgd-t'), **quiet)
    got = {(n,e): ''.join('01'[int(s)] for s in autoattack(m, x[1300:1340], y[1300:1340], e, n, **kw).stands) for n,e in STORED}
    assert got==STORED

@pytest.mark.parametrize('norm,eps', [('l2',.5), ('l1',2.)])
def test_other_norms(norm, eps, plain, test):
    x,y = test
    only = ('apgd-ce','apgd-t')
    v = autoattack(plain, x, y, eps, norm, attacks=only, bs=60, seed=3, **quiet)
    z = official(plain, x, y, 60, eps, norm.upper(), seed=3, attacks=only)
    assert torch.equal(v.stands, plain(z).argmax(1)==y)
    assert 'only' in v.name and _distance(x, v.adv, norm).max()<=eps+1e-4

def test_plus_and_individual(plain, test):
    x,y = test[0][:10],test[1][:10]
    only = ('apgd-dlr','fab')
    v = autoattack(plain, x, y, .06, version='plus', attacks=only, **quiet)
    assert torch.equal(v.stands, plain(official(plain, x, y, 250, .06, version='plus', attacks=only)).argmax(1)==y)
    only = ('apgd-ce','apgd-t')
    v = autoattack(plain, x, y, .1, version='individual', attacks=only, **quiet)
    aa = AutoAttack(plain, eps=.1, norm='Linf', seed=0)
    aa.attacks_to_run = list(only)
    each = {k: plain(z).argmax(1)==y for k,(z,_) in aa.run_standard_evaluation_individual(x, y).items()}
    assert [s['accuracy'] for s in v.stages]==[each[k].double().mean().item() for k in only]
    assert torch.equal(v.stands, each['apgd-ce']&each['apgd-t'])

@pytest.mark.parametrize('version', ['standard','individual'])
def test_each_attack_by_itself_or_what_is_left_after_it(version):
    job = _Job(.1, 'linf', version, ['apgd-ce','apgd-t','square'], 250, 0, 'batch')
    clean,fooled = torch.arange(10)<8,torch.zeros(3, 10, dtype=torch.bool)
    fooled[0,:2] = fooled[1,1:5] = fooled[2,5] = True   # two of eight, four of which one is new, one
    s = _State('', clean, fooled, torch.zeros(1), torch.tensor([[1.,20,10],[2.,30,15],[.5,4,0]]))
    assert [round(10*r['accuracy']) for r in s.stages(job)]==dict(standard=[6,3,2], individual=[6,4,7])[version]
    assert [(r['name'],r['seconds'],r['forwards'],r['backwards']) for r in s.stages(job)]==[
        ('apgd-ce',1,20,10), ('apgd-t',2,30,15), ('square',.5,4,0)]
    assert s.left(2, job).tolist()==(clean if version=='individual' else clean&~fooled[:2].any(0)).tolist()
    assert s.by(job)==['apgd-ce']*2+['apgd-t']*3+['square']+['']*2+['clean']*2

def test_a_network_without_a_chance_ends_at_once(plain, test):
    v = autoattack(plain, *test, .5, **quiet)
    assert v.accuracy==0 and v.stages[1]['forwards']==0 and set(v.by)<={'clean','apgd-ce'}

# --- the cost is known beforehand ---

@pytest.mark.parametrize('version,norm,n', [('standard','l1',10), ('plus','linf',10), ('standard','linf',4)])
def test_passes_are_what_an_image_needs_that_never_falls(version, norm, n, data):
    "On a network that never falls: all its logits are constant, the right one highest"
    class Rock(nn.Module):
        def forward(self, x): return torch.arange(n).flip(0).float()+0*x.flatten(1).sum(1, keepdim=True)
    x,y = data[0][:2],torch.zeros(2, dtype=torch.long)
    attacks = {'standard':('apgd-ce','apgd-t','fab-t')+('square',)*(n<5), 'plus':('apgd-ce','apgd-dlr','fab')}[version]
    v = autoattack(Rock(), x, y, 1. if norm=='l1' else .1, norm, version, attacks, **quiet)
    most = autoattack.passes(n, version, attacks, norm)
    assert v.accuracy==1 and list(most)==[s['name'] for s in v.stages]
    for s in v.stages:
        f,b = most[s['name']]
        assert s['backwards']==2*b and (s['forwards']==2*f or s['name']=='square' and 1.8*f<=s['forwards']<=2*f), (s,f,b)

def test_passes_grow_with_the_classes_up_to_nine_targets():
    a,b,c = (autoattack.passes(n) for n in (9,10,30))
    assert b==c and all(a[k][1]<b[k][1] for k in ('apgd-t','fab-t')) and a['apgd-ce']==b['apgd-ce']

def test_progress_runs_from_0_to_1(plain, test):
    "Whatever is shown under it: shares that never fall and end at 1 only when all is done"
    shown,x,y = [],test[0][:6],test[1][:6]
    autoattack(plain, x, y, .05, attacks=('apgd-ce',), bs=2, progress=shown.append)
    assert shown[0]==0 and shown==sorted(shown) and shown[-1]==1 and max(shown[:-1])<1
    assert len({int(10*v) for v in shown})>5   # in many small steps

# --- few classes, no gradients ---

def test_two_and_three_classes_narrow_it(data):
    x,y = data
    for n,without in ((4,set()), (3,{'apgd-t'}), (2,{'apgd-t'})):
        k = (y<n).nonzero()[:12,0]
        torch.manual_seed(0)
        m,i = mlp(n),(y[:1000]<n).nonzero()[:,0]
        opt = torch.optim.Adam(m.parameters(), 1e-2)
        for _ in range(30): F.cross_entropy(m(x[i]), y[i]).backward(), opt.step(), opt.zero_grad()
        m.eval()
        v = autoattack(m, x[k], y[k], .2, **quiet)
        run = [a for a in ('apgd-ce','apgd-t','fab-t','square') if a not in without]
        assert [s['name'] for s in v.stages]==run and v.accuracy<1
        assert v.name==('autoattack' if n>3 else 'autoattack (apgd-ce, fab-t, square only)')
        assert bool(without)==any(f'{n} classes: apgd-t left out' in f for f in v.flags) and len(v.flags)==bool(without)
        assert v.settings['attacks']==run

def test_what_can_not_be_run_is_refused(data):
    x,y = data[0][:4],torch.zeros(4, dtype=torch.long)
    m = mlp(3).eval()
    with pytest.raises(ValueError, match='add square'): autoattack(m, x, m(x).argmax(1), .05, attacks=('apgd-t',), **quiet)
    class One(nn.Module):
        def forward(self, x): return x.flatten(1)[:,:1]
    with pytest.raises(ValueError, match='one class'): autoattack(One(), x, y, .05, **quiet)
    assert _narrowed(_asked('plus', None, 'linf', 'batch'), 3, '')[0]==['apgd-ce','apgd-dlr','fab','square','fab-t']

def test_names():
    assert _name('standard', ['square'])=='autoattack (square only)'
    assert _name('plus', _asked('plus', None, 'l2', 'batch'))=='autoattack-plus'

@pytest.mark.parametrize('defence', [Detached, ThroughNumpy, ThroughJPEG])
def test_without_gradients_square_still_runs(defence, plain, test):
    x,y = test[0][:3],test[1][:3]
    v = autoattack(defence(plain), x, y, .15, **quiet)
    assert v.name=='autoattack (square only)' and [s['name'] for s in v.stages]==['square'] and v.backwards==0
    assert any('no gradient reaches the pixels' in f and 'only square' in f for f in v.flags) and v.accuracy<.5
    with pytest.raises(ValueError, match='no gradient'): autoattack(defence(plain), x, y, .15, attacks=('apgd-ce',), **quiet)

# --- flags ---

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
    v = autoattack(Noisy(plain), *test, bs=20, **kw)
    assert sum('randomized' in f for f in v.flags)==1
    assert capsys.readouterr()==('','') and not caplog.records

def test_square_helping_is_flagged(plain, test):
    v = autoattack(Rounding(plain), test[0][:20], test[1][:20], .15, attacks=('apgd-ce','square'), **quiet)
    assert any('Square' in f and 'sees no gradients' in f for f in v.flags)

@pytest.mark.parametrize('n,m,flag', [(1,50,False), (3,92,False), (5,92,True), (2,5,True), (50,5000,False), (80,5000,True), (0,0,False)])
def test_square_accuses_no_one_on_few_images(n, m, flag):
    job = _Job(.1, 'linf', 'standard', ['apgd-ce','square'], 250, 0, 'batch')
    clean = torch.arange(m+10)<m+5
    before = (torch.arange(m+10)>=m)&clean   # five fell to the first attack, and would fall to Square too
    fooled = torch.stack([before, (torch.arange(m+10)<n)|before])
    s = _State('', clean, fooled, torch.zeros(1), torch.zeros(2,3))
    assert bool(_square_helped(s, job))==flag

def test_square_is_compared_with_all_attacks_before_it():
    job = _Job(.1, 'linf', 'plus', ['apgd-ce','apgd-t','square'], 250, 0, 'batch')
    i = torch.arange(20)
    clean,first,second = i<18,i<5,(i>=5)&(i<16)   # two stand when Square's turn comes
    for square,says in ((i<16, []), ((i>=16)&(i<18), ['fooled 2 of 2'])):
        said = _square_helped(_State('', clean, torch.stack([first, second, square]), torch.zeros(1), torch.zeros(3,3)), job)
        assert len(said)==len(says) and all(w in t for w,t in zip(says, said))

def test_the_result_says_that_the_mode_was_switched(plain, test):
    m = copy.deepcopy(plain).train()
    v = autoattack(m, *test, .06, attacks=('apgd-ce',), **quiet)
    assert m.training and any('training mode' in f for f in v.flags)
    assert torch.equal(v.stands, autoattack(plain, *test, .06, attacks=('apgd-ce',), **quiet).stands)

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

def test_unknown_names(plain, test):
    for kw,word in [(dict(norm='l7'),'linf, l2, l1'), (dict(version='rand'),'standard'), (dict(attacks=('pgd',)),'choose from apgd-ce'),
                    (dict(eps=8),'8/255'), (dict(order='image'),'batch, attack')]:
        with pytest.raises(ValueError, match=word): autoattack(plain, *test, **(quiet|kw))

# --- interrupted, killed, divided ---

@pytest.mark.parametrize('where', ['ends', 'interrupted'])
def test_leaves_no_trace(where, data):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256,10)).train()
    m[1].eval()
    m[0].weight.requires_grad_(False)
    m[4].weight.grad = torch.ones_like(m[4].weight)
    x = data[0][:8]
    y = m(x).argmax(1)
    tracer,calls = lambda *a: None,[]
    def count(*a):
        calls.append(1)
        if where=='interrupted' and len(calls)==40: raise KeyboardInterrupt
    flags = lambda: [k.training for k in m.modules()]+[p.requires_grad for p in m.parameters()]
    look  = lambda: ([t.clone() for t in m.state_dict().values()], flags())
    before,rng,h = look(),torch.get_rng_state(),m.register_forward_hook(count)
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
    after = look()
    assert seen is tracer and torch.equal(rng, torch.get_rng_state()) and after[1:]==before[1:]
    assert all(torch.equal(p, q) for p,q in zip(before[0], after[0])) and m[0].weight.grad is None and m[4].weight.grad.sum()==2560

def test_resumes_after_an_interrupt(plain, test, tmp_path, monkeypatch):
    forced,fsync = [],os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: (forced.append(fd), fsync(fd)))
    test = test[0][:30],test[1][:30]
    kw = dict(eps=.06, attacks=('apgd-ce','apgd-t'), bs=10, **quiet)
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
    again = autoattack(plain, *test, state=str(f), **kw)
    assert torch.equal(again.stands, once.stands) and torch.equal(again.adv, once.adv) and again.backwards==once.backwards
    assert [s['accuracy'] for s in again.stages]==[s['accuracy'] for s in once.stages] and again.by==once.by
    for other in (dict(kw, eps=.05), dict(kw, seed=1), dict(kw, bs=5), dict(kw, order='attack')):
        with pytest.raises(ValueError, match='another run'): autoattack(plain, *test, state=f, **other)
    with pytest.raises(ValueError, match='another run'): autoattack(mlp(), *test, state=f, **kw)
    for x,y in ((test[0].flip(0), test[1]), (test[0], test[1].flip(0))):
        with pytest.raises(ValueError, match='another run'): autoattack(plain, x, y, state=f, **kw)
    assert [p.name for p in f.parent.iterdir()]==['aa.pt'] and forced
    for junk in (b'nonsense', b''):
        f.write_bytes(junk)
        with pytest.raises(ValueError, match='not a state file'): autoattack(plain, *test, state=f, **kw)
    torch.save(dict(weights=1), f)
    with pytest.raises(ValueError, match='not a state file'): autoattack(plain, *test, state=f, **kw)

CHILD = """
import sys, time, torch
from pathlib import Path
from torch import nn
from advmix.autoattack import autoattack
torch.set_num_threads(1)
m = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
weights,x,y = torch.load(sys.argv[1])
m.load_state_dict(weights)
state,calls = Path(sys.argv[2]),[]
def wait(*a):
    if state.exists(): calls.append(1)
    if len(calls)==50:
        Path(sys.argv[2]+'.now').touch()
        time.sleep(600)
m.register_forward_hook(wait)
autoattack(m, x, y, .1, state=state, progress=False)
"""

def test_killed_after_the_first_stage_it_repeats_nothing(plain, test, tmp_path):
    x,y = test[0][:8],test[1][:8]
    torch.save((plain.state_dict(), x, y), tmp_path/'in.pt')
    state = tmp_path/'aa.pt'
    child = subprocess.Popen([sys.executable, '-c', CHILD, tmp_path/'in.pt', state], cwd=root, env=os.environ|dict(PYTHONPATH=str(root)))
    while child.poll() is None and not state.with_name('aa.pt.now').exists(): time.sleep(.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait()==-signal.SIGKILL
    saved = _State(**torch.load(state, weights_only=True))
    assert saved.cost[0,1]>100 and saved.cost[1:].sum()==0   # the first attack is done, the second was under way
    once,passes = autoattack(plain, x, y, .1, **quiet),[]
    h = plain.register_forward_hook(lambda m,a,out: passes.append(len(out)))
    again = autoattack(plain, x, y, .1, state=state, **quiet)
    h.remove()
    assert torch.equal(again.stands, once.stands) and torch.equal(again.adv, once.adv) and again.by==once.by
    assert again.forwards==once.forwards and [s['forwards'] for s in again.stages]==[s['forwards'] for s in once.stages]
    assert sum(passes)==once.forwards-saved.cost[0,1]+2*len(x)   # clean verdict and a look for gradients; the first attack isn't repeated
    passes.clear()
    h = plain.register_forward_hook(lambda m,a,out: passes.append(len(out)))
    autoattack(plain, x, y, .1, state=state, **quiet)
    h.remove()
    assert sum(passes)==2*len(x)   # finished: nothing is left to do

def test_parts_of_whole_batches_merge_to_the_whole(plain, test):
    kw = dict(eps=.6, norm='l2', attacks=('apgd-ce','apgd-t'), bs=8, **quiet)   # under linf all draws may end in the same corner
    x,y = shifted(test, 20)
    whole = autoattack(plain, x, y, **kw)
    assert not torch.equal(whole.adv, autoattack(plain, x, y, order='attack', **kw).adv)   # so the test can tell
    for k in (2,3):
        v = Verdict.merge([autoattack(plain, x[s], y[s], **kw) for s in Verdict.parts(20, k, bs=8)])
        assert torch.equal(v.stands, whole.stands) and torch.equal(v.adv, whole.adv) and v.by==whole.by and v.settings==whole.settings
        key = lambda v: [(s['name'],s['accuracy'],s['forwards'],s['backwards']) for s in v.stages]
        assert key(v)==key(whole) and v.name==whole.name and v.forwards==whole.forwards

def test_a_batch_does_not_know_of_the_others(plain, test):
    kw = dict(eps=.08, attacks=('apgd-ce',), bs=15, **quiet)
    x,y = test
    v,w = autoattack(plain, x, y, **kw),autoattack(plain, x.roll(15, 0), y.roll(15), **kw)
    assert torch.equal(v.stands.roll(15), w.stands) and torch.equal(v.adv.roll(15, 0), w.adv)
