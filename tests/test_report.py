"Reports: one call for every kind of input, every job survives another's failure, parts add up, and stopping halfway loses nothing"
import copy, json
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai.data.transforms import Normalize as FastaiNormalize
from fastai.learner import Learner
from advmix.data import digits_dls, split_tensors, tensor_dls
from advmix.evaluate import attacked, clean
from advmix.jobs import JOBS, Subject
from advmix.models import on_pixels
from advmix.report import Report, _classes, compare_reports, robust_report

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

def untimed(rows): return [{k:v for k,v in r.items() if k!='seconds'} for r in rows]

# every way to hand it in

def test_learner_model_loader_and_tensors_give_the_same_report(dls, net):
    x,y = split_tensors(dls)
    ref = robust_report(net, (x,y), suite=fast, **quiet)
    assert [o['name'] for o in ref.rows]==[*fast,'worst case'] and ref.rows[0]['n']==450 and ref.missing=={}
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    loader = DataLoader(TensorDataset(x,y), batch_size=37)
    for model,data in [(learn,None), (net,dls), (net,loader), (net,(x.numpy(),y.numpy())), (learn,(x,y))]:
        r = robust_report(model, data, suite=fast, **quiet)
        assert numbers(r)==numbers(ref) and r.config['images']==ref.config['images'] and r.config['network']==ref.config['network']
    assert untimed(learn.robust_report(suite=fast, **quiet).rows)[-1]['by']==ref.rows[-1]['by']
    assert learn.robust_report(suite=['clean'], **quiet).config['vocab']==[str(i) for i in range(10)]

def test_fingerprint_does_not_depend_on_dtypes_but_on_everything_else(net, xy):
    x,y = xy
    image = lambda x, y: robust_report(net, (x,y), suite=['clean'], **quiet).config['images']
    assert image(x, y)==image(x, y.int())==image(x.double(), y)
    assert len({image(x, y), image(x.flip(0), y.flip(0)), image(x, y.roll(1)), image(x[:59], y[:59])})==4

def test_normalised_learner_is_attacked_in_pixels(dls, net, xy):
    ref = robust_report(net, xy, suite=fast, **quiet)
    norm = tensor_dls(*split_tensors(dls, 'train'), *split_tensors(dls, 'valid'), *xy, bs=64)
    for dl in norm.loaders: dl.after_batch.add(FastaiNormalize.from_stats([.5], [.25], cuda=False))
    learn = Learner(norm, net[1], loss_func=nn.CrossEntropyLoss())
    assert numbers(robust_report(learn, suite=fast, **quiet))==numbers(ref)
    assert numbers(robust_report(net[1], norm[2], suite=fast, **quiet))==numbers(ref)   # a single normalised loader
    with pytest.raises(ValueError, match='on_pixels'): robust_report(net[1], ((xy[0]-.5)/.25,xy[1]), suite=fast, **quiet)

def test_n_is_evenly_spaced_and_positions_say_where(net, dls):
    x,y = split_tensors(dls)
    i = torch.arange(9)*450//9
    for data in ((x,y), dls):
        r = robust_report(net, data, n=9, suite=['clean'], **quiet)
        assert r.rows[0]['n']==9 and r.rows[0]['accuracy']==clean(net, x[i], y[i]).accuracy and r.config['positions']==i.tolist()
    assert 'positions' not in robust_report(net, (x,y), n=999, suite=['clean'], **quiet).config

@pytest.mark.parametrize('kw,word', [(dict(model=3), 'Learner'), (dict(data=None), 'images'), (dict(data=7), 'DataLoaders'),
    (dict(suite='slow'), 'quick, standard, full'), (dict(part=(3,2)), 'k-th of m'), (dict(part=(1,9)), 'not enough for 9 parts'),
    (dict(suite=['pgd']), 'pgd20'), (dict(eps=8), '8/255'), (dict(norm='l3'), 'linf'),
    (dict(data=(torch.rand(3,1,8,8),torch.arange(2))), 'same number')])
def test_bad_input_gets_one_sentence(kw, word, net, xy):
    with pytest.raises(ValueError, match=word) as e: robust_report(**(dict(model=net, data=xy, suite=fast) | quiet | kw))
    assert '\n' not in str(e.value)

class Extra(nn.Module):
    "A network whose state_dict holds more than its own tensors, and an object"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)
    def get_extra_state(self): return dict(anything=[1,2])
    def set_extra_state(self, s): pass

def test_extra_state_is_no_obstacle(net, xy, tmp_path):
    model = Extra(net)
    model.register_state_dict_post_hook(lambda m, d, prefix, meta: d.update({'advmix.ema.net.weight': torch.zeros(3)}))
    r = robust_report(model, xy, suite=fast+['calibration'], out=tmp_path/'r.json', **quiet)
    assert r.missing=={} and numbers(r)[:3]==numbers(robust_report(net, xy, suite=fast, **quiet))[:3]

