"MixCallback and its shells on tiny Learners: nothing broken, nothing leaked, the right loss on the right targets"
import copy, inspect
import matplotlib.pyplot as plt
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.vision.all import (CSVLogger, Callback, CrossEntropyLossFlat, DataLoaders, DiceLoss, EarlyStoppingCallback, FocalLossFlat,
                               GradientAccumulation, GradientClip, LabelSmoothingCrossEntropyFlat, Learner, SaveModelCallback,
                               ShortEpochCallback, Transform, accuracy, resnet18, set_seed, vision_learner)
from fastai.callback.mixup import CutMix as FastaiCutMix, MixUp as FastaiMixUp
from advmix.aom import AOM
from advmix.attack import PGD
from advmix.callbacks import *
from advmix.data import tensor_dls
from advmix.iat import IAT
from advmix.manifold import ManifoldMix
from advmix.mix import CutMix, Mixed, MixUp, compose
import advmix.core as core
from learners import *

@pytest.fixture(scope='module')
def dls(): return tensors()

@pytest.mark.parametrize('cb', CBS)
def test_interrupted_anywhere_the_learner_still_works(dls, cb):
    learn = learner(dls, CBS[cb]())
    lf = learn.loss_func
    for e in EVENTS:
        with pytest.raises(KeyboardInterrupt): quiet(learn, cbs=Bomb(e))
        assert learn.loss_func is lf and lf.reduction=='mean'
    quiet(learn)
    learn.validate()
    assert all(m.training for m in learn.model.train().modules())

