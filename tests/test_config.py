"A config says all that decides the numbers of a run, survives JSON, and refuses what cannot be with a ValueError"
import pytest
from advmix.config import Config

def test_open_settings_take_the_defaults_of_the_data():
    c = Config(method='aom', data='digits')
    assert c.arch=='convnet_s' and c.eps==.15 and c.step==pytest.approx(.15/4)

def test_json_round_trip():
    c = Config.from_spec('aom:ratio=kl:where=shared', epochs=3, seed=4)
    d = Config.from_json(c.to_json())
    assert d==c and (d.ratio, d.where, d.epochs, d.seed)==('kl','shared',3,4)

wrong = [dict(epochs=.5), dict(bs=float('inf')), dict(n_mix='x'), dict(eps=0), dict(method='nothing'), dict(seed='a')]

@pytest.mark.parametrize('wrong', wrong)
def test_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Config(**wrong)

def test_unknown_setting_of_a_spec_lists_the_others():
    with pytest.raises(ValueError, match='ratio'): Config.from_spec('aom:nothing=1')
