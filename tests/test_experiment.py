"Runs: the same config gives the same report, interrupted or not, and nothing is overwritten"
import json, os, stat
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.training import ShortEpochCallback
from advmix import experiment as E, folder as F
from advmix.config import Config
from advmix.experiment import compare_runs, run, table
from advmix.generator import AdAutoMixGenerator, AutoMixGenerator
from advmix.minmax import MinMax
from advmix.objectives import PUBLISHED
from advmix.folder import Run, save_model, _write_file as write_file
from advmix.weights import from_pretrained
from advmix.methods import METHODS
from advmix.models import get_model

small = dict(epochs=2, steps=1, n_eval=16, suite='clean,fgsm,pgd20', bs=256)

def make_learner(config, folder): return E._learner(config, Run(folder, config))
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
    rows = [o for o in d['rows'] if o['name'] in ('clean','fgsm','pgd20','autoattack')]
    assert len(rows)==len({o['name'] for o in rows}) and all(0<=o['accuracy']<=1 and o['n']==16 and o['seconds']>=0 for o in rows)
    assert {'config.json','history.csv','model.safetensors','report.json','report.png','history.png'}=={p.name for p in r.folder.iterdir()}
    assert d['config']['vocab']==r.model(vocab=True)[1]==list('0123456789')

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
        with pytest.raises(FileExistsError, match='not a run'): Run.find(c, tmp_path/'mine', force=force)
    assert (tmp_path/'mine/thesis.tex').exists()
    run(Config(**small|dict(epochs=1, seed=1)), tmp_path/'r', force=True, progress=False)
    assert Run(tmp_path/'r').config.seed==1

@pytest.mark.parametrize('bad,says', [
    (dict(method='best'), 'vanilla'), (dict(data='mnist'), 'cifar10'), (dict(arch='resnet9'), 'resnet18'), (dict(eps=0.), r'\(0,1\]'),
        (dict(eps=1.5), r'\(0,1\]'),
    (dict(epochs=0), 'positive'), (dict(epochs=.5), 'whole number'), (dict(epochs='3'), 'whole number'), (dict(bs=float('inf')),
        'whole number'), (dict(n_mix='x'), 'whole number'),
    (dict(bs=True), 'whole number'), (dict(lr=float('nan')), 'finite'), (dict(eps=10**400), 'finite'), (dict(ema=1), 'True or False'),
        (dict(seed=-1), '4294967295'),
    (dict(n_mix=100), 'images than a batch'), (dict(where='here'), 'endpoints'), (dict(amp='fp8'), 'bf16'), (dict(suite='all'),
        'standard')])
def test_bad_settings_are_named(bad, says):
    with pytest.raises(ValueError, match=says) as e: Config(**bad)
    assert repr(next(iter(bad.values()))) in str(e.value)

def test_config_round_trip(): assert Config.from_json(Config('iat', eps=.1, ema=True).to_json())==Config('iat', eps=.1, ema=True)

@pytest.mark.parametrize('loss', [float('nan'), float('inf'), 1e37])
def test_a_diverging_run_says_so_and_leaves_nothing(loss, tmp_path, monkeypatch):
    "Also late: the checkpoint of an earlier epoch is of no use then"
    class Burst(Callback):
        order,run_valid = 60,False
        def after_loss(self):
            if self.epoch==1: self.learn.loss = torch.tensor(loss)
    monkeypatch.setitem(METHODS, 'vanilla', lambda c: [Burst()])
    with pytest.raises(ValueError, match='^the training diverged.*lower the learning rate'): run(Config('vanilla', **small),
        tmp_path/'runs/r', progress=False)
    assert not (tmp_path/'runs').exists()

def failing(monkeypatch, at, e):
    class Fail(Callback):
        run_valid = False
        def after_batch(self):
            if (self.epoch,self.iter)==at: raise e
    monkeypatch.setitem(METHODS, 'vanilla', lambda c: [Fail()])

def test_a_failed_attempt_leaves_nothing_and_blocks_nobody(tmp_path, monkeypatch):
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs/note.txt').write_text('mine')
    with monkeypatch.context() as m:
        failing(m, (0,1), ValueError('bad luck'))
        with pytest.raises(ValueError, match='^bad luck'): run(Config('vanilla', **small), tmp_path/'runs/r', progress=False)
    assert os.listdir(tmp_path/'runs')==['note.txt']
    with monkeypatch.context() as m:
        failing(m, (0,1), KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match='nothing is kept'): run(Config('vanilla', **small), tmp_path/'runs/r', progress=False)
    assert os.listdir(tmp_path/'runs')==['note.txt']
    (tmp_path/'runs/r').mkdir()
    (tmp_path/'runs/r/config.json').write_text(Config('mixup', **small).to_json())   # as a kill in the first epoch leaves it
    assert run(Config('vanilla', **small), tmp_path/'runs/r', progress=False).config.method=='vanilla'