@pytest.mark.parametrize('cb', MIXING)
def test_validation_and_predictions_are_untouched(dls, cb):
    learn = quiet(learner(dls, CBS[cb]()))
    plain = Learner(dls, learn.model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    a,b = learn.validate(),plain.validate()
    assert a[:len(b)]==b
    assert torch.equal(learn.get_preds()[0], plain.get_preds()[0])

@pytest.mark.parametrize('cb', CBS)
def test_same_seed_same_weights(cb):
    a,b = (weights(quiet(learner(tensors(), CBS[cb]()), 2)) for _ in range(2))
    assert torch.equal(a, b)

@pytest.mark.parametrize('bs', [1, 2, 3])
@pytest.mark.parametrize('cb', [k for k in PLAIN if k!='manifold'])
def test_batches_of_one_and_odd_last_batches_train(cb, bs):
    x,y = torch.rand(7,1,8,8),torch.arange(7)
    dls = tensor_dls(x, y, x, y, x, y, bs=bs, vocab=range(10))
    dls.train.drop_last = False
    learn = learner(dls, CBS[cb](), model=linear())
    before = weights(learn)
    quiet(learn)
    assert torch.isfinite(weights(learn)).all() and not torch.equal(before, weights(learn))

def test_the_loss_is_that_of_the_mixed_labels(dls):
    class Same(Callback):
        order,run_valid = 6,False
        def after_loss(self):
            soft = self.learn.mix.mixed.soft(self.y.as_subclass(torch.Tensor), 10)
            assert abs(self.loss-nn.CrossEntropyLoss()(self.pred, soft))<1e-5
    quiet(learner(dls, CBS['mixup'](), Same()))

LOSSES = dict(flat=CrossEntropyLossFlat(), ce=nn.CrossEntropyLoss(), functional=F.cross_entropy, smooth=LabelSmoothingCrossEntropyFlat(),
              focal=FocalLossFlat(), weighted=nn.CrossEntropyLoss(weight=torch.linspace(1,5,10)),
              torch_smooth=nn.CrossEntropyLoss(label_smoothing=.1), margin=nn.MultiMarginLoss())

@pytest.mark.parametrize('cb', ['mixup', 'pgd', 'iat', 'adautomix'])
@pytest.mark.parametrize('loss', LOSSES)
def test_any_loss(dls, loss, cb): assert torch.isfinite(weights(quiet(learner(dls, CBS[cb](), loss=LOSSES[loss])))).all()

class OneHot(Callback):
    "A user whose labels are soft from the start"
    order = -5
    def before_batch(self): self.learn.yb = (F.one_hot(self.y.as_subclass(torch.Tensor), 10).float(),)

def test_soft_target_losses_and_the_error_without_them(dls):
    def soft_only(p, t): return -(t*p.log_softmax(1)).sum(1).mean()
    set_seed(0)
    learn = Learner(dls, net(), loss_func=soft_only, cbs=[MixCallback(MixUp()), OneHot()])
    quiet(learn)
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    with pytest.raises(ValueError, match='does not take soft targets'):
        quiet(learner(dls, MixCallback(MixUp(), loss_mode='soft'), loss=CrossEntropyLossFlat()))

# refused

def test_two_mixers_are_refused(dls):
    with pytest.raises(ValueError, match='AOMCallback and MixCallback|MixCallback and AOMCallback'):
        quiet(learner(dls, CBS['mixup'](), CBS['aom']()))
    with pytest.raises(ValueError, match='MixCallback and CutMix'): quiet(learner(dls, CBS['mixup'](), FastaiCutMix()))

@pytest.mark.parametrize('mixer', [('cutmix', .5), [CutMix, MixUp], CutMix, FastaiMixUp(), FastaiMixUp, 3, None,
                                   [('cutmix', .5), FastaiMixUp()], [MixUp(), 3], []])
def test_what_is_no_mixer_is_refused_at_once(mixer):
    with pytest.raises((TypeError, ValueError), match='mix'): MixCallback(mixer)

@pytest.mark.parametrize('kw', [dict(p=-1), dict(start=2), dict(stop=-.1), dict(c_clean=-1), dict(c_clean='1')])
def test_wrong_settings(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): MixCallback(MixUp(), **kw)

def test_everything_after_the_first_argument_is_by_name():
    for cb in (MixCallback, PGDCallback, AOMCallback, IATCallback):
        with pytest.raises(TypeError): cb('mixup' if cb is MixCallback else .1, .5)
    with pytest.raises(TypeError): PGDCallback(.1, sharpness=3)

def test_bad_images_are_named(dls):
    bad = copy.deepcopy(dls)
    bad.train.after_batch.add(Transform(lambda x: x*255 if x.is_floating_point() else x))
    with pytest.raises(ValueError, match=r'not in \[0,1\]'): quiet(learner(bad, CBS['mixup']()))

@pytest.mark.parametrize('cb', ['mixup', 'pgd', 'aom', 'iat', 'adautomix'])
def test_labels_without_an_output(dls, cb):
    with pytest.raises(ValueError, match='outside 0..6'): quiet(learner(dls, CBS[cb](), model=net(7)))

class Relabel(Callback):
    order,run_valid = -5,False
    def __init__(self, to): self.to_ = to
    def before_batch(self): self.learn.yb = (torch.where(torch.arange(len(self.y))<3, self.to_, self.y.as_subclass(torch.Tensor)),)

def test_negative_labels_unless_the_loss_ignores_them(dls):
    with pytest.raises(ValueError, match=r'labels -1\.\.\d, outside 0\.\.9'): quiet(learner(dls, CBS['mixup'](), Relabel(-1)))
    for loss,to in ((CrossEntropyLossFlat(), -100), (nn.CrossEntropyLoss(ignore_index=-1), -1)):
        assert torch.isfinite(weights(quiet(learner(dls, CBS['mixup'](), Relabel(to), loss=loss)))).all()

def test_several_targets_are_refused(dls):
    class Two(Callback):
        order,run_valid = -5,False
        def before_batch(self): self.learn.yb = (self.y, self.y)
    with pytest.raises(ValueError, match='2 targets'):
        quiet(learner(dls, CBS['mixup'](), Two(), loss=lambda p, a, b=None: F.cross_entropy(p, a.as_subclass(torch.Tensor))))

def test_kl_with_another_loss_is_refused_before_training(dls):
    with pytest.raises(ValueError, match="ratio='ce'"): quiet(learner(dls, AOMCallback(ratio='kl'), loss=FocalLossFlat()))

# pixels

@pytest.mark.parametrize('cb', ['pgd', 'aom', 'iat'])
def test_normalised_loaders_give_the_same_pixels(cb):
    "8/255 stays 8/255 of a pixel: float32 rounding is all that differs"
    mean,std,res = .3,.35,[]
    cbs = dict(pgd=PGDCallback, aom=AOMCallback, iat=IATCallback)
    for norm in (False, True):
        set_seed(0, reproducible=True)
        dls,model = tensors(),get_model('convnet', 10, c_in=1, size=8, mean=[mean], std=[std])
        if norm:
            normalised(dls, mean, std)
            model[0] = nn.Identity()
        learn = learner(dls, cbs[cb](eps=8/255, steps=2), model=model)
        quiet(learn, lr=0., cbs=ShortEpochCallback(.2))
        res.append(getattr(learn, cb).terms[-1][1].x)
    assert (res[0]-res[1]).abs().max()<=1e-6

def test_epsilon_is_in_pixels_on_a_normalised_loader():
    class Before(Callback):
        order,run_valid = 4,False
        def before_batch(self): self.x0 = self.x.as_subclass(torch.Tensor).clone()
    class After(Callback):
        order,run_valid = 8,False
        def before_batch(self): self.far = (self.x.as_subclass(torch.Tensor)-self.learn.before.x0).abs().max().item()*.2
    learn = learner(normalised(tensors()), PGDCallback(eps=8/255, step=8/255, steps=3), Before(), After())
    quiet(learn)
    assert 7.9/255<learn.after.far<=8/255+1e-6

def test_vision_learner():
    "A torchvision body with fastai's head and Normalize in the loaders, frozen first"
    x,y = torch.rand(8,3,32,32),torch.arange(8)%2
    dls = tensor_dls(x, y, x, y, x, y, bs=4, vocab=['a','b'])
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=PGDCallback(steps=1))
    dls.add_tfms([core_normalize()], 'after_batch')
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert (learn.pgd.mixed.x.min()>=0) and (learn.pgd.mixed.x.max()<=1)

