"Reports: one call for every kind of input, files there and back, intervals, and stopping halfway"
import copy, json, math
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.data.transforms import Normalize as FastaiNormalize
from fastai.learner import Learner
from advmix.attack import Threat
from advmix.data import digits_dls, split_tensors, tensor_dls
from advmix.evaluate import _same, _trace, attacked, clean
from advmix.models import on_pixels
from advmix.report import JOBS, SUITES, Comparison, Report, Subject, compare_reports, paired, robust_report, unpaired, wilson

quiet = dict(progress=False, eps=.1)
fast  = ['clean','fgsm','pgd20']

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10))

@pytest.fixture(scope='module')
def dls(): return digits_dls(bs=128)

@pytest.fixture(scope='module')
def net(dls):
    torch.manual_seed(0)
    (x,y),m = split_tensors(dls, 'train'),on_pixels(mlp(), .5, .25)
    opt = torch.optim.Adam(m.parameters(), 4e-3)
    for _ in range(6):
        for b in torch.randperm(len(x)).split(64): F.cross_entropy(m(x[b]), y[b]).backward(), opt.step(), opt.zero_grad()
    return m.eval()

@pytest.fixture(scope='module')
def xy(dls): return split_tensors(dls, n=60)

def numbers(r): return [(o['name'],o['accuracy'],o['n']) for o in r.rows]

# --- every way to hand it in ---

def test_learner_model_loader_and_tensors_give_the_same_report(dls, net):
    x,y = split_tensors(dls)
    ref = robust_report(net, (x,y), suite=fast, **quiet)
    assert [o['name'] for o in ref.rows]==fast and ref.rows[0]['n']==450 and ref.missing==[]
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    for model,data in [(learn,None), (net,dls), (net,DataLoader(TensorDataset(x,y), batch_size=37)), (net,(x.numpy(),y.numpy())), (learn,(x,y))]:
        assert numbers(robust_report(model, data, suite=fast, **quiet))==numbers(ref)

def test_normalised_learner_is_attacked_in_pixels(dls, net, xy):
    ref = robust_report(net, xy, suite=fast, **quiet)
    norm = tensor_dls(*split_tensors(dls, 'train'), *split_tensors(dls, 'valid'), *xy, bs=64)
    for dl in norm.loaders: dl.after_batch.add(FastaiNormalize.from_stats([.5], [.25], cuda=False))
    learn = Learner(norm, net[1], loss_func=nn.CrossEntropyLoss())
    assert numbers(robust_report(learn, suite=fast, **quiet))==numbers(ref)
    assert numbers(robust_report(net[1], norm[2], suite=fast, **quiet))==numbers(ref)   # a single normalised loader
    with pytest.raises(ValueError, match='on_pixels'): robust_report(net[1], ((xy[0]-.5)/.25,xy[1]), suite=fast, **quiet)

def test_n_is_evenly_spaced(net, dls):
    x,y = split_tensors(dls)
    r = robust_report(net, (x,y), n=9, suite=['clean'], **quiet)
    i = torch.arange(9)*450//9
    assert r.rows[0]['n']==9 and r.rows[0]['accuracy']==clean(net, x[i], y[i]).accuracy
    assert robust_report(net, (x,y), n=999, suite=['clean'], **quiet).rows[0]['n']==450

@pytest.mark.parametrize('kw,word', [(dict(model=3), 'Learner'), (dict(data=None), 'images'), (dict(data=7), 'DataLoaders'),
    (dict(suite='slow'), 'quick, standard, full'),
    (dict(suite=['pgd']), 'pgd20'), (dict(eps=8), '8/255'), (dict(norm='l3'), 'linf')])
def test_bad_input_gets_one_sentence(kw, word, net, xy):
    with pytest.raises(ValueError, match=word) as e: robust_report(**(dict(model=net, data=xy, suite=fast) | quiet | kw))
    assert '\n' not in str(e.value)

# --- suites ---

