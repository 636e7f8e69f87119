"Companions and EMACallback: saved, validated, synchronised with the optimiser, and gone without a trace"
import copy
import pytest, torch
from torch import nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, GradientAccumulation, Learner, SaveModelCallback, accuracy
from advmix.callbacks import *
from advmix.ema import Average
from learners import *

@pytest.fixture(scope='module')
def dls(): return tensors()

class Trace(Callback):
    "The weights after each step of the optimiser, and the clean images"
    order,run_valid = 3,False
    def before_fit(self): self.ws,self.xs = [weights(self.learn).double()],[]
    def before_batch(self): self.xs.append(self.x.as_subclass(torch.Tensor).clone())
    def after_step(self): self.ws.append(weights(self.learn).double())

def test_the_closed_form(dls):
    "Steps of SGD, the average recomputed from the weights a probe wrote down, from the beginning on"
    learn = quiet(learner(dls, EMACallback(.9), Trace()), 2)
    avg = learn.trace.ws[0]
    for w in learn.trace.ws[1:]: avg = .9*avg+.1*w
    assert torch.allclose(flat(learn.ema.average.net).double(), avg, atol=1e-6) and learn.ema.average.k==len(learn.trace.ws)-1

def test_statistics_are_those_of_clean_images(dls):
    "The average equals one that is fed the loader's images by hand"
    class ByHand(Trace):
        order = 3
        def before_train(self):
            if not hasattr(self, 'avg'):
                self.avg = Average(self.learn.model, .9)
        def before_batch(self): self.avg.see(self.x.as_subclass(torch.Tensor))
        def after_step(self): self.avg.update(self.learn.model)
    learn = quiet(learner(dls, MixCallback('mixup'), EMACallback(.9), ByHand()), 2)
    a,b = learn.ema.average.net,learn.by_hand.avg.net
    assert all(torch.equal(s, t) for s,t in zip(a.state_dict().values(), b.state_dict().values()))
    student = [b for n,b in learn.model.named_buffers() if n.endswith('running_var')]
    assert not all(torch.allclose(s, t, rtol=.01) for s,t in zip(student, [b for n,b in a.named_buffers() if n.endswith('running_var')]))