def core_normalize():
    from fastai.vision.all import Normalize
    return Normalize.from_stats([.5]*3, [.2]*3, cuda=False)

# terms and the clean batch

@pytest.mark.parametrize('loss', ['flat', 'weighted', 'smooth'])
def test_c_clean_adds_the_loss_of_the_clean_batch(dls, loss):
    "PuzzleMix's published term, and RegMixup: compared with the two losses by hand, before the first step"
    class Reference(Callback):
        order,run_valid = 4,False
        def before_batch(self): self.x0 = self.x.as_subclass(torch.Tensor).clone()
        def after_loss(self):
            m,y,lf = self.learn.mix.mixed,self.y.as_subclass(torch.Tensor),self.loss_func
            self.want = m.loss(lf, self.model(m.x), y)+.7*lf(self.model(self.x0), y)
    learn = learner(dls, MixCallback(MixUp(), c_clean=.7), Reference(), Probe(), loss=LOSSES[loss], model=linear())
    quiet(learn, lr=0.)
    assert torch.allclose(learn.probe.losses[-1], learn.reference.want, atol=1e-5)

def test_terms_are_summed_with_their_weights(dls):
    "Two halves of a mixer of two terms are the mixer"
    half = lambda x, y, model=None: [(.25, Mixed.unmixed(x)), (.75, Mixed.unmixed(x))]
    whole = lambda x, y, model=None: Mixed.unmixed(x)
    def losses(m):
        set_seed(0)
        return quiet(learner(tensors(), MixCallback(m), Probe(), model=linear())).probe.losses
    a,b = losses(half),losses(whole)
    assert torch.allclose(torch.stack(a), torch.stack(b), atol=1e-5)

def test_a_mixer_that_returns_something_else(dls):
    with pytest.raises(TypeError, match='must return a Mixed'): quiet(learner(dls, MixCallback(lambda x, y, model=None: x)))

