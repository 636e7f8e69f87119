"""Every callback in every situation: afterwards the Learner is as one without it.

The pairs are generated; a new callback or situation is one line."""
import contextlib
import pytest, torch
from fastai.vision.all import (CrossEntropyLossFlat, EarlyStoppingCallback, GradientAccumulation, GradientClip, Learner, MixedPrecision,
                               SaveModelCallback, accuracy, load_learner)
from advmix import callbacks
from advmix.data import tensor_dls
from learners import *
from test_loop import hooks, torch_dls

X = torch.rand(40,1,8,8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40)%10
def tiny(bs=16, n=34): return tensor_dls(X[:n], Y[:n], X[:12], Y[:12], X[:4], Y[:4], bs=bs, vocab=range(10))

def in_constructor(make, path): return quiet(learner(tiny(), make(), path=path))
def in_fit(make, path):         return quiet(learner(tiny(), path=path), cbs=make())
def removed(make, path):
    learn = in_constructor(make, path)
    ours  = [c for c in learn.cbs if type(c).__module__.startswith('advmix')]
    learn.remove_cbs(ours)
    assert not [c for c in learn.cbs if type(c).__module__.startswith('advmix')]
    return quiet(learn)
def two_fits(make, path):       return quiet(in_constructor(make, path))
def start_epoch(make, path):    return quiet(learner(tiny(), make(), path=path), 2, start_epoch=1)
def lr_found(make, path):
    learn = learner(tiny(), make(), path=path)
    w = weights(learn)
    lr_find(learn)
    assert torch.equal(w, weights(learn))
    lr_find(quiet(learn, 2, start_epoch=1))
    return learn
def fine_tuned(make, path):
    learn = learner(tiny(), make(), path=path)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1)
    return learn
def accumulated(make, path):    return quiet(learner(tiny(), make(), GradientAccumulation(32), path=path))
def clipped(make, path):        return quiet(learner(tiny(), make(), GradientClip(.1), path=path))
def mixed_precision(make, path): return quiet(learner(tiny(), make(), MixedPrecision(), path=path))
def bfloat16(make, path):       return quiet(learner(tiny(), make(), path=path).to_bf16())
def train_metrics(make, path):
    learn = learner(tiny(), make(), path=path)
    learn.recorder.train_metrics = True
    quiet(learn)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_accuracy'] is not None and row['valid_accuracy'] is not None
    learn.recorder.train_metrics = False
    return learn
def every_column(make, path):
    learn = in_constructor(make, path)
    for name in learn.recorder.metric_names[1:-1]:
        with contextlib.redirect_stdout(None): quiet(learn, cbs=[SaveModelCallback(monitor=name), EarlyStoppingCallback(monitor=name)])
    return learn
def torch_loaders(make, path):  return quiet(learner(torch_dls(), make(), path=path))
def normalised_loaders(make, path): return quiet(learner(normalised(tiny()), make(), path=path))
def batch_of_one(make, path):
    dls = tiny(1, 3)
    dls.train.drop_last = False
    return quiet(learner(dls, make(), path=path))
def saved_and_loaded(make, path):
    learn = in_constructor(make, path)
    learn.save('m')
    other = learner(tiny(), make(), path=path, seed=1).load('m')
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), other.model.state_dict().values()))
    assert list(learn.model.state_dict())==list(other.model.state_dict())
    return quiet(other)
def exported(make, path):
    learn = in_constructor(make, path)
    learn.export('e.pkl')
    loaded = load_learner(path/'e.pkl')
    with loaded.no_bar(), learn.no_bar(): a,b = (l.predict(X[0])[2] for l in (loaded, learn))
    assert torch.allclose(a, b, atol=1e-6)
    return learn
def tta(make, path):
    learn = in_constructor(make, path)
    w = weights(learn)
    with learn.no_bar(): learn.tta(n=2)
    assert torch.equal(w, weights(learn))
    return learn
def get_preds(make, path):
    learn = learner(tiny(), make(), path=path)
    with learn.no_bar(): learn.get_preds()
    quiet(learn)
    with learn.no_bar(): learn.get_preds(with_loss=True), learn.get_preds(0)
    return learn
def validated_first(make, path):
    learn = learner(tiny(), make(), path=path)
    with learn.no_bar(): learn.validate()
    return quiet(learn)
def interrupted(make, path):
    learn = learner(tiny(), make(), path=path)
    for event in ('before_batch', 'after_pred', 'after_loss', 'after_train', 'after_validate'):
        with pytest.raises(KeyboardInterrupt): quiet(learn, cbs=Bomb(event))
    return quiet(learn)

SITUATIONS = [in_constructor, in_fit, removed, two_fits, start_epoch, lr_found, fine_tuned, accumulated, clipped, mixed_precision,
              bfloat16, train_metrics, every_column, torch_loaders, normalised_loaders, batch_of_one, saved_and_loaded, exported, tta,
              get_preds, validated_first, interrupted]
PAIRS = [(cb, s) for s in SITUATIONS for cb in CBS]

def check(learn):
    "The Learner validates and predicts as a plain one, and without our callbacks it is a plain one"
    plain = Learner(learn.dls, learn.model, loss_func=learn.loss_func, metrics=accuracy)
    with learn.no_bar(), plain.no_bar():
        assert learn.validate()[:2]==plain.validate()
        dl = dict() if hasattr(learn.dls.valid, 'new') else dict(dl=learn.dls.valid)   # fastai's default needs its own loaders
        assert torch.equal(learn.get_preds(**dl)[0], plain.get_preds(**dl)[0])
    assert learn.loss_func.reduction=='mean' and isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert not hooks(learn.model)
    learn.remove_cbs([c for c in learn.cbs if type(c).__module__.startswith('advmix')])
    assert names(learn)==['accuracy'] and list(learn.model.state_dict())==list(net().state_dict())
    assert not learn.model._state_dict_hooks and not learn.model._load_state_dict_pre_hooks
    assert {type(c).__name__ for c in learn.cbs}<={'TrainEvalCallback','Recorder','CastToTensor','ProgressCallback','MixedPrecision',
                                                    'GradientAccumulation','GradientClip'}
    with learn.no_bar(): assert learn.validate()==plain.validate()

@pytest.mark.parametrize('cb,situation', PAIRS, ids=lambda o: o if isinstance(o, str) else o.__name__)
def test_pair(cb, situation, tmp_path):
    if cb in GAMES and situation is batch_of_one:   # a mixture needs its images
        with pytest.raises(ValueError, match='images of a batch'): situation(CBS[cb], tmp_path)
        return
    learn = situation(CBS[cb], tmp_path)
    assert torch.isfinite(weights(learn)).all()
    check(learn)

def test_number_of_pairs(capsys):
    "Every callback that advmix exports is in them"
    with capsys.disabled(): print(f'\n{len(CBS)} callbacks in {len(SITUATIONS)} situations: {len(PAIRS)} pairs')
    assert len(set(PAIRS))==len(CBS)*len(SITUATIONS)>=280
    exported = {o for n in callbacks.__all__ if n.endswith('Callback') and isinstance(o := getattr(callbacks, n), type)}
    assert exported-{callbacks.GameCallback}=={type(make()) for make in CBS.values()}   # the base of two that are there
