"Report: files there and back, intervals, the worst case image by image, and parts that are joined"
import copy, json
import numpy as np, pytest, torch
from advmix.evaluate import Verdict
from advmix.intervals import bootstrap, wilson
from advmix.rows import Report

def verdict(name, stands, **kw): return Verdict(name, torch.tensor([c=='1' for c in stands]), **kw)

def report(n=8, **config):
    rep = Report(dict(eps=.1, norm='linf', n=n) | config)
    rep.add([verdict('clean', '11111110'), verdict('fgsm', '11110110', settings=dict(error=.25, note='a note'))])
    rep.add(verdict('autoattack', '0101', settings=dict(at=[0,2,4,6])))
    return rep

def test_add_takes_what_measurements_return_and_nothing_else():
    rep = Report({})
    rep.add([verdict('a', '01'), [dict(name='b', accuracy=.5, n=4)]])
    assert [r['name'] for r in rep.rows]==['a','b'] and rep.rows[0]['stands']=='01'
    for bad in (.5, None, dict(name='c'), 'text'):
        with pytest.raises(ValueError, match='cannot take'): rep.add(bad)

def test_files_there_and_back(tmp_path):
    rep = report()
    rep.missing = dict(curve='RuntimeError: broken')
    rep._examples = [torch.zeros(3)]                                   # images are not for JSON
    rep.to_json(tmp_path/'deep'/'r.json')
    assert Report.from_json(tmp_path/'deep'/'r.json')==rep and not list(tmp_path.rglob('*.tmp'))
    for text in ('{"a": 1}', 'nonsense', '[1]', ''):
        (tmp_path/'x.json').write_text(text)
        with pytest.raises(ValueError, match='not a report'): Report.from_json(tmp_path/'x.json')

def test_what_is_no_file_is_no_report(tmp_path):
    "Not even tried: reading a device may never end"
    for p in (tmp_path, '/dev/zero'):
        with pytest.raises(ValueError, match='is not a report'): Report.from_json(p)

def test_a_failed_write_leaves_the_old_file(tmp_path):
    report().to_json(tmp_path/'r.json')
    before,bad = (tmp_path/'r.json').read_text(),report()
    bad.rows.append(dict(name='x', accuracy=torch.zeros(1)))
    with pytest.raises(TypeError): bad.to_json(tmp_path/'r.json')
    assert (tmp_path/'r.json').read_text()==before

def test_intervals_of_rows():
    rep = Report({})
    assert rep.interval(dict(accuracy=.75, n=8, stands='11111100'))==wilson(6, 8)
    assert rep.interval(dict(accuracy=.75, n=8))==wilson(6, 8)
    v = [0,5,10,10]
    row = dict(accuracy=.625, n=4, per_image='0 5 10 10', of=10)
    assert rep.interval(row)==bootstrap(np.array(v)/10)[1:]
    assert rep.interval(dict(accuracy=.5, n=4, by_severity=[.5]))==(None,None)   # one corruption alone keeps no numbers per image
    below,above = rep.errorbars([row, dict(accuracy=.5, n=4, by_severity=[.5])])
    assert below[0]>0 and above[0]>0 and below[1]==above[1]==0

def test_table_says_it_all():
    rep = report()
    rep.add(dict(name='calibration', accuracy=.5, n=8, ece=.1, ece_floor=.08, nll=1., brier=.5))
    rep.rows.append(rep.worst_case())
    rep.missing,rep.sanity = {'pgd20':'interrupted'},[dict(name='noise', verdict='suspicious', says='masked')]
    rep.curve = dict(eps=[0], accuracy=[1.], n=8, norm='linf', flags=['it says little'])
    text = rep.table()
    for part in ('95 % interval', 'a note', '(an honest network: 0.080)', 'fell to clean 1, fgsm 1, autoattack 1', 'autoattack saw 4 of 8',
                 'missing: pgd20: interrupted', 'sanity, noise: suspicious, masked', 'curve: it says little'): assert part in text, part
    rep.sanity[0]['verdict'] = 'pass'
    assert 'nothing suspicious' in rep.table() and repr(rep)==rep.table()
    rep.plot()

# the worst case

def test_worst_case_is_image_by_image_and_names_the_attack():
    row = report().worst_case()
    assert row['stands']=='01110110' and list(row['by'].items())==[('clean',[7]), ('fgsm',[4]), ('autoattack',[0])]
    assert row['accuracy']==5/8 and row['flags']==['autoattack saw 4 of 8 images'] and row['name']=='worst case'

def test_worst_case_uses_the_names_inside_a_verdict_and_the_order_of_trying():
    rep = Report(dict(n=4))
    rep.add([verdict('clean', '1111'), verdict('autoattack', '0010', by=['square','apgd-ce','','apgd-ce'])])
    rep.add(verdict('pgd20', '1000'))
    assert [*rep.worst_case()['by'].items()]==[('square',[0]), ('apgd-ce',[1,3]), ('pgd20',[2])]

def test_worst_case_needs_an_attack_and_known_images():
    rep = Report(dict(n=4))
    assert rep.worst_case() is None
    rep.add(verdict('clean', '1110'))
    assert rep.worst_case() is None
    rep.add(verdict('elsewhere', '00'))                                # two of four images, but not which
    assert rep.worst_case() is None

# parts

def calibration(right, conf, nll=1.):
    n = len(right)
    each = dict(confidence=conf, right=right, nll=[nll]*n, brier=[.5]*n)
    return dict(name='calibration', accuracy=sum(right)/n, n=n, seconds=1., n_bins=10, ece=0., ece_floor=0., adaptive_ece=0., nll=nll,
                brier=.5, confidence=sum(conf)/n, per_image={k: ' '.join(map(str, v)) for k,v in each.items()})