def test_gradient_accumulation_divides_the_mixed_loss():
    "Two halves of a batch give the gradient of the whole"
    class Grads(Callback):
        order = 20
        def before_step(self): self.g = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]).clone()
    x,y = tensors(32, 32).train.one_batch()
    def fixed(x, y, model=None):
        n = len(x)
        return Mixed(x*.5, torch.arange(n)[:,None].expand(n, 2), torch.tensor([[.7,.3]]).expand(n, 2))
    def grads(bs, *cbs):
        dls = tensor_dls(x, y, x[:4], y[:4], x[:4], y[:4], bs=bs, vocab=range(10))
        dls.train.shuffle = False
        torch.manual_seed(0)   # the same weights for both
        learn = learner(dls, MixCallback(fixed), Grads(), *cbs, model=linear())
        return quiet(learn, lr=0.).grads.g
    assert torch.allclose(grads(32), grads(16, GradientAccumulation(32)), atol=1e-6)

# settings that change during training

def test_growing_steps_are_told_the_progress_once_an_epoch(dls):
    seen = []
    class Growing(MixUp):
        def at(self, progress):
            seen.append(progress)
            return self
    quiet(learner(dls, MixCallback(Growing())), 4)
    assert seen==[0, .25, .5, .75]

def test_pgd_with_growing_steps(dls):
    class Steps(Callback):
        order,run_valid = 6,False
        def before_fit(self): self.n = []
        def after_train(self): self.n.append(self.learn.pgd.now.threat.steps)
    learn = quiet(learner(dls, PGDCallback(.1, steps=(1,3)), Steps()), 4)
    assert learn.steps.n[0]==1 and learn.steps.n[-1]==3 and learn.steps.n==sorted(learn.steps.n)

def test_the_users_loss_is_climbed_unless_the_mixer_has_one(dls):
    a,b = FocalLossFlat(),nn.CrossEntropyLoss()
    learn = quiet(learner(dls, PGDCallback(.1, steps=1), loss=a))
    assert learn.pgd.bound.loss is a and learn.pgd.mixer.loss is None
    learn = quiet(learner(dls, PGDCallback(.1, steps=1, loss=b), loss=a))
    assert learn.pgd.bound.loss is b
    learn.get_preds(with_loss=True)
    assert learn.loss_func is a and a.reduction=='mean'

def test_values_are_looked_at_in_the_first_batch_of_a_fit_only(dls, monkeypatch):
    n = dict(looked=0)
    real = torch.Tensor.aminmax
    def aminmax(self, **kw):
        n['looked'] += 1
        return real(self, **kw)
    monkeypatch.setattr(torch.Tensor, 'aminmax', aminmax)
    for cb in PLAIN+GAMES:
        learn = learner(dls, CBS[cb]())
        quiet(learn)
        n['looked'] = 0
        quiet(learn)
        first = n['looked']
        n['looked'] = 0
        quiet(learn, 3)
        assert n['looked']==first<=12, cb

@pytest.mark.parametrize('shell,mixer', [(PGDCallback, PGD), (AOMCallback, AOM), (IATCallback, IAT)])
def test_shells_have_the_settings_and_defaults_of_their_parts(shell, mixer):
    mine,loop,its = (inspect.signature(o).parameters for o in (shell, MixCallback, mixer))
    for k,v in its.items():
        if v.kind!=v.VAR_KEYWORD: assert mine[k].default==v.default, k
    for k,v in loop.items():
        if k not in its and k!='mixer': assert mine[k].default==v.default, k
    assert list(mine)[0]=='eps' and all(v.kind==v.KEYWORD_ONLY for v in list(mine.values())[1:])

def test_settings_reach_their_part():
    cb = AOMCallback(.1, steps=3, ratio='kl', norm='l2', p=.5, loss_mode='items', c_clean=.3)
    assert cb.mixer.threat.eps==.1 and cb.mixer.threat.norm=='l2' and cb.mixer.c_clean==.3 and cb.c_clean==0 and cb.p==.5
    assert PGDCallback(.2).mixer.threat.step==.05 and PGDCallback(c_clean=.5).c_clean==.5
    assert MixCallback(MixUp(alpha=np.float32(.4))).mixer.alpha==np.float32(.4)

