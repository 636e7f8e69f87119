"What users import, and what holds for every callback alike"
import copy
import pytest, torch
from fastai.vision.all import Callback, ShortEpochCallback, load_learner
import advmix.callbacks
from advmix.data import digits_dls
from learners import *
from sync import Watch, _Methods

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

class Watched(Callback):
    "Who reads a value of the batch, the networks, or what is computed from them, between a batch's beginning and its last step"
    order,run_valid = -9,False
    def __init__(self, skip=1): self.skip,self.seen = skip,[]
    def before_batch(self):
        self.modes = []
        if self.train_iter<self.skip: return
        game = next((c.game for c in self.learn.cbs if hasattr(c, 'play')), None)
        beside = [game.generator, game.teacher] if game else [getattr(c, 'average') for c in self.learn.cbs if isinstance(c, EMACallback)]
        self.watch = Watch(self.xb, self.yb, self.learn.model, beside)
        self.modes = [_Methods(self.watch), self.watch]
        for m in self.modes: m.__enter__()
    def after_batch(self):
        for m in self.modes[::-1]: m.__exit__(None, None, None)
        if self.modes: self.seen += self.watch.seen

@pytest.mark.parametrize('cb', CBS)
def test_no_value_is_read_after_the_first_batch_of_a_fit(dls, cb):
    "On a GPU each would wait for the device; the message names who does it"
    learn = learner(dls, CBS[cb](), Watched())
    quiet(learn, 2)
    assert not learn.watched.seen, '\n'.join(sorted(set(learn.watched.seen)))
    again = learner(normalised(tensors()), CBS[cb](), Watched())
    quiet(again, 2)
    assert not again.watched.seen, '\n'.join(sorted(set(again.watched.seen)))

def test_the_first_batch_is_read_so_the_watch_works(dls):
    learn = quiet(learner(dls, CBS['mixup'](), Watched(0)))
    assert any('core.py' in s for s in learn.watched.seen)