def test_the_judgement_can_be_corrected_without_training_again(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(E, '_judge', lambda *a: (_ for _ in ()).throw(ValueError('AutoAttack needs four classes')))
        with pytest.raises(ValueError, match='four classes'): run(Config('vanilla', **small), tmp_path/'r', progress=False)
    stamp = (tmp_path/'r/checkpoint.pth').stat().st_mtime_ns
    with pytest.raises(FileExistsError, match='different run'): run(Config('vanilla', **small|dict(lr=.1)), tmp_path/'r', resume=True,
        progress=False)
    assert (tmp_path/'r/checkpoint.pth').stat().st_mtime_ns==stamp
    r = run(Config('vanilla', **small|dict(suite='clean')), tmp_path/'r', resume=True, progress=False)
    assert Run(r.folder).config.suite=='clean' and [o['name'] for o in r.report.rows]==['clean']

@pytest.mark.parametrize('there', ['{"model_type": "bert"}', '', '[1]', '{"method": "aom", "da'])
@pytest.mark.parametrize('force', [False, True])
def test_a_foreign_config_json_is_not_ours(there, force, tmp_path):
    (tmp_path/'config.json').write_text(there)
    with pytest.raises(FileExistsError, match='not a run'): run(Config(**small), tmp_path, force=force)
    assert (tmp_path/'config.json').read_text()==there and len(list(tmp_path.iterdir()))==1

def test_force_deletes_only_what_a_run_has_made(tmp_path, monkeypatch):
    a = run(Config('vanilla', **small), tmp_path/'r', progress=False)
    (a.folder/'thesis.tex').write_text('ten years')
    (tmp_path/'link').symlink_to(a.folder)
    with pytest.raises(FileExistsError, match='is a link'): Run.find(Config('mixup', **small), tmp_path/'link', force=True)
    for cwd in (a.folder, a.folder/'below'):
        cwd.mkdir(exist_ok=True)
        monkeypatch.chdir(cwd)
        with pytest.raises(FileExistsError, match='current folder'): Run.find(Config('mixup', **small), a.folder, force=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(a.folder))
    with pytest.raises(FileExistsError, match='home folder'): Run.find(Config('mixup', **small), 'r', force=True)
    monkeypatch.undo()
    run(Config('mixup', **small), a.folder, force=True, progress=False)
    assert (a.folder/'thesis.tex').read_text()=='ten years' and (a.folder/'below').is_dir() and Run(a.folder).config.method=='mixup'

def test_force_keeps_the_old_run_until_the_new_one_can_begin(tmp_path, monkeypatch):
    a = run(Config('vanilla', **small), tmp_path/'r', progress=False)
    monkeypatch.setattr(E, 'get_dls', lambda *a, **k: (_ for _ in ()).throw(ValueError('no images')))
    with pytest.raises(ValueError, match='no images'): run(Config('mixup', **small), a.folder, force=True, progress=False)
    assert Run(a.folder).config.method=='vanilla' and a.finished

def test_two_processes_do_not_share_a_folder(tmp_path):
    r = Run(tmp_path/'r', Config('vanilla', **small))
    with r.at_work():
        with pytest.raises(FileExistsError, match='another process'), r.at_work(): pass
        assert (tmp_path/'r/config.json').exists()
        write_file(r.folder/'report.json', '{}')
    with r.at_work(force=True): write_file(r.folder/'report.json', '{}')

def test_files_are_readable_as_umask_says(tmp_path):
    old = os.umask(0o027)
    try: save_model(get_model('convnet_s', 10, 1, 8), tmp_path/'m.safetensors', arch='convnet_s', n_classes=10, c_in=1, size=8)
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/'m.safetensors').stat().st_mode)==0o640

def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_file(tmp_path/'a', 'old')
    def full(fd): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError) as e: write_file(tmp_path/'a', 'new')
    assert e.value.filename==str(tmp_path/'a') and [(p.name, p.read_text()) for p in tmp_path.iterdir()]==[('a','old')]

def test_weights_without_a_spec_or_damaged(tmp_path):
    from safetensors.torch import save_file
    save_file(dict(a=torch.ones(1)), tmp_path/'plain.safetensors')
    with pytest.raises(ValueError, match='arch='): from_pretrained(tmp_path/'plain.safetensors')
    (tmp_path/'half.safetensors').write_bytes((tmp_path/'plain.safetensors').read_bytes()[:20])
    with pytest.raises(ValueError, match='cannot be read'): from_pretrained(tmp_path/'half.safetensors')

