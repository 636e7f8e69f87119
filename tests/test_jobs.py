"Jobs: each gives rows that a report can take, on all or some of the images, and FGSM error beside our row"
import pytest, torch, torch.nn.functional as F
from torch import nn
from advmix.attack import Threat, fgsm
from advmix.data import digits_dls, split_tensors
from advmix.jobs import JOBS, SUITES, Subject
from advmix.models import on_pixels
from advmix.rows import Report

@pytest.fixture(scope='module')
def subject():
    torch.manual_seed(0)
    dls = digits_dls(bs=128)
    (x,y),m = split_tensors(dls, 'train'),on_pixels(nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,10)), .5, .25)
    opt = torch.optim.Adam(m.parameters(), 4e-3)
    for _ in range(6):
        for b in torch.randperm(len(x)).split(64): F.cross_entropy(m(x[b]), y[b]).backward(), opt.step(), opt.zero_grad()
    return Subject(m.eval(), *split_tensors(dls, n=60), eps=.1)

def test_every_suite_names_existing_jobs():
    assert all(j in JOBS for s in SUITES.values() for j in s)
    assert 'autoattack' in SUITES['standard'] and 'sanity' in SUITES['full'] and 'autoattack48' in SUITES['quick']

@pytest.mark.parametrize('job', sorted({*JOBS}-{'autoattack','autoattack48','sanity'}))
def test_every_job_gives_what_a_report_takes(job, subject):
    rep = Report(dict(n=60))
    rep.add(JOBS[job](subject))
    assert rep.curve if job=='curve' else all(0<=r['accuracy']<=1 and r['n']==60 for r in rep.rows)

def test_names_of_rows(subject):
    names = lambda job: [r['name'] for r in JOBS[job](subject)]
    assert names('occlusion')==['50% of patches black','50% of patches mean colour'] and len(names('occlusions'))==18
    assert names('corruption')==['mean of the 10 CIFAR-C-like'] and len(names('corruptions'))==11
    assert JOBS['occlusion'](subject)[1]['colour']==[.5] and JOBS['pgd100'](subject).name=='pgd100x5'

def test_sanity_hands_on_its_verdict(subject):
    s = Subject(subject.model, subject.x[:24], subject.y[:24], eps=.1)
    report = Report(dict(n=24))
    report.add(JOBS['sanity'](s))
    assert len(report.sanity)>8 and report.rows[0]['name']=='sanity' and report.rows[0]['n']==24 and 'at' not in report.rows[0]

def test_some_images_and_where_they_are(subject):
    assert subject.at(9)==[i*60//9 for i in range(9)] and subject.at(99)==list(range(60))
    x,y = subject.some(9)
    assert torch.equal(x, subject.x[subject.at(9)]) and len(y)==9

def test_fgsm_error_is_over_all_images(subject):
    v = JOBS['fgsm'](subject)
    z = fgsm(subject.model, subject.x, subject.y, Threat(eps=.1))
    wrong = (subject.model(z).argmax(1)!=subject.y)
    assert v.settings['error']==wrong.double().mean().item() and v.accuracy<=1-v.settings['error']
    clean = JOBS['clean'](subject).stands
    assert torch.equal(v.stands, clean&~wrong) and f"{wrong.double().mean():.1%}" in v.settings['note']

def test_impossible_subjects(subject):
    with pytest.raises(ValueError, match='8/255'): Subject(subject.model, subject.x, subject.y, eps=8)
    with pytest.raises(ValueError, match='linf'): Subject(subject.model, subject.x, subject.y, norm='l3')
    nowhere = Subject(subject.model, subject.x, subject.y, source='no-such-folder')
    with pytest.raises(ValueError, match="unknown"): JOBS['corruption'](nowhere)

@pytest.mark.parametrize('job', sorted({*JOBS}-{'sanity'}))
def test_passes_are_a_bound_and_a_close_one(job, subject):
    "Counted at a radius where nothing falls; the sanity checks may go on from a suspicion"
    right = (subject.model(subject.x).argmax(1)==subject.y).nonzero()[:12,0]
    s = Subject(subject.model, subject.x[right], subject.y[right], eps=1e-6)
    seen,h = [],s.model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    try: JOBS[job](s)
    finally: h.remove()
    f,b = s.passes(job)
    assert .9*f<=sum(seen)<=f and 0<=b<f
    assert s.passes('no such job')==(0,0)
    less = s.passes(job, right=.5)
    assert less==((f,b) if job in ('clean','corruption','corruptions','occlusion','occlusions','calibration') else (round(f/2),round(b/2)))
