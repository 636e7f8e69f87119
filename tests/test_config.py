"A config says all that decides the numbers of a run, survives JSON, and refuses what cannot be with a ValueError"
import sys
import pytest
from advmix.config import Config

def test_open_settings_take_the_defaults_of_the_data():
    c = Config(method='aom', data='digits')
    assert c.arch=='convnet_s' and c.eps==.15 and c.step==pytest.approx(.15/4)

@pytest.mark.parametrize('opt,wd', [('adam',.01), ('sgd',5e-4)])
def test_weight_decay_is_the_optimisers(opt, wd):
    c = Config(opt=opt)
    assert c.wd==wd and '--wd' not in c.command() and '--wd 0.2' in Config(opt=opt, wd=.2).command()

def test_json_round_trip():
    c = Config.from_spec('aom:ratio=kl:where=shared', epochs=3, seed=4)
    d = Config.from_json(c.to_json())
    assert d==c and (d.ratio, d.where, d.epochs, d.seed)==('kl','shared',3,4)

wrong = [dict(epochs=.5), dict(bs=float('inf')), dict(n_mix='x'), dict(eps=0), dict(method='nothing'), dict(seed='a')]

wrong += [dict(opt='rmsprop'), dict(wd=-1e-4), dict(mom=1.), dict(mom=-.1), dict(sched='linear'), dict(lr_end=.001), dict(warmup=1),
          dict(lr_end=.1, sched='cosine', lr=.01), dict(lr_end=-1., sched='cosine'), dict(warmup=30, sched='cosine'),
          dict(warmup=-1, sched='cosine'), dict(pretrained=True), dict(pretrained=1), dict(published='big'), dict(gen_lr=0.),
          dict(stage=.5)]

@pytest.mark.parametrize('wrong', wrong)
def test_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Config(**wrong)

def test_unknown_setting_of_a_spec_lists_the_others():
    with pytest.raises(ValueError, match='ratio'): Config.from_spec('aom:nothing=1')

# files

@pytest.mark.parametrize('name,write', [('c.json', Config.to_json), ('c.yaml', Config.to_yaml), ('c.yml', Config.to_yaml)])
def test_file_round_trip(tmp_path, name, write):
    c = Config.from_spec('aom:ratio=kl', epochs=3, lr=1e-3, ema=True)
    (tmp_path/name).write_text(write(c))
    assert Config(**Config.read(tmp_path/name))==c

def test_yaml_as_it_is_meant(tmp_path):
    "`no` is the name of a precision, 1e-3 a number, 7 not a text"
    f = tmp_path/'c.yaml'
    f.write_text('amp: no\nlr: 1e-3\neps: .1\nseed: 7\nema: yes\n')
    assert Config.read(f)==dict(amp='no', lr=1e-3, eps=.1, seed=7, ema=True)
    Config(**Config.read(f))
    assert Config.read()=={}

@pytest.mark.parametrize('text,says', [
    ('metod: pgd', "'metod' is not a setting, choose among method"), ('- pgd', 'holds no settings'), ('', 'holds no settings'),
    ('eps: [', 'cannot be read as YAML'), ('epochs: many', 'must be a whole number'), ('1: 2', '1 is not a setting')])
def test_wrong_files_are_refused_by_name(tmp_path, text, says):
    f = tmp_path/'c.yaml'
    f.write_text(text)
    with pytest.raises(ValueError, match='c.yaml') as e: Config.read(f)
    assert says in str(e.value)

def test_options_win_over_a_file(tmp_path, monkeypatch, capsys):
    "Also where they say what is the default anyway"
    from advmix import cli
    f = tmp_path/'c.yaml'
    f.write_text('method: pgd\nseed: 5\nepochs: 3\nsteps: 2\nsuite: clean\n')
    monkeypatch.setattr(sys, 'argv', ['advmix_compare','--list','--methods','aom,pgd:steps=4','--config',str(f),'--epochs','30'])
    cli.compare()
    said = capsys.readouterr().out.splitlines()
    assert len(said)==2 and all('--seed 0' in l and '--suite clean' in l and '--epochs' not in l for l in said)   # 30 is usual
    assert '--steps 2' in said[0] and '--steps 4' in said[1]
    seen = []
    monkeypatch.setattr('advmix.experiment.run', lambda c, *a: seen.append(c) or 1/0)
    monkeypatch.setattr(sys, 'argv', ['advmix_train','--config',str(f),'--method','aom'])
    with pytest.raises(ZeroDivisionError): cli.train()
    assert (seen[0].method,seen[0].seed,seen[0].epochs,seen[0].where)==('aom',5,3,'endpoints')