# a mix inside the network

def hooks(model): return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]

class Fails(nn.Module):
    "A layer in front that fails when told to"
    error = None
    def forward(self, x):
        if self.error: raise self.error('inside the pass')
        return x

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_mix_waiting(dls, error):
    "The next pass by hand, with gradients, is the plain network's"
    fails = Fails()
    learn = learner(dls, CBS['manifold'](), model=nn.Sequential(fails, net()))
    quiet(learn)
    fails.error = error
    with pytest.raises(error): quiet(learn)
    fails.error = None
    plain,x = copy.deepcopy(learn.model),torch.rand(16,1,8,8)
    for m in plain.modules(): m._forward_hooks.clear(), m._forward_pre_hooks.clear()
    for model in (learn.model, plain): model.eval()
    assert torch.equal(learn.model(x), plain(x)) and not hooks(learn.model)
    quiet(learn)
    assert not hooks(learn.model)

@pytest.mark.parametrize('event', ['before_batch', 'after_pred'])
def test_an_error_beside_the_pass_leaves_no_mix_waiting(dls, event):
    learn = learner(dls, CBS['manifold']())
    with pytest.raises(KeyboardInterrupt): quiet(learn, cbs=Bomb(event))
    x = torch.rand(16,1,8,8)
    learn.model.eval()
    a = learn.model(x)
    assert torch.equal(a, learn.model(x)) and not hooks(learn.model)

def test_a_layer_that_is_not_used_is_named(dls):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used,self.spare = net(),nn.Conv2d(1,1,1)
        def forward(self, x): return self.used(x)
    with pytest.raises(RuntimeError, match='not used in this pass'):
        quiet(learner(dls, MixCallback(ManifoldMix(layers=['spare'])), model=Spare()))

# maps as targets

def maps(n=32, floats=False):
    x = torch.rand(n,1,8,8).round()
    y = x.repeat(1,2,1,1) if floats else x[:,0].long()
    return DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=16)

SEGLOSS = dict(flat=CrossEntropyLossFlat(axis=1), ce=nn.CrossEntropyLoss(), weighted=nn.CrossEntropyLoss(weight=torch.tensor([1.,3.])),
               ignoring=nn.CrossEntropyLoss(ignore_index=0), focal=FocalLossFlat(axis=1))

@pytest.mark.parametrize('mixer', ['cutmix', 'mixup', 'fmix', 'saliencymix'])
@pytest.mark.parametrize('loss', SEGLOSS)
def test_maps_are_mixed_pixel_by_pixel(mixer, loss):
    "Against a loop over sources with the loss of single pixels"
    lf = SEGLOSS[loss]
    class Reference(Callback):
        order,run_valid = 6,False
        def after_loss(self):
            m,y,pred = self.learn.mix.mixed,self.y.as_subclass(torch.Tensor),self.pred.as_subclass(torch.Tensor)
            inner = getattr(lf, 'func', lf)
            if isinstance(inner, nn.CrossEntropyLoss):
                item = nn.CrossEntropyLoss(weight=inner.weight, ignore_index=inner.ignore_index, reduction='none')
                c = torch.ones(2) if inner.weight is None else inner.weight
                part = [(m.mask[:,n]*item(pred, y[m.idx[:,n]]), m.mask[:,n]*c[y[m.idx[:,n]]]*(y[m.idx[:,n]]!=inner.ignore_index))
                        for n in range(m.idx.shape[1])]
                self.want = sum(a.sum() for a,_ in part)/sum(b.sum() for _,b in part)
            else:
                ce = F.cross_entropy
                focal = lambda t: (lambda l: (1-(-l).exp())**2*l)(ce(pred, t, reduction='none'))
                self.want = sum((m.mask[:,n]*focal(y[m.idx[:,n]])).mean() for n in range(m.idx.shape[1]))
    torch.manual_seed(0)
    learn = learner(maps(), MixCallback(mixer), Reference(), Probe(), loss=lf, model=nn.Conv2d(1,2,3,padding=1), metrics=None)
    quiet(learn, lr=0.)
    assert torch.allclose(learn.probe.losses[-1].as_subclass(torch.Tensor), learn.reference.want, atol=1e-5)