def test_a_checkpoint_of_other_classes_or_damaged(tmp_path):
    cb = F._Checkpoint(tmp_path, 10.)
    cb.learn = SimpleNamespace(dls=SimpleNamespace(vocab=['a','b']))
    torch.save(dict(vocab=['a','c']), cb.path)
    with pytest.raises(ValueError, match='classes of the data have changed'): cb.read()
    cb.path.write_bytes(cb.path.read_bytes()[:50])
    with pytest.raises(ValueError, match='cannot be read.*force=True'): cb.read()

def test_fp16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ValueError, match='needs a CUDA GPU'): run(Config('vanilla', **small|dict(amp='fp16')), tmp_path/'r', 'cpu')
    assert not (tmp_path/'r').exists()

def test_the_scaler_of_half_precision_travels_with_the_checkpoint(tmp_path):
    "fp16 needs a GPU; a scaler that counts shows the way it takes"
    class Scaler:
        def __init__(self): self.d = dict(scale=1024., growth=2., _growth_tracker=0)
        def state_dict(self): return dict(self.d)
        def load_state_dict(self, d): self.d = dict(d)
    class Half(Callback):
        order = 10
        def before_fit(self): self.learn.scaler = Scaler()
        def after_train(self): self.scaler.d['_growth_tracker'] += 7
        def before_train(self): self.at_start = self.scaler.d['_growth_tracker']
    def fit(epochs):
        learn,_ = make_learner(Config('vanilla', **small), tmp_path)
        half = Half()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-3, cbs=half)
        return half.at_start
    assert fit(1)==0 and fit(2)==7

def test_compare_averages_over_seeds_and_continues(tmp_path):
    kw = small|dict(epochs=1)
    a = compare_runs(['vanilla','pgd:steps=2'], 2, tmp_path/'c', progress=False, **kw)
    assert a.spec.tolist()==['vanilla','vanilla','pgd:steps=2','pgd:steps=2'] and a.seed.tolist()==[0,1,0,1]
    t = (tmp_path/'c/vanilla-0/report.json').stat().st_mtime_ns
    b = compare_runs(['vanilla','pgd:steps=2'], 2, tmp_path/'c', progress=False, **kw)
    assert a.equals(b) and (tmp_path/'c/vanilla-0/report.json').stat().st_mtime_ns==t
    assert ' ± ' in table(a).loc['vanilla','clean'] and (tmp_path/'c/compare.png').stat().st_size>1000

def test_a_game_says_what_its_masks_were_like(tmp_path):
    "Entropy and slope beside the accuracies, as they are and not in percent; nothing where no game was played"
    runs = compare_runs(['vanilla','adautomix'], 1, tmp_path, progress=False, **small|dict(epochs=1))
    t,last = table(runs),Run(tmp_path/'adautomix-0').history.iloc[-1]
    assert list(t.columns)[-2:]==['mask_entropy','slope'] and t.loc['vanilla','slope']==''
    for k in ('mask_entropy','slope'): assert t.loc['adautomix',k]==f'{last[k]:.2f}'
    assert list(table(runs[runs.spec=='vanilla'].dropna(axis=1)).columns)==['clean','fgsm','pgd20']

def test_a_sweep_says_what_failed_and_finishes_the_rest(tmp_path):
    kw = small|dict(epochs=1)
    with pytest.raises(ValueError, match='vanilla,lr=1e6-0 failed: the training diverged'): compare_runs(['vanilla:lr=1e6','vanilla'], 1,
        tmp_path, progress=False, **kw)
    assert {p.name for p in tmp_path.iterdir()}=={'vanilla-0','compare.json','compare.png'}
    (tmp_path/'other').mkdir()
    (tmp_path/'other/config.json').write_text('{}')
    assert compare_runs(out=tmp_path, progress=False).spec.tolist()==['vanilla']
    with pytest.raises(ValueError, match='no finished run'): compare_runs(out=tmp_path/'nowhere')

def test_runs_at_a_time_are_equal_to_one_after_the_other(tmp_path, capfd):
    kw = small|dict(epochs=1)
    a = compare_runs(['vanilla','aom:where=mix'], 1, tmp_path/'a', progress=False, **kw)
    b = compare_runs(['vanilla','aom:where=mix'], 1, tmp_path/'b', jobs=2, **kw)
    says = capfd.readouterr().out
    assert '2 runs to make' in says and 'left' in says and '[2/2]' in says
    if torch.get_num_threads()==1: assert a.equals(b)
    assert [r.config.where for r in map(Run, sorted((tmp_path/'b').glob('*-0')))]==['mix','endpoints']