def test_quick_has_the_rows_that_were_promised(net, xy, tmp_path, capsys):
    r = robust_report(net, xy, eps=.1, out=tmp_path/'report.json')   # with progress
    acc = {o['name']:o['accuracy'] for o in r.rows}
    assert list(acc)[:5]==['clean','fgsm','pgd20','cw20','autoattack'] and 'calibration' in acc and r.curve and not r.missing
    assert acc['clean']>=acc['fgsm']>=acc['pgd20'] and all(0<=v<=1 for v in acc.values())
    aa = next(o for o in r.rows if o['name']=='autoattack')
    assert aa['n']==48 and len(aa['stages'])==4
    assert r.curve['eps'][4]==.1 and r.curve['accuracy']==sorted(r.curve['accuracy'], reverse=True)
    d = json.loads((tmp_path/'report.json').read_text())
    assert {'config','rows','environment'}<=set(d) and {'name','accuracy','n','seconds'}<=set(d['rows'][0])
    assert Report.from_json(tmp_path/'report.json')==r
    capsys.readouterr()
    r.show()
    out = capsys.readouterr().out
    assert 'autoattack' in out and 'ECE' in out and repr(r)==out.rstrip('\n')

def test_every_suite_names_existing_jobs():
    assert all(j in JOBS for s in SUITES.values() for j in s)
    assert 'autoattack' in SUITES['standard'] and 'sanity' in SUITES['full']

def test_full_jobs_one_by_one(net, xy):
    s = Subject(net, xy[0][:30], xy[1][:30], eps=.1)
    r = Report({})
    for j in ('pgd100','sanity','corruptions','occlusions'): r.add(JOBS[j](s))
    names = [o['name'] for o in r.rows]
    assert names[0]=='pgd100x5' and 'gaussian_noise' in names and '50% of patches missing' in names and len(r.sanity)>8
    assert 'sanity' in r.table()

def test_own_jobs_and_same_numbers_twice(net, xy):
    def mine(s): return dict(name='mine', accuracy=.5, n=4)
    a,b = [robust_report(net, xy, suite=['clean','pgd20',mine,lambda s: [attacked(s.model, s.x, s.y, s.threat(), 'noise')]], seed=3, **quiet) for _ in range(2)]
    assert numbers(a)==numbers(b) and [o['name'] for o in a.rows]==['clean','pgd20','mine','noise']
    with pytest.raises(ValueError, match='cannot take a float'): robust_report(net, xy, suite=[lambda s: .5], **quiet)

def test_l1_leaves_only_what_knows_that_ball(net, xy):
    r = robust_report(net, (xy[0][:4],xy[1][:4]), eps=8., norm='l1', suite=['clean','pgd20','curve'], progress=False)
    assert [o['name'] for o in r.rows]==['clean']

def test_leaves_no_trace(dls, xy):
    torch.manual_seed(1)
    m = on_pixels(nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144,10)), .5, .25).train()
    m[1][1].eval()
    before,rng = _trace(m),torch.get_rng_state()
    robust_report(m, (xy[0][:20],xy[1][:20]), suite=fast+['curve','corruption','occlusion','calibration'], **quiet)
    assert _same(before, _trace(m)) and torch.equal(rng, torch.get_rng_state()) and not m._forward_pre_hooks

# --- stopping ---

def test_interrupt_and_budget_keep_what_is_complete(net, xy, tmp_path):
    def impatient(s): raise KeyboardInterrupt
    r = robust_report(net, xy, suite=['clean',impatient,'fgsm'], out=tmp_path/'r.json', **quiet)
    assert [o['name'] for o in r.rows]==['clean'] and r.missing==['impatient','fgsm'] and 'not finished: impatient, fgsm' in repr(r)
    assert Report.from_json(tmp_path/'r.json').missing==r.missing
    r = robust_report(net, xy, suite=['clean','autoattack','fgsm'], budget=1., **quiet)
    assert [o['name'] for o in r.rows]==['clean'] and r.missing==['autoattack','fgsm'] and not net._forward_pre_hooks