def test_float_maps_are_mixed_like_images():
    learn = learner(maps(floats=True), MixCallback('cutmix'), Probe(), loss=nn.MSELoss(), model=nn.Conv2d(1,2,1), metrics=None)
    with torch.no_grad():
        learn.model.weight.fill_(1.)
        learn.model.bias.zero_()
    quiet(learn, lr=0.)
    assert torch.stack(learn.probe.losses).max()<1e-6   # the network copies its input, so it is right at every pixel of a mixture

def test_maps_that_cannot_be_mixed_are_refused():
    kw = dict(model=nn.Conv2d(1,2,1), metrics=None)
    for mixer in ('resizemix', ManifoldMix(layers=['input'])):
        cb = MixCallback(mixer) if isinstance(mixer, str) else MixCallback(lambda x, y, model=None: Mixed(x, *_pairs(x)))
        with pytest.raises(ValueError, match='needs masks'): quiet(learner(maps(), cb, loss=SEGLOSS['ce'], **kw))
    with pytest.raises(ValueError, match='not the mean over the pixels'):
        quiet(learner(maps(), MixCallback('cutmix'), loss=DiceLoss(), **kw))
    small = nn.Sequential(nn.Conv2d(1,2,1), nn.AvgPool2d(2))
    x,y = torch.rand(16,1,8,8),torch.zeros(16,4,4).long()
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=8)
    with pytest.raises(ValueError, match='masks of that size'):
        quiet(learner(dls, MixCallback('cutmix'), loss=nn.CrossEntropyLoss(), model=small, metrics=None))
    with pytest.raises(ValueError, match='needs one target'):
        model = nn.Sequential(nn.Conv2d(1,4,1), nn.Conv2d(4,2,1))
        quiet(learner(maps(), AdAutoMixCallback(stage=0), loss=SEGLOSS['ce'], model=model, metrics=None))

def _pairs(x):
    w = torch.full((len(x),2), .5)
    return torch.arange(len(x))[:,None].expand(-1, 2),w

# further inputs

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(128, 10)
    def forward(self, a, b): return self.net(torch.cat([a, b], 1).flatten(1))

def pairs(shape=(1,8,8)):
    a,b,y = torch.rand(32,1,8,8),torch.rand(32,*shape),torch.arange(32)%10
    items = list(zip(a, b, y))
    return DataLoaders.from_dsets(items, items, bs=16)

@pytest.mark.parametrize('cb', MIXING)
def test_further_inputs_are_refused(cb):
    learn = learner(pairs(), CBS[cb](), model=TwoInputs())
    with pytest.raises(ValueError, match='takes 2 inputs'): quiet(learn)

def test_further_inputs_are_mixed_on_request():
    class Both(Callback):
        order,run_valid = 4,False
        def before_batch(self): self.clean = [t.as_subclass(torch.Tensor).clone() for t in self.xb]
        def after_loss(self):
            m = self.learn.mix.mixed
            self.ok = all(torch.equal(compose(c, m.idx, m.mask), t.as_subclass(torch.Tensor)) for c,t in zip(self.clean, self.xb))
    learn = learner(pairs(), MixCallback('cutmix', all_inputs=True), Both(), model=TwoInputs())
    quiet(learn)
    assert learn.both.ok
    with pytest.raises(ValueError, match='gives no masks'):
        quiet(learner(pairs(), MixCallback('resizemix', all_inputs=True), model=TwoInputs()))

# company