def test_only_the_last_batches_of_an_epoch_and_the_first_of_a_fit_are_seen(dls, monkeypatch):
    seen,long = [],tensors(70, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
    monkeypatch.setattr(Average, 'see', lambda self, *x: seen.append(0))
    quiet(learner(long, EMACallback(), model=model), 2)
    assert len(long.train)==70 and len(seen)==20+20+20

def test_one_update_per_step_of_the_optimiser(dls):
    learn = quiet(learner(dls, EMACallback(), GradientAccumulation(32)), 2)
    assert learn.ema.average.k==learn.ema.average.n_steps==2*len(dls.train)//2
    quiet(learn)
    assert learn.ema.average.k==learn.ema.average.n_steps==3*len(dls.train)//2   # over all fits

def test_no_update_where_half_precision_skipped_the_step(dls):
    class Skips(Callback):
        order = -1
        def before_fit(self): self.learn.mixed_precision = type('', (), dict(skipped=True))()
    assert quiet(learner(dls, EMACallback(), Skips())).ema.average.k==0

@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle'])
def test_start_epoch_and_lr_find_before_it(dls, fit, tmp_path):
    learn = learner(dls, EMACallback(), AdAutoMixCallback(), path=tmp_path)
    lr_find(learn)
    quiet(learn, 3, 1e-3, method=fit, start_epoch=1)
    n = 2*len(dls.train)
    assert learn.ema.average.k==learn.ema.average.n_steps==game(learn).k==game(learn).teacher.n_steps==n
    assert abs(learn.ad_auto_mix.peak-1e-3)<1e-9

def test_average_instead_of_the_student(dls):
    learn = quiet(learner(dls, EMACallback(.5, validate='average')), 2)
    avg = Learner(dls, learn.ema.average.net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert learn.validate()==avg.validate() and torch.equal(learn.get_preds()[0], avg.get_preds()[0])
    assert names(learn)==['accuracy']

def test_columns_are_the_averages(dls):
    learn = quiet(learner(dls, EMACallback(.5)), 2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','accuracy_ema','time']
    avg = Learner(dls, learn.ema.average.net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert learn.validate()[-1]==avg.validate()[-1]
    quiet(learn)
    assert len(learn.metrics)==2   # a second fit adds no second column

def test_two_companions_have_two_names(dls):
    learn = quiet(learner(dls, EMACallback(), AdAutoMixCallback()))
    assert names(learn)[:3]==['accuracy','accuracy_ema','accuracy_ema2']
    with pytest.raises(ValueError, match='two callbacks'): quiet(learner(dls, EMACallback(), EMACallback()))

def test_train_metrics_show_nothing_under_a_wrong_name(dls):
    learn = learner(dls, EMACallback(), AdAutoMixCallback())
    learn.recorder.train_metrics = True
    quiet(learn)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_accuracy_ema'] is None and row['valid_accuracy_ema'] is not None
    assert row['train_amce'] is not None and row['valid_amce'] is None and row['valid_mask_entropy'] is None

def test_validate_alone_shows_no_training_terms(dls):
    learn = quiet(learner(dls, AdAutoMixCallback()))
    row = dict(zip(names(learn), learn.validate()[1:]))
    assert row['accuracy_ema'] is not None and all(v is None for k,v in row.items() if not k.startswith('accuracy'))

@pytest.mark.parametrize('cb', ['ema', 'adautomix'])
def test_flat_tensors_only(dls, cb):
    learn = quiet(learner(dls, CBS[cb]()))
    state = learn.model.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in state.values()) and any(k.startswith('advmix.') for k in state)
    plain = net()
    plain.load_state_dict(state, strict=False)
    assert torch.equal(flat(plain), weights(learn))
    learn.remove_cb(getattr(learn, dict(ema='ema', adautomix='ad_auto_mix')[cb]))
    plain.load_state_dict(learn.model.state_dict())   # strict

@pytest.mark.parametrize('cb', ['ema', 'automix', 'adautomix'])
def test_gone_after_one_fit(dls, cb):
    learn = learner(dls)
    keys,lf,cbs = list(learn.model.state_dict()),learn.loss_func,{str(c) for c in learn.cbs}
    for _ in range(3): quiet(learn, cbs=CBS[cb]())
    assert list(learn.model.state_dict())==keys and learn.loss_func is lf
    assert {str(c) for c in learn.cbs}==cbs and names(learn)==['accuracy']
    assert not learn.model._state_dict_hooks and not learn.model._load_state_dict_pre_hooks
    assert learn.validate()==Learner(dls, learn.model, loss_func=lf, metrics=accuracy).validate()

def test_removed_and_added_again(dls):
    learn = quiet(learner(dls, EMACallback()))
    kept = learn.ema.average
    with learn.removed_cbs(learn.ema):
        assert names(learn)==['accuracy'] and not any('advmix' in k for k in learn.model.state_dict())
        learn.validate()
    assert learn.ema.average is kept and any('advmix' in k for k in learn.model.state_dict())
    quiet(learn)
    assert names(learn)==['accuracy','accuracy_ema']

def test_saved_with_the_learner_and_plain_files_load(dls, tmp_path):
    learn = quiet(learner(dls, EMACallback(), path=tmp_path))
    learn.save('full')
    new = learner(dls, EMACallback(), path=tmp_path, seed=1).load('full')
    assert torch.equal(flat(learn.ema.average.net), flat(new.ema.average.net)) and new.ema.average.k==learn.ema.average.k
    plain = learner(dls, path=tmp_path)
    plain.load('full', strict=False)
    assert torch.equal(weights(plain), weights(learn))
    plain.save('classifier')
    kept = new.ema.average
    new.load('classifier')   # a plain file says nothing about the average
    assert new.ema.average is kept and torch.equal(weights(new), weights(plain))

def test_best_model_comes_back_with_its_average(dls, tmp_path):
    class Best(Callback):
        order = 62
        def after_epoch(self):
            if self.epoch==0: self.kept = flat(self.learn.ema.average.net).clone()
    class Worse(Callback):
        "Make the first epoch the best one"
        order = 51
        def after_epoch(self): self.recorder.values[-1] = [0., float(self.epoch), 0., 0.]
    learn = learner(dls, EMACallback(), SaveModelCallback(monitor='valid_loss'), Best(), Worse(), path=tmp_path)
    quiet(learn, 3)
    assert torch.equal(learn.best.kept, flat(learn.ema.average.net))

def test_fine_tune_lr_find_and_precision(dls, tmp_path):
    learn = learner(dls, CBS['aom'](), EMACallback(), path=tmp_path)
    w = weights(learn)
    lr_find(learn)
    assert torch.equal(w, weights(learn)) and learn.ema.average is None
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1)
    before = copy.deepcopy(learn.ema.average.state_dict())
    for _ in range(2): lr_find(learn)
    assert all(torch.equal(a, b) for a,b in zip(before.values(), learn.ema.average.state_dict().values()))
    quiet(learn.to_fp16())
    quiet(learn.to_fp32().to_bf16())
    assert torch.isfinite(weights(learn)).all()

def test_deepcopy_of_the_model_leaves_the_learner_behind(dls):
    learn = quiet(learner(dls, EMACallback()))
    c = copy.deepcopy(learn.model)
    assert not [k for k in c.state_dict() if 'advmix' in k] and [k for k in learn.model.state_dict() if 'advmix' in k]

@pytest.mark.parametrize('kw', [dict(decay=1.5), dict(decay=.9, final=-1), dict(final=.99), dict(validate='mean')])
def test_wrong_settings(kw):
    with pytest.raises(ValueError, match=[*kw][-1]): EMACallback(**kw)
