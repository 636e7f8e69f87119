"Comparisons: paired where the images are the same, calibration as calibration, honest about the rest"
import copy
import numpy as np, pytest, torch
from advmix.calibration import _scores, ece
from advmix.compare import _ece_difference, _gaps, _unpaired, compare_reports
from advmix.evaluate import Verdict
from advmix.intervals import bootstrap, paired, wilson
from advmix.rows import Report

g = torch.Generator().manual_seed(0)
OLD = torch.rand(200, generator=g)<.6
NEW = OLD|(torch.rand(200, generator=g)<.15)

def calibration(logits, y):
    s = _scores(logits, y)
    each = {k: ' '.join(f'{float(v):.9g}' for v in o) for k,o in s.items()}
    return dict(name='calibration', accuracy=s['right'].double().mean().item(), n=len(y), n_bins=15, ece=ece(logits, y),
                ece_floor=ece(logits), nll=s['nll'].mean().item(), brier=s['brier'].mean().item(), per_image=each)

def report(stands, images='x', counts=None, **config):
    rep = Report(dict(eps=.1, norm='linf', images=images) | config)
    rep.add(Verdict('fgsm', stands))
    counts = stands.long()*8+1 if counts is None else counts
    text = ' '.join(map(str, counts.tolist()))
    rep.add(dict(name='mean', accuracy=counts.double().mean().item()/10, n=len(stands), per_image=text, of=10))
    return rep

def by(c, name, rep='b'): return next(r for r in c.rows if r['name']==name and r['report']==rep)

def test_paired_on_the_same_images():
    c = compare_reports(dict(a=report(OLD), b=report(NEW)))
    r = by(c, 'fgsm')
    assert (r['diff'],r['lo'],r['hi'])==paired(OLD, NEW) and r['how']=='paired'
    m = by(c, 'mean')
    assert (m['diff'],m['lo'],m['hi'])==bootstrap((NEW.double()-OLD.double()).numpy()*.8, (-1,1)) and m['how']=='paired' and m['lo']>0
    u = by(compare_reports(dict(a=report(OLD), b=report(NEW, images='y'))), 'mean')
    assert u['how']=='unpaired' and u['hi']-u['lo']>m['hi']-m['lo']

def test_unpaired_against_newcombes_example():
    d,lo,hi = _unpaired((48/80, *wilson(48, 80)), (56/70, *wilson(56, 70)))   # his first case: 56/70 - 48/80, method 10
    assert round(d, 4)==.2 and [round(lo, 4),round(hi, 4)]==[.0524,.3339]
    elsewhere = report(NEW[:150], images='y')
    r = by(compare_reports(dict(a=report(OLD), b=elsewhere)), 'fgsm')
    assert r['how']=='unpaired'
    assert (r['diff'],r['lo'],r['hi'])==pytest.approx(_unpaired((OLD.double().mean().item(), *wilson(OLD.sum(), 200)),
                                                                 (NEW[:150].double().mean().item(), *wilson(NEW[:150].sum(), 150))))

def test_unknown_images_are_not_taken_for_the_same():
    a,b = report(OLD),report(NEW)
    del a.config['images'], b.config['images']
    assert by(compare_reports(dict(a=a, b=b)), 'fgsm')['how']=='unpaired'
    a,b = report(OLD),report(NEW)
    a.rows[0]['at'],b.rows[0]['at'] = list(range(200)),list(range(1,201))     # the same data, other images of it
    assert by(compare_reports(dict(a=a, b=b)), 'fgsm')['how']=='unpaired'

def test_calibration_is_compared_as_calibration():
    z = 2*torch.randn(400, 5, generator=g)
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:,0]                  # honest as it is, overconfident times three
    a,b = (Report(dict(eps=.1, norm='linf', images='x')) for _ in 'ab')
    a.add(calibration(z, y)), b.add(calibration(3*z, y))
    c = compare_reports(dict(a=a, b=b))
    assert [r['name'] for r in c.rows]==['ECE','NLL','Brier']*2 and not any('accuracy' in r for r in c.rows)
    for name,key in (('ECE','ece'),('NLL','nll'),('Brier','brier')):
        r = by(c, name)
        assert r['how']=='paired' and 0<r['lo']<r['diff']<r['hi'] and r['diff']==pytest.approx(b.rows[0][key]-a.rows[0][key], abs=1e-5)
    assert by(c, 'ECE')['floor']==pytest.approx(ece(3*z)) and 'an honest network' in repr(c)
    same = by(compare_reports(dict(a=a, b=copy.deepcopy(a))), 'ECE')
    assert same['diff']==same['lo']==same['hi']==0
    b.config['images'] = 'y'
    assert 'lo' not in by(compare_reports(dict(a=a, b=b)), 'NLL')

def test_ece_difference_is_the_difference_of_ece():
    z = 2*torch.randn(300, 5, generator=g)
    y = torch.randint(5, (300,), generator=g)
    a,b = ({k: v.double().numpy() for k,v in _scores(t*z, y).items()} for t in (1,3))
    assert _ece_difference(a, b, 15)[0]==pytest.approx(ece(3*z, y)-ece(z, y), abs=1e-6)

@pytest.mark.parametrize('scales', [(1,2), (2,3)])
def test_coverage_of_the_paired_ece_on_test_sets_of_this_size(scales):
    "Honest against overconfident, and two that are overconfident: how often does the interval hold the expected difference?"
    rng,n,held = np.random.default_rng(1),300,[]
    def sample():
        z = 1.5*rng.standard_normal((n,4))
        p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
        y = torch.from_numpy((rng.random((n,1))>p.cumsum(1)).sum(1).clip(max=3))
        return [{k: v.double().numpy() for k,v in _scores(torch.from_numpy(s*z), y).items()} for s in scales]
    truth = np.mean([np.diff([np.abs(_gaps(v, 15).sum(0)).sum()/n for v in sample()])[0] for _ in range(400)])
    for _ in range(120):
        d,lo,hi = _ece_difference(*sample(), 15, draws=150)
        held.append(lo<=truth<=hi)
    assert np.mean(held)>=.9

def test_what_does_not_fit(tmp_path):
    a = report(OLD)
    a.to_json(tmp_path/'a.json')
    compare_reports([tmp_path/'a.json', report(NEW)]).show()
    compare_reports([tmp_path/'a.json', report(NEW)]).plot()
    with pytest.raises(ValueError, match='at least two'): compare_reports([a])
    for key,v in (('eps',.2), ('norm','l2'), ('vocab',['x'])):
        a.config['vocab'] = ['a']
        with pytest.raises(ValueError, match=f'differ in {key}'): compare_reports([a, report(NEW, **{key:v})])
    compare_reports([a, report(NEW)])                                         # unknown classes may be the same