def test_failures_are_not_swallowed(net, xy):
    def broken(s): raise RuntimeError('broken job')
    with pytest.raises(RuntimeError, match='broken job'): robust_report(net, xy, suite=['clean',broken], **quiet)

def test_autoattack_of_a_report_resumes(net, xy, tmp_path):
    data,f = (xy[0][:20],xy[1][:20]),tmp_path/'aa.pt'
    r = robust_report(net, data, eps=.3, suite=['autoattack'], state=f, progress=False)
    again = robust_report(net, data, eps=.3, suite=['autoattack'], state=f, progress=False)
    assert r.rows[0]['stands']==again.rows[0]['stands'] and r.rows[0]['backwards']==again.rows[0]['backwards']

def test_files_that_are_no_reports(tmp_path):
    f = tmp_path/'x.json'
    for text in ('{"a": 1}', 'nonsense', '[1]'):
        f.write_text(text)
        with pytest.raises(ValueError, match='not a report'): Report.from_json(f)

# --- intervals ---

def test_wilson_against_its_formula_and_published_values():
    z = 1.959963984540054
    for k,n in [(0,10), (10,10), (81,263), (148,150)]:
        lo,hi = wilson(k, n)
        mid,half = (k+z*z/2)/(n+z*z),z/(n+z*z)*math.sqrt(k*(n-k)/n+z*z/4)
        assert abs(lo-(mid-half))<1e-9 and abs(hi-(mid+half))<1e-9
    assert [round(v, 4) for v in wilson(81, 263)]==[.2553,.3662]       # Newcombe 1998, Table I

def test_unpaired_against_newcombes_example():
    d,lo,hi = unpaired(48, 80, 56, 70)                                 # his first case: 56/70 - 48/80, method 10
    assert round(d, 4)==.2 and [round(lo, 4),round(hi, 4)]==[.0524,.3339]

def test_paired_bootstrap_is_narrower_and_agrees_with_indices():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(400, generator=g)<.6
    b = a | (torch.rand(400, generator=g)<.1)
    d,lo,hi = paired(a, b)
    assert d==pytest.approx((b.double().mean()-a.double().mean()).item()) and lo<d<hi and lo>0
    i  = torch.randint(400, (4000,400), generator=g)
    ds = (b[i].double()-a[i].double()).mean(1)
    assert abs(lo-ds.quantile(.025))<.006 and abs(hi-ds.quantile(.975))<.006
    u = unpaired(a.sum().item(), 400, b.sum().item(), 400)
    assert hi-lo<u[2]-u[1]
    assert paired(a, b)==paired(a, b) and paired(a, a)==(0,0,0) and paired(b, a)[0]==-d
    with pytest.raises(ValueError, match='same images'): paired(a, b[:5])

def test_compare(net, xy, tmp_path):
    torch.manual_seed(5)
    other = on_pixels(mlp(), .5, .25)
    a = robust_report(net, xy, suite=fast+['corruption'], **quiet)
    b = robust_report(other, xy, suite=fast+['corruption'], out=tmp_path/'b.json', **quiet)
    c = compare_reports(dict(a=a, b=tmp_path/'b.json'))
    row = next(r for r in c.rows if r['name']=='clean' and r['report']=='b')
    assert row['how']=='paired' and row['hi']<0 and row['diff']==pytest.approx(b.rows[0]['accuracy']-a.rows[0]['accuracy'])
    mean = next(r for r in c.rows if r['name'].startswith('mean') and r['report']=='b')
    assert 'diff' in mean and 'lo' not in mean                         # no interval where none is honest
    elsewhere = robust_report(net, (xy[0][:40],xy[1][:40]), suite=fast, **quiet)
    assert {r['how'] for r in compare_reports([a, elsewhere]).rows if 'how' in r}=={'unpaired'}
    c.plot()
    a.plot()
    c.show()
    with pytest.raises(ValueError, match='differ in eps'): compare_reports([a, robust_report(net, xy, suite=fast, eps=.2, progress=False)])
    with pytest.raises(ValueError, match='at least two'): compare_reports([a])
