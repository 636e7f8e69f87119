"Verdicts: combined over attacks, joined over parts, written as rows and read again"
import json
import pytest, torch
from hypothesis import given, settings, strategies as st
from advmix.verdict import Verdict

def verdict(bits, name='a', **kw): return Verdict(name, torch.tensor(bits).bool(), **kw)

@settings(max_examples=60, deadline=None)
@given(st.integers(1,60), st.integers(1,9), st.integers(1,12))
def test_parts_are_whole_batches_and_cover_all(n, k, bs):
    m = -(-n//bs)
    if k>m:
        with pytest.raises(ValueError, match='smaller bs'): Verdict.parts(n, k, bs)
        return
    ps = Verdict.parts(n, k, bs)
    assert [i for p in ps for i in range(n)[p]]==list(range(n)) and len(ps)==k
    assert all((p.stop-p.start)%bs==0 for p in ps[:-1]) and all(p.stop>p.start for p in ps)
    sizes = [-(-(p.stop-p.start)//bs) for p in ps]
    assert max(sizes)-min(sizes)<=1

def test_merge_adds_costs_and_joins_images():
    stage = lambda a,f: [dict(name='s', accuracy=a, seconds=1., forwards=f, backwards=2)]
    a = verdict([1,0], adv=torch.zeros(2,1,2,2), seconds=1., forwards=3, backwards=1, flags=['x'], stages=stage(.5, 5), by=['','clean'])
    b = verdict([1,1,0], adv=torch.ones(3,1,2,2), seconds=2., forwards=4, backwards=0, flags=['x','y'],
                stages=stage(2/3, 7), by=['','','s'])
    v = Verdict.merge([a, b])
    assert v.stands.tolist()==[True,False,True,True,False] and v.by==['','clean','','','s'] and v.flags==['x','y']
    assert (v.seconds,v.forwards,v.backwards)==(3.,7,1) and v.adv.shape==(5,1,2,2) and v.adv[1].sum()==0 and v.adv[2].sum()==4
    assert v.stages==[dict(name='s', accuracy=.6, seconds=2., forwards=12, backwards=4)]
    assert Verdict.merge([a, verdict([1], stages=a.stages)]).by is None
    for other,word in ((verdict([1], 'b'),'name'), (verdict([1], settings=dict(eps=1)),'settings')):
        with pytest.raises(ValueError, match=f'differ in {word}'): Verdict.merge([a, other])
    with pytest.raises(ValueError, match='differ'): Verdict.merge([])

def test_worst_remembers_who_was_first():
    clean = verdict([1,1,1,0], 'clean', adv=torch.zeros(4,1,1,1))
    a = verdict([1,0,1,0], 'a', adv=torch.full((4,1,1,1), .1), by=['','a1','','clean'], forwards=2)
    b = verdict([0,0,1,0], 'b', adv=torch.full((4,1,1,1), .2), forwards=3, settings=dict(eps=.1, steps=4))
    v = Verdict.worst([clean, a, b])
    assert v.by==['b','a1','','clean'] and v.stands.tolist()==[False,False,True,False] and v.forwards==5 and v.settings==dict(eps=.1)
    assert v.adv.flatten().tolist()==pytest.approx([.2,.1,0,0])
    assert clean.adv.sum()==0 and clean.stands.sum()==3   # nothing was changed in place
    assert Verdict.worst([b, a]).by[:2]==['b','b']
    for vs in ([], [a, verdict([1])]):
        with pytest.raises(ValueError, match='same images'): Verdict.worst(vs)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(['','clean','pgd','fab-t']), min_size=1, max_size=30), st.booleans())
def test_row_and_back(by, some):
    v = Verdict('n', torch.tensor([not b for b in by]), seconds=.5, forwards=3, backwards=1, settings=dict(eps=.1, norm='linf'),
                flags=['f']*some, stages=[dict(name='s', accuracy=1., seconds=0., forwards=1, backwards=0)]*some, by=by if some else None)
    row  = json.loads(json.dumps(v.row()))
    back = Verdict.from_row(row)
    assert back.row()==row and torch.equal(back.stands, v.stands) and back.settings==v.settings
    assert row['accuracy']==v.accuracy and row['n']==len(by) and row['eps']==.1
    if some and any(by): assert back.by==by

def test_rows_without_verdicts_are_refused():
    with pytest.raises(ValueError, match="'fog' has no verdicts"): Verdict.from_row(dict(name='fog', accuracy=.5, n=2))

def test_repr_names_what_images_fell_to():
    r = repr(verdict([1,0,0,0], 'worst case', by=['','square','clean','square'], flags=['careful']))
    assert '25.0% of 4' in r and 'fell to square 2' in r and '! careful' in r and 'clean 1' not in r
