"Runs: the same config gives the same report, interrupted or not, and nothing is overwritten"
import json
import pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
import advmix.experiment as E
from advmix.data import digits_dls
from advmix.experiment import Config, METHODS, Run, compare_runs, make_learner, open_folder, run, table, variant
from fastai.vision.all import ShortEpochCallback

small = dict(epochs=2, steps=1, n_eval=16, suite='clean,fgsm,pgd20', bs=256)

def numbers(r): return [(o['name'], o['accuracy'], o['n']) for o in r.report.rows]

@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_two_batches(method, tmp_path):
    learn,_ = make_learner(Config(method, epochs=1, steps=1), tmp_path)
    before = [p.clone() for p in learn.model.parameters()]
    class Count(Callback):
        run_valid,n = False,0
        def after_batch(self): self.n += 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[ShortEpochCallback(2/len(learn.dls.train)+1e-6), Count()])
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    assert any(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def test_two_runs_of_one_config_are_the_same(tmp_path):
    a,b = (run(Config(**small), tmp_path/n, progress=False) for n in 'ab')
    assert numbers(a)==numbers(b) and not (tmp_path/'a/checkpoint.pth').exists()
    assert all(torch.equal(p, q) for p,q in zip(a.model().parameters(), b.model().parameters()))
    assert (a.history.drop(columns='time')==b.history.drop(columns='time')).all().all()

def test_report_json_has_the_promised_layout(tmp_path):
    r = run(Config(**small|dict(suite='quick')), tmp_path/'r', progress=False)
    d = json.loads((r.folder/'report.json').read_text())
    assert {'config','rows','environment'}<=set(d) and d['config']['method']=='aom'
    assert [o['name'] for o in d['rows']][0]=='clean' and {'clean','fgsm','pgd20','autoattack'}<={o['name'] for o in d['rows']}
    assert all(0<=o['accuracy']<=1 and o['n']==16 and o['seconds']>=0 for o in d['rows'] if o['name'] in ('clean','fgsm','pgd20','autoattack'))
    assert {'config.json','history.csv','model.safetensors','report.json','report.png','history.png'}<={p.name for p in r.folder.iterdir()}

def test_interrupted_and_resumed_ends_with_the_same_numbers(tmp_path, monkeypatch):
    c = Config(**small|dict(epochs=3, ema=True))
    whole = run(c, tmp_path/'whole', progress=False)
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if self.epoch==1 and self.iter==2: raise KeyboardInterrupt('stop')
    with monkeypatch.context() as m:
        m.setitem(METHODS, 'aom', lambda c, f=METHODS['aom']: f(c)+[Stop()])
        with pytest.raises(KeyboardInterrupt): run(c, tmp_path/'parts', progress=False)
    with pytest.raises(FileExistsError, match='unfinished run'): run(c, tmp_path/'parts', progress=False)
    parts = run(c, tmp_path/'parts', resume=True, progress=False)
    assert numbers(whole)==numbers(parts) and 'pgd20_ema' in dict((n,a) for n,a,_ in numbers(parts))
    assert (whole.history.drop(columns='time')==parts.history.drop(columns='time')).all().all()

def test_nothing_is_overwritten(tmp_path):
    c = Config(**small|dict(epochs=1))
    a = run(c, tmp_path/'r', progress=False)
    stamp = (a.folder/'model.safetensors').stat().st_mtime_ns
    run(c, tmp_path/'r', progress=False)   # opened, not repeated
    with pytest.raises(FileExistsError, match='seed=0 there, 1 asked'): run(Config(**small|dict(epochs=1, seed=1)), tmp_path/'r')
    assert (a.folder/'model.safetensors').stat().st_mtime_ns==stamp
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/thesis.tex').write_text('ten years')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not a run'): open_folder(c, tmp_path/'mine', force=force)
    assert (tmp_path/'mine/thesis.tex').exists()
    run(Config(**small|dict(epochs=1, seed=1)), tmp_path/'r', force=True, progress=False)
    assert Run(tmp_path/'r').config.seed==1

@pytest.mark.parametrize('bad,says', [(dict(method='best'), 'vanilla'), (dict(data='mnist'), 'cifar10'), (dict(arch='alexnet'), 'resnet18'), (dict(eps=0.), r'\(0,1\]'), (dict(eps=1.5), r'\(0,1\]'),
                                      (dict(epochs=0), 'positive'), (dict(where='here'), 'endpoints'), (dict(amp='fp8'), 'bf16'), (dict(suite='all'), 'standard')])
def test_bad_settings_are_named(bad, says):
    with pytest.raises(ValueError, match=says) as e: Config(**bad)
    assert repr(next(iter(bad.values()))) in str(e.value)

def test_config_round_trip(): assert Config.from_json(Config('iat', eps=.1, ema=True).to_json())==Config('iat', eps=.1, ema=True)

def test_a_diverging_run_says_so(tmp_path):
    class Burst(nn.Module):
        "A stand-in for a learning rate far too high"
        def forward(self, p, y): return p.sum()*float('nan')
    learn,_ = make_learner(Config(epochs=1, steps=1, method='vanilla'), tmp_path)
    learn.loss_func = Burst()
    with pytest.raises(ValueError, match='lower the learning rate'), learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_compare_averages_over_seeds_and_continues(tmp_path):
    kw = small|dict(epochs=1)
    a = compare_runs(['vanilla','pgd:steps=2'], 2, tmp_path/'c', progress=False, **kw)
    assert a.spec.tolist()==['vanilla','vanilla','pgd:steps=2','pgd:steps=2'] and a.seed.tolist()==[0,1,0,1]
    t = (tmp_path/'c/vanilla-0/report.json').stat().st_mtime_ns
    b = compare_runs(['vanilla','pgd:steps=2'], 2, tmp_path/'c', progress=False, **kw)
    assert a.equals(b) and (tmp_path/'c/vanilla-0/report.json').stat().st_mtime_ns==t
    assert ' ± ' in table(a).loc['vanilla','clean'] and (tmp_path/'c/compare.png').stat().st_size>1000

def test_variants():
    assert variant('aom:ratio=ce:steps=3:ema=1', eps=.1)==Config('aom', ratio='ce', steps=3, ema=True, eps=.1)
    with pytest.raises(ValueError, match='not a setting'): variant('aom:rate=1')
