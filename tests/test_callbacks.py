"What users import, and what holds for every callback alike"
import copy
import pytest, torch
from fastai.vision.all import ShortEpochCallback, load_learner
import advmix.callbacks
from advmix.data import digits_dls
from learners import *

@pytest.fixture(scope='module')
def dls(): return tensors()

PROMISED = ['MixCallback','PGDCallback','AOMCallback','IATCallback','EMACallback','AutoMixCallback','AdAutoMixCallback']

def test_the_promised_names(): assert set(PROMISED)<=set(advmix.callbacks.__all__)

@pytest.mark.parametrize('cb', ['mixup', 'aom', 'ema', 'adautomix'])
def test_export_and_predict(cb, tmp_path):
    d = digits_dls(bs=64)
    learn = learner(d, CBS[cb](), path=tmp_path)
    quiet(learn, cbs=ShortEpochCallback(.1))
    learn.export('m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    x = d[2].one_batch()[0][0].as_subclass(torch.Tensor)
    with loaded.no_bar(): got = loaded.predict(x)[2]
    with learn.no_bar(): want = learn.predict(x)[2]
    assert torch.allclose(got, want, atol=1e-6) and (tmp_path/'m.pkl').stat().st_size<3e6

@pytest.mark.parametrize('cb', CBS)
def test_a_copied_learner_trains_on_its_own(dls, cb):
    learn = quiet(learner(dls, CBS[cb]()))
    w,other = weights(learn),copy.deepcopy(learn)
    quiet(other)
    assert torch.equal(w, weights(learn)) and not torch.equal(w, weights(other))