def test_specs(tmp_path, monkeypatch):
    assert Config.from_spec('aom:ratio=ce:steps=3:ema=1', eps=.1)==Config('aom', ratio='ce', steps=3, ema=True, eps=.1)
    for spec,says in {'aom:rate=1': 'not a setting', 'aom:seed=1': 'not a setting', 'aom:steps=': 'whole number',
        'aom:ema=maybe': '1 or 0', 'best': 'choose one of'}.items():
        with pytest.raises(ValueError, match=says): Config.from_spec(spec)
    assert [*Config.sweep(['vanilla', 'pgd:steps=2', ' vanilla'], 2)]==['vanilla-0','vanilla-1','pgd,steps=2-0','pgd,steps=2-1']
    for o in ('photos','work'): (tmp_path/o).mkdir()
    monkeypatch.chdir(tmp_path/'work')
    assert [*Config.sweep(['pgd:data=../photos'])]==['pgd,data=..,photos-0']   # one folder, here

def test_the_command_of_a_config_makes_the_same_config(monkeypatch):
    from advmix import cli
    seen = []
    monkeypatch.setattr(E, 'run', lambda c, *a: seen.append(c) or (_ for _ in ()).throw(ValueError('enough')))
    for c in (Config('aom', ratio='kl', eps=.1, ema=True, n_eval=7), Config('adautomix', 'cifar10', c=.25, step=.003, suite='clean,fgsm',
        seed=5), Config('vanilla', lr=1/3, alpha=.3)):
        monkeypatch.setattr('sys.argv', c.command().split())
        with pytest.raises(SystemExit): cli.train()
        assert seen[-1]==c

def test_lines_about_what_is_being_made(tmp_path):
    "Epochs from the history of each folder; then it is judged, then finished"
    sweep = Config.sweep(['vanilla','pgd','mixup'], epochs=4)
    pulse = E._Pulse(tmp_path, sweep, list(sweep))
    for n,lines in {'vanilla-0': 3, 'pgd-0': 5}.items():
        (tmp_path/n).mkdir()
        (tmp_path/n/'history.csv').write_text('epoch\n'*lines)
    assert list(pulse.says())==['vanilla-0: epoch 2 of 4', 'pgd-0: being judged']   # mixup hasn't begun
    (tmp_path/'pgd-0/report.json').write_text('{}')
    assert list(pulse.says())==['vanilla-0: epoch 2 of 4']

def test_a_pipe_is_told_every_half_minute(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(E._Progress, 'every', 0)
    monkeypatch.setattr(E._Pulse, 'every', .001)
    run(Config('vanilla', **small|dict(epochs=2)), tmp_path/'r', 'cpu')
    says = capfd.readouterr().out
    assert 'epoch 1 of 2, batch' in says and 'clean 0%, about ' in says and 'pgd20 ' in says
    compare_runs(['vanilla','mixup'], 1, tmp_path/'c', **small|dict(epochs=2))
    says = capfd.readouterr().out
    assert says.count('images for training')==1 and 'convnet_s' in says and 'epochs of' in says
    assert 'vanilla-0: ' in says and '%, about' not in says and '[2/2] mixup-0' in says

@pytest.mark.parametrize('method,make', [('automix',AutoMixGenerator), ('adautomix',AdAutoMixGenerator)])
def test_the_masks_of_a_run_can_be_used_afterwards(method, make, tmp_path):
    "The file of the average has the generator with the settings it was trained with; a game goes on from there"
    c = Config(method, epochs=1, bs=256, suite='clean', n_eval=8, stage=-1, alpha=.7, published='small')
    r = run(c, tmp_path/'r', 'cpu', progress=False)
    path  = r.folder/'model_ema.safetensors'
    gen   = make.from_pretrained(path)
    assert (gen.stage,gen.alpha,gen.attention.v.weight.shape[1])==(-1,.7,32+PUBLISHED[method].get('lam_plane', True))
    x,y   = torch.rand(6, 1, 8, 8),torch.arange(6)
    mixed = gen(x, y, r.model(ema=True))
    assert torch.allclose(mixed.mask.sum(1), torch.ones(6, 8, 8), atol=1e-5) and mixed.mask.std()>0
    game  = MinMax.from_pretrained(path, make, objective='automix' if method=='automix' else 'balanced')
    assert game.mix(x, y).x.shape==x.shape
    assert 'generator' not in from_pretrained(r.folder/'model.safetensors').beside