@pytest.mark.parametrize('cb', ['mixup', 'aom', 'iat'])
def test_with_the_usual_company(dls, cb, tmp_path):
    company = [EMACallback(), GradientClip(1.), SaveModelCallback(monitor='accuracy_ema'), EarlyStoppingCallback(patience=5), CSVLogger()]
    learn = learner(dls, CBS[cb](), *company, path=tmp_path, model_dir='.')
    quiet(learn, 2, 1e-3, method='fit_one_cycle')
    assert 'accuracy_ema' in (tmp_path/'history.csv').read_text()

@pytest.mark.parametrize('cb', ['mixup', 'aom', 'ema', 'adautomix'])
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
def test_half_precision_without_a_device_in_the_loaders(cb, half):
    dls = tensors()
    dls._device = None
    for dl in dls.loaders: dl.device = None
    assert dls.device is None
    learn = getattr(learner(dls, CBS[cb]()), half)()
    quiet(learn)
    learn.show_mix(2) if cb!='ema' else None
    assert torch.isfinite(weights(learn)).all()

def test_mixed_accuracy_on_known_predictions(dls):
    m,learn = MixedAccuracy(),learner(dls, CBS['mixup']())
    learn.mix.terms = [(1., Mixed(None, torch.tensor([[0,1],[1,0]]), torch.tensor([[.7,.3],[.6,.4]])))]
    learn.yb,learn.pred,learn.training = (torch.tensor([3,5]),),torch.eye(10)[[5,5]],True
    m.reset()
    assert m.value is None
    m.accumulate(learn)
    assert abs(m.value-(.3+.6)/2)<1e-6

def test_mixed_accuracy_refuses_several_labels_an_image(dls):
    with pytest.raises(ValueError, match='accuracy_multi'):
        quiet(learner(dls, MixCallback(MixUp()), OneHot(), loss=nn.BCEWithLogitsLoss(), metrics=MixedAccuracy()))

# showing

def torch_dls(generator=None, workers=0):
    x,y = torch.rand(40,1,8,8),torch.arange(40)%10
    ds = torch.utils.data.TensorDataset(x, y)
    make = lambda **kw: torch.utils.data.DataLoader(ds, 8, num_workers=workers, **kw)
    return DataLoaders(make(shuffle=True, generator=generator), make())

@pytest.mark.parametrize('cb', MIXING)
def test_show_mix_before_any_fit_on_every_kind_of_loaders(dls, cb):
    for d in (dls, normalised(tensors()), torch_dls(), torch_dls(torch.Generator())):
        learn = learner(d, CBS[cb]())
        for _ in range(2):   # before a fit and after it
            learn.show_mix(2)
            drawn = [ax for ax in plt.gcf().axes if ax.images]
            plt.close()
            assert len(drawn)>=4 and len(drawn)%2==0   # columns of two pictures, with at least a partner beside the mixture
            quiet(learn)

@pytest.mark.parametrize('make', [lambda: tensors(), torch_dls, lambda: torch_dls(torch.Generator().manual_seed(3))])
@pytest.mark.parametrize('cb', ['mixup', 'pgd'])
def test_showing_changes_nothing_that_follows(cb, make):
    def after(look):
        set_seed(1)
        learn = learner(make(), CBS[cb]())
        if look: learn.show_mix(2)
        return weights(quiet(learn))
    assert torch.equal(after(False), after(True))

def test_show_mix_without_a_mixing_callback(dls):
    with pytest.raises(ValueError, match='no mixing callback'): learner(dls).show_mix()

def test_torch_loaders_train(): assert torch.isfinite(weights(quiet(learner(torch_dls(), CBS['aom'](), EMACallback())))).all()

# which batches

def test_p_start_and_stop(dls):
    class Count(Callback):
        order,run_valid = 6,False
        def before_fit(self): self.n = []
        def after_loss(self): self.n.append(float(self.learn.mix.mixed is not None))
    learn = quiet(learner(tensors(64, 4), MixCallback(MixUp(), p=.5, start=.25, stop=.75), Count()), 8)
    n = torch.tensor(learn.count.n).view(8, -1).mean(1)
    assert n[:2].max()==0 and .2<n[2:6].mean()<.8 and n[7]==0
