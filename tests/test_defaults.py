"One default per setting at all doors: the class, its callback, the config and the command"
from inspect import signature
import pytest, torch
from advmix import callbacks as C, cli
from advmix.aom import AOM
from advmix.attack import PGD, Threat
from advmix.config import Config, DEFAULTS
from advmix.ema import Average
from advmix.generator import AdAutoMixGenerator, AutoMixGenerator
from advmix.iat import IAT
from advmix.methods import METHODS
from advmix.minmax import MinMax
from advmix.mix import CutMix, MixUp
from advmix.zoo import MIXES

def defaults(f): return {k: p.default for k,p in signature(f).parameters.items() if p.default is not p.empty}
def disagree(a, b, but=()):
    a,b = defaults(a),defaults(b)
    return {k: (a[k], b[k]) for k in a.keys()&b.keys()-set(but) if a[k]!=b[k]}

@pytest.mark.parametrize('a,b', [(Threat,PGD), (PGD,AOM), (PGD,IAT), (AOM,IAT)])
def test_attacks_agree(a, b): assert not disagree(a, b)

@pytest.mark.parametrize('mixer,callback', [(PGD,C.PGDCallback), (AOM,C.AOMCallback), (IAT,C.IATCallback)])
def test_a_callback_is_its_mixer(mixer, callback):
    assert not disagree(mixer, callback) and not disagree(callback, C.MixCallback, but=['c_clean'])
    assert defaults(mixer).keys()<=defaults(callback).keys()
    first = next(iter(signature(callback).parameters.values()))
    assert first.name=='eps' and first.default==8/255
    assert all(p.kind is p.KEYWORD_ONLY for k,p in signature(mixer).parameters.items() if k!='eps' and p.kind is not p.VAR_KEYWORD)
    made = callback(.1, steps=3).mixer
    assert type(made) is mixer

@pytest.mark.parametrize('part', [MinMax, AdAutoMixGenerator, Average, C.MixCallback])
def test_the_game_is_its_parts(part):
    assert not disagree(part, C.AdAutoMixCallback)
    assert not disagree(part, C.AutoMixCallback, but=['alpha','lam_margin','up','n_mix'] if part is AdAutoMixGenerator else ['objective'])
    assert not disagree(AutoMixGenerator, C.AutoMixCallback)

@pytest.mark.parametrize('method,cls', [('aom',AOM), ('adautomix',MinMax), ('adautomix',AdAutoMixGenerator),
    ('adautomix',C.AdAutoMixCallback)])
def test_config_has_the_class_defaults(method, cls):
    here,there = vars(Config(method)),defaults(cls)
    for k in ('where','ratio','label','objective','beta','c','n_mix','alpha'):
        if k in there and here[k] is not None: assert here[k]==there[k], k
    assert 'alpha' not in there or here['alpha'] is None   # left to the class

@pytest.mark.parametrize('data', DEFAULTS)
def test_a_step_is_a_quarter_of_the_radius_everywhere(data):
    c = Config('pgd', 'digits' if data=='folder' else data)
    assert c.step==c.eps/4==Threat(c.eps).step==PGD(c.eps).threat.step==AOM(c.eps).threat.step==METHODS['aom'](c)[0].mixer.threat.step

@pytest.mark.parametrize('f', [cli.train, cli.compare])
def test_the_commands_have_the_defaults_of_config(f): assert not disagree(Config, f)

def test_every_setting_of_config_is_an_option_of_train():
    assert signature(Config).parameters.keys()<=signature(cli.train).parameters.keys()
    assert signature(Config).parameters.keys()-{'method','seed'}<=signature(cli.compare).parameters.keys()

@pytest.mark.parametrize('method', METHODS)
def test_alpha_reaches_every_mixer_that_has_one(method):
    cb = METHODS[method](Config(method, alpha=.7))
    own = MIXES[method] if method in MIXES else dict(automix=AutoMixGenerator, adautomix=AdAutoMixGenerator).get(method)
    if own is None or 'alpha' not in signature(own).parameters: return
    where = cb[0].for_generator if method.endswith('automix') else vars(cb[0].mixer)
    found = where.get('alpha', getattr(where.get('mixer'), 'alpha', None))
    assert found==.7
    assert METHODS[method](Config(method))   # and without one the class decides

def test_settings_of_the_game_reach_it():
    cb = METHODS['adautomix'](Config('adautomix', beta=.6, c=.2, n_mix=2, objective='printed'))[0]
    game = cb.start_game(torch.nn.Identity(), AdAutoMixGenerator(1, **cb.for_generator))
    assert (game.beta, game.c, game.objective, cb.n_mix)==(.6, .2, 'printed', (2,))
