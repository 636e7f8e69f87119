"Every method makes callbacks that train a batch, with the settings of the config and no others"
import pytest
from fastai.callback.core import Callback
from advmix.callbacks import MixCallback
from advmix.config import Config
from advmix.methods import METHODS
from advmix.zoo import MIXES

@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_a_list_of_callbacks(name):
    cbs = METHODS[name](Config(method=name))
    assert all(isinstance(cb, Callback) for cb in cbs)
    assert (cbs==[])==(name=='vanilla')

def test_every_mix_is_a_method(): assert set(MIXES)<=set(METHODS)

@pytest.mark.parametrize('name', ('pgd','iat','aom','mix_pgd'))
def test_radius_and_steps_come_from_the_config(name):
    cb, = METHODS[name](Config(method=name, eps=.1, steps=3))
    assert isinstance(cb, MixCallback)
    threat = cb.mixer.attack.threat if hasattr(cb.mixer, 'attack') else cb.mixer.threat
    assert (threat.eps, threat.steps, threat.step)==(.1, 3, .025)

@pytest.mark.parametrize('method', ['automix','adautomix'])
def test_the_generator_sees_the_stage_that_is_asked_for(method):
    of = lambda **kw: METHODS[method](Config(method, **kw))[0].for_generator
    assert 'stage' not in of() and of(stage=-1)['stage']==of(stage=-1, published='small')['stage']==-1