# rows

def test_quick_has_the_rows_that_were_promised(net, xy, tmp_path, capsys):
    r = robust_report(net, xy, eps=.1, out=tmp_path/'report.json')   # with progress
    acc = {o['name']:o['accuracy'] for o in r.rows}
    assert r.missing=={}, r.missing
    assert list(acc)[:5]==['clean','fgsm','pgd20','cw20','autoattack'] and r.curve and list(acc)[-2:]==['calibration','worst case']
    assert {'mean of the 10 CIFAR-C-like','50% of patches black','50% of patches mean colour'}<=acc.keys()
    assert acc['clean']>=acc['fgsm']>=acc['pgd20']>=acc['worst case'] and all(0<=v<=1 for v in acc.values())
    aa = next(o for o in r.rows if o['name']=='autoattack')
    assert aa['n']==48 and len(aa['stages'])==4 and len(aa['at'])==48
    assert r.curve['eps'][4]==.1 and r.curve['accuracy']==sorted(r.curve['accuracy'], reverse=True)
    d = json.loads((tmp_path/'report.json').read_text())
    assert {'config','rows','environment','missing'}<=set(d) and {'name','accuracy','n','seconds'}<=set(d['rows'][0])
    assert Report.from_json(tmp_path/'report.json')==r
    capsys.readouterr()
    r.show()
    out = capsys.readouterr().out
    assert 'autoattack' in out and 'ECE' in out and repr(r)==out.rstrip('\n')
    for row in r.rows:
        if row['name'] not in ('calibration',) and 'per_image' in row: assert r.interval(row)[0]<row['accuracy']<r.interval(row)[1]

def test_classes_and_the_worst_case(net, xy):
    r = robust_report(net, xy, suite=fast, vocab=list('abcdefghij'), **quiet)
    row = r.rows[0]
    assert sum(n for _,n in row['classes'].values())==60 and sum(k for k,_ in row['classes'].values())==round(row['accuracy']*60)
    assert set(row['classes'])<=set('abcdefghij') and r.config['vocab']==list('abcdefghij')
    worst,stands = r.rows[-1],[all(o['stands'][i]=='1' for o in r.rows[:-1]) for i in range(60)]
    assert worst['stands']==''.join('01'[s] for s in stands)
    fell = sorted(i for v in worst['by'].values() for i in v)
    assert fell==[i for i,s in enumerate(stands) if not s] and list(worst['by'])==[k for k in fast if k in worst['by']]
    part = dict(stands='01', at=[3,5])
    s = Subject(net, *xy, vocab=list('abcdefghij'))
    assert _classes(s, part)=={k:v for k,v in sorted({'abcdefghij'[int(xy[1][3])]:[0,1], 'abcdefghij'[int(xy[1][5])]:[1,1]}.items())}

def test_page_of_the_worst(net, xy, tmp_path):
    r = robust_report(net, xy, suite=fast, **quiet)
    axs = r.worst_page(tmp_path/'worst.png')
    assert axs.shape==(3,10) and (tmp_path/'worst.png').stat().st_size>5000
    conf = [e['conf'] for e in r._examples]
    assert conf==sorted(conf, reverse=True) and all(e['said']!=e['y'] for e in r._examples) and len({e['i'] for e in r._examples})==10
    for e in r._examples:
        with torch.no_grad(): p = net(e['z'][None]).softmax(1)[0]
        assert p.argmax()==e['said'] and p.max().item()==pytest.approx(e['conf'], abs=1e-5) and (e['z']-e['x']).abs().max()<=.1+1e-6
    r.to_json(tmp_path/'r.json')
    with pytest.raises(ValueError, match='no attacked images'): Report.from_json(tmp_path/'r.json').worst_page()

def test_own_jobs_and_same_numbers_twice(net, xy):
    def mine(s): return dict(name='mine', accuracy=.5, n=4)
    noise = lambda s: [attacked(s.model, s.x, s.y, s.threat(), 'noise')]
    other = lambda s: dict(name='other', accuracy=.5, n=4)
    a,b = [robust_report(net, xy, suite=['clean','pgd20',mine,noise,other], seed=3, **quiet) for _ in range(2)]
    assert numbers(a)==numbers(b) and [o['name'] for o in a.rows]==['clean','pgd20','mine','noise','other','worst case']

def test_l1_leaves_only_what_knows_that_ball(net, xy):
    r = robust_report(net, (xy[0][:4],xy[1][:4]), eps=8., norm='l1', suite=['clean','pgd20','curve'], progress=False)
    assert [o['name'] for o in r.rows]==['clean'] and r.missing=={}