def part(k, m=2, n=3, **config):
    rep = Report(dict(eps=.1, norm='linf', seed=0, bs=2, suite='quick', n=n, part=[k,m], network='abc', images=f'{k:016x}') | config)
    kw = dict(seconds=1., forwards=5, flags=[f'flag {k}', 'both'], settings=dict(eps=.1, error=.1*k))
    rep.add(verdict('fgsm', '110' if k==1 else '011', **kw))
    rep.rows[-1]['classes'] = {'cat':[1,2]} if k==1 else {'cat':[0,1], 'dog':[2,2]}
    rep.add(dict(name='mean', accuracy=.5*k, n=n, seconds=2., per_image=' '.join([str(k)]*n), of=2))
    rep.add(dict(name='fog', accuracy=.5*k, n=n, seconds=2., by_severity=[.4*k,.6*k]))
    rep.add(calibration([1,0,1], [.9,.8,.7]))
    rep.rows[-1]['n'] = n
    rep.curve = dict(eps=[0,.1], accuracy=[1.,.5*k], n=n, norm='linf', flags=[])
    rep.sanity = [dict(name='noise', verdict='suspicious' if k==2 else 'pass', says=f'says {k}')]
    rep.add(verdict('autoattack', '01', settings=dict(at=[0,2])))
    rep.rows.append(rep.worst_case())
    return rep

def test_parts_are_joined():
    m = Report.merge([part(2), part(1)])                              # in any order
    rows = {r['name']:r for r in m.rows}
    assert m.config['n']==6 and 'part' not in m.config and m.config['images']==f'{3:016x}' and m.missing=={}
    f = rows['fgsm']
    assert f['stands']=='110011' and f['accuracy']==4/6 and f['n']==6 and f['seconds']==2 and f['forwards']==10
    assert f['flags']==['flag 1','both','flag 2'] and f['classes']=={'cat':[1,3], 'dog':[2,2]} and f['error']==pytest.approx(.15)
    assert rows['mean']['per_image']=='1 1 1 2 2 2' and rows['mean']['accuracy']==.75
    assert rows['fog']['by_severity']==pytest.approx([.6,.9])
    assert rows['calibration']['per_image']['right']=='1 0 1 1 0 1' and rows['calibration']['ece']>0
    assert rows['autoattack']['at']==[0,2,3,5] and rows['autoattack']['stands']=='0101'
    assert m.curve['accuracy']==[1.,.75] and m.curve['n']==6
    assert m.sanity==[dict(name='noise', verdict='suspicious', says='says 2')]
    assert m.rows[-1]['name']=='worst case' and m.rows[-1]['stands']=='010011' and m.rows[-1]['flags']==['autoattack saw 4 of 6 images']
    json.dumps(m.rows)

def test_a_part_in_which_nothing_fell():
    "Its row says of nothing what it fell to; the joined row still says it of the others"
    parts = [Report(dict(n=2, part=[k,2])) for k in (1,2)]
    parts[0].add(verdict('autoattack', '11', by=['','']))
    parts[1].add(verdict('autoattack', '10', by=['','square']))
    for order in (parts, parts[::-1]):
        m = Report.merge(order)
        assert m.rows[0]['by']==m.rows[-1]['by']=={'square':[3]} and m.rows[-1]['name']=='worst case'
    all_stand = [Report(dict(n=2, part=[k,2])) for k in (1,2)]
    for p in all_stand: p.add(verdict('autoattack', '11', by=['','']))
    assert Report.merge(all_stand).rows[0]['stands']=='1111'

def test_a_report_with_something_missing_is_not_complete():
    rep = report()
    rep.check_complete()
    rep.missing = dict(curve='interrupted', fgsm='no gradient')
    with pytest.raises(ValueError, match=r'not measured: curve \(interrupted\); fgsm \(no gradient\)'): rep.check_complete()

def test_parts_that_do_not_fit(tmp_path):
    for key,bad in (('eps',.2), ('norm','l2'), ('seed',1), ('network','xyz'), ('vocab',['a']), ('suite','full'), ('source','library')):
        with pytest.raises(ValueError, match=f'differ in {key}'): Report.merge([part(1), part(2, **{key:bad})])
    with pytest.raises(ValueError, match='part 1 is there twice'): Report.merge([part(1), part(1)])
    with pytest.raises(ValueError, match='number of parts'): Report.merge([part(1), part(2, m=3)])
    with pytest.raises(ValueError, match='only reports on parts'): Report.merge([report(), part(1)])
    with pytest.raises(ValueError, match='only reports on parts'): Report.merge([])

def test_parts_that_are_missing_are_named(tmp_path):
    m = Report.merge([part(1, m=3), part(3, m=3)])
    assert m.missing=={'part 2 of 3': 'not among the reports'} and m.config['n']==6
    a,b = part(1),part(2)
    b.rows,b.missing,b.curve = [r for r in b.rows if r['name']!='fgsm'],{'fgsm':'interrupted'},None
    a.to_json(tmp_path/'a.json')
    m = Report.merge([tmp_path/'a.json', b])
    assert m.missing=={'fgsm':'not in every part', 'curve':'not in every part'} and 'fgsm' not in [r['name'] for r in m.rows]

def test_merging_changes_no_part():
    parts = [part(1), part(2)]
    before = copy.deepcopy(parts)
    Report.merge(parts)
    assert parts==before