def test_leaves_no_trace(xy):
    torch.manual_seed(1)
    m = on_pixels(nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144,10)), .5, .25).train()
    m[1][1].eval()
    state = lambda: ([t.clone() for t in m.state_dict().values()], [k.training for k in m.modules()], [p.grad for p in m.parameters()])
    before,rng = state(),torch.get_rng_state()
    robust_report(m, (xy[0][:20],xy[1][:20]), suite=fast+['curve','corruption','occlusion','calibration'], **quiet)
    after = state()
    assert all(torch.equal(a, b) for a,b in zip(before[0], after[0])) and before[1:]==after[1:]
    assert torch.equal(rng, torch.get_rng_state()) and not m._forward_pre_hooks

# failing, stopping, going on

def test_a_job_that_fails_says_why_and_stops_nothing(net, xy, tmp_path):
    def broken(s): raise RuntimeError('broken job\nwith a long story')
    def wrong(s): return .5
    r = robust_report(net, xy, suite=['clean',broken,wrong,'fgsm'], out=tmp_path/'r.json', **quiet)
    assert [o['name'] for o in r.rows]==['clean','fgsm','worst case']
    assert r.missing['broken']=='RuntimeError: broken job' and 'cannot take a float' in r.missing['wrong']
    assert Report.from_json(tmp_path/'r.json').missing==r.missing and 'missing: broken: RuntimeError: broken job' in r.table()

def test_three_classes_and_blind_networks_keep_their_rows(net, xy):
    class Blind(nn.Module):
        def forward(self, x): return net(x.detach())
    r = robust_report(Blind(), xy, suite=['clean','pgd20','corruption'], **quiet)
    assert {'clean','mean of the 10 CIFAR-C-like'}<={o['name'] for o in r.rows}
    three = nn.Sequential(nn.Flatten(), nn.Linear(64,3)).eval()
    r = robust_report(three, (xy[0][:12],xy[1][:12]%3), suite=['clean','autoattack'], **quiet)
    assert r.missing=={} and any(o['name'].startswith('autoattack') for o in r.rows)

def test_interrupt_and_budget_keep_what_is_complete(net, xy, tmp_path):
    def impatient(s): raise KeyboardInterrupt
    def slow(s): return [clean(s.model, s.x, s.y) for _ in range(10**6)]
    r = robust_report(net, xy, suite=['clean',impatient,'fgsm'], out=tmp_path/'r.json', **quiet)
    assert [o['name'] for o in r.rows]==['clean'] and r.missing=={'impatient':'interrupted', 'fgsm':'not started'}
    assert Report.from_json(tmp_path/'r.json').missing==r.missing and 'missing: fgsm: not started' in repr(r)
    r = robust_report(net, xy, suite=['clean',slow,'fgsm'], budget=1., **quiet)
    assert [o['name'] for o in r.rows]==['clean'] and not net._forward_pre_hooks
    assert r.missing=={'slow':'the budget of 1 s was spent', 'fgsm':'not started'}

def test_rows_are_written_as_they_are_measured(net, xy, tmp_path):
    seen = []
    def look(s): seen.append([o['name'] for o in Report.from_json(tmp_path/'r.json').rows]); return []
    robust_report(net, xy, suite=['clean','fgsm',look], out=tmp_path/'r.json', **quiet)
    assert seen==[['clean','fgsm','worst case']]

def test_an_interrupted_report_goes_on(net, xy, tmp_path):
    calls = []
    def counted(s): calls.append(1); return dict(name='counted', accuracy=.5, n=4)
    def fails(s):
        if len(calls)<2: calls.append(1); raise KeyboardInterrupt
        return dict(name='fails', accuracy=.25, n=4)
    kw = dict(suite=['clean','pgd20',counted,fails,'fgsm'], out=tmp_path/'r.json', **quiet)
    a = robust_report(net, xy, resume=True, **kw)
    assert list(a.missing)==['fails','fgsm']
    b = robust_report(net, xy, resume=True, **kw)
    assert b.missing=={} and [r['name'] for r in b.rows]==['clean','pgd20','counted','fails','fgsm','worst case'] and len(calls)==2
    assert b.rows[0]==a.rows[0]                                        # taken over, seconds and all
    with pytest.raises(ValueError, match='different network'): robust_report(mlp(), xy, resume=True, **kw)
    with pytest.raises(ValueError, match='different eps'): robust_report(net, xy, resume=True, **(kw | dict(eps=.2)))

def test_autoattack_of_a_report_resumes(net, xy, tmp_path):
    data,f = (xy[0][:20],xy[1][:20]),tmp_path/'aa.pt'
    kw = dict(eps=.3, suite=['autoattack'], progress=False)
    r,again = (robust_report(net, data, state=f, **kw) for _ in range(2))
    assert r.missing=={} and r.rows[0]['stands']==again.rows[0]['stands'] and r.rows[0]['backwards']==again.rows[0]['backwards']

# parts

def test_two_merged_halves_are_one_whole(net, xy, tmp_path):
    xy = xy[0][:16],xy[1][:16]
    kw = dict(suite=['clean','fgsm','corruptions','occlusion','calibration','autoattack'], bs=8, **quiet)
    whole = robust_report(net, xy, **kw)
    for k in (1,2): robust_report(net, xy, part=(k,2), out=tmp_path/f'{k}.json', **kw)
    m = Report.merge([tmp_path/'2.json', tmp_path/'1.json'])
    assert m.missing==whole.missing=={} and m.config['images']==whole.config['images'] and m.config['n']==16
    assert [r['name'] for r in m.rows]==[r['name'] for r in whole.rows]
    for a,b in zip(m.rows, whole.rows):
        assert a['accuracy']==pytest.approx(b['accuracy']), a['name']
        for k in ('stands','per_image','classes','by','n','at','flags'): assert a.get(k)==b.get(k), (a['name'], k)
        for k in ('ece','ece_floor','adaptive_ece','nll','brier','by_severity','error'):
            if k in b: assert a[k]==pytest.approx(b[k], abs=1e-6), (a['name'], k)
        assert m.interval(a)==whole.interval(b)
    c = compare_reports(dict(whole=whole, merged=m))
    assert all(r['how']=='paired' and r['diff']==pytest.approx(0, abs=1e-6) for r in c.rows if r['report']=='merged' and 'how' in r)

def test_compare(net, xy, tmp_path):
    torch.manual_seed(5)
    other = on_pixels(mlp(), .5, .25)
    a = robust_report(net, xy, suite=fast+['corruption'], **quiet)
    b = robust_report(other, xy, suite=fast+['corruption'], out=tmp_path/'b.json', **quiet)
    c = compare_reports(dict(a=a, b=tmp_path/'b.json'))
    row = next(r for r in c.rows if r['name']=='clean' and r['report']=='b')
    assert row['how']=='paired' and row['hi']<0 and row['diff']==pytest.approx(b.rows[0]['accuracy']-a.rows[0]['accuracy'])
    mean = next(r for r in c.rows if r['name'].startswith('mean') and r['report']=='b')
    assert mean['how']=='paired' and mean['hi']<0
    elsewhere = robust_report(net, (xy[0][:40],xy[1][:40]), suite=fast, **quiet)
    assert {r['how'] for r in compare_reports([a, elsewhere]).rows if 'how' in r}=={'unpaired'}
    with pytest.raises(ValueError, match='differ in eps'): compare_reports([a, robust_report(net, xy, suite=fast, eps=.2, progress=False)])

def test_an_unfinished_autoattack_goes_on_with_the_report(net, xy, tmp_path):
    "Its state lies beside the report until its row is in there; a state without a report is nobody's"
    out,state,seen = tmp_path/'r.json',tmp_path/'r.json.autoattack',[]
    def autoattack(s):
        seen.append(s.state.read_text() if s.state.exists() else None)
        s.state.write_text('half')
        if len(seen)==1: raise KeyboardInterrupt
        return dict(name='autoattack', accuracy=.5, n=4)
    kw = dict(suite=['clean',autoattack,'fgsm'], **quiet)
    state.write_text('stale')
    r = robust_report(net, xy, out=out, resume=True, **kw)
    assert list(r.missing)==['autoattack','fgsm'] and state.read_text()=='half'
    r = robust_report(net, xy, out=out, resume=True, **kw)
    assert r.missing=={} and not state.exists() and seen==[None,'half']
    state.write_text('half')
    robust_report(net, xy, out=out, **kw)                                # from the beginning
    assert seen[2] is None and not state.exists()
    robust_report(net, xy, out=out, state=tmp_path/'mine', **kw)
    assert (tmp_path/'mine').exists()                                    # who names a state keeps it

def test_progress_is_told_to_whom_it_may_concern(net, xy, capsys):
    class Ear:
        said = []
        def begin(self, s, jobs): self.said.append((len(s.x), jobs))
        def at(self, job, share): self.said.append((job, share))
    robust_report(net, xy, suite=['clean','pgd20'], progress=Ear())
    n,jobs = Ear.said[0]
    assert jobs==['clean','pgd20'] and n==len(xy[0]) and ('pgd20',0.) in Ear.said and all(0<=s<1 for _,s in Ear.said[1:])
    robust_report(net, xy, suite=['clean'], **quiet)
    assert capsys.readouterr().out==''
