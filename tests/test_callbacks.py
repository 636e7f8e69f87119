"Callbacks on tiny Learners: nothing broken, nothing leaked, and the same numbers whoever else is in the loop"
import copy, os, subprocess, sys, textwrap
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.vision.all import (BCEWithLogitsLossFlat, CSVLogger, Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, EarlyStoppingCallback, FocalLossFlat, GradientAccumulation,
                               GradientClip, LabelSmoothingCrossEntropyFlat, Learner, Normalize, SGD, SaveModelCallback, ShortEpochCallback, Transform, accuracy, load_learner,
                               set_seed)
from fastai.callback.mixup import CutMix as FastaiCutMix
from advmix.callbacks import *
from advmix.data import digits_dls, tensor_dls
from advmix.mix import CutMix, Mixed, MixUp
from advmix.models import get_model
import advmix.core as core

@pytest.fixture(scope='module')
def dls(): return tensors(70)

def tensors(n=70, bs=16, **kw):
    "A few real digits; 70 = 4*16 + an odd rest"
    d = digits_dls(bs=n)
    x,y = d.train.one_batch()
    return tensor_dls(x[:n].clone(), y[:n].clone(), x[:20], y[:20], x[:10], y[:10], bs=bs, vocab=range(10), **kw)

def net(): return get_model('convnet', 10, c_in=1, size=8)

def learner(dls, *cbs, loss=None, seed=0, model=None, **kw):
    set_seed(seed, reproducible=True)
    return Learner(dls, model or net(), loss_func=loss or CrossEntropyLossFlat(), metrics=accuracy, cbs=list(cbs), **kw)

def quiet(learn, n=1, lr=1e-3, cbs=None, method='fit', **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(n, lr, cbs=cbs, **kw)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

CBS = dict(mixup=lambda: MixCallback(MixUp()), cutmix=lambda: MixCallback(CutMix(per_sample=True)), pgd=lambda: PGDCallback(eps=.1, steps=2),
           aom=lambda: AOMCallback(eps=.1, steps=2, ratio='kl'), aom_cutmix=lambda: AOMCallback(eps=.1, steps=2, mixer=CutMix()), iat=lambda: IATCallback(eps=.1, steps=2), ema=lambda: EMACallback(),
           automix=lambda: AutoMixCallback(), adautomix=lambda: AdAutoMixCallback(), released=lambda: AdAutoMixCallback(objective='released'))

@pytest.mark.parametrize('cb', CBS)
def test_interrupted_anywhere_the_learner_still_works(dls, cb):
    class Bomb(Callback):
        order = 6
        def __init__(self, event): self.event = event
        def __call__(self, event):
            if event==self.event: raise KeyboardInterrupt('stop')
    learn = learner(dls, CBS[cb]())
    lf = learn.loss_func
    for e in 'before_fit before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate after_validate after_fit'.split():
        with pytest.raises(KeyboardInterrupt): quiet(learn, cbs=Bomb(e))
        assert learn.loss_func is lf and lf.reduction=='mean'
    quiet(learn)
    learn.validate()
    assert all(m.training for m in learn.model.train().modules())

@pytest.mark.parametrize('cb', [k for k in CBS if k!='ema'])
def test_validation_and_predictions_are_untouched(dls, cb):
    learn = quiet(learner(dls, CBS[cb]()))
    plain = Learner(dls, learn.model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    a,b = learn.validate(),plain.validate()
    assert a[:len(b)]==b
    assert torch.equal(learn.get_preds()[0], plain.get_preds()[0])

@pytest.mark.parametrize('cb', CBS)
def test_same_seed_same_weights(dls, cb):
    a,b = (weights(quiet(learner(tensors(), CBS[cb]()), 2)) for _ in range(2))
    assert torch.equal(a, b)

@pytest.mark.parametrize('bs', [1, 2, 3])
@pytest.mark.parametrize('cb', ['mixup', 'cutmix', 'pgd', 'aom', 'iat'])
def test_batches_of_one_and_odd_last_batches_train(cb, bs):
    x,y = torch.rand(7,1,8,8),torch.arange(7)
    dls = tensor_dls(x, y, x, y, x, y, bs=bs, vocab=range(10))
    dls.train.drop_last = False
    learn = learner(dls, CBS[cb](), model=nn.Sequential(nn.Flatten(), nn.Linear(64,10)))   # no batch norm, which needs two
    before = weights(learn)
    quiet(learn)
    assert torch.isfinite(weights(learn)).all() and not torch.equal(before, weights(learn))

LOSSES = dict(flat=CrossEntropyLossFlat(), ce=nn.CrossEntropyLoss(), functional=F.cross_entropy, smooth=LabelSmoothingCrossEntropyFlat(), focal=FocalLossFlat(),
              weighted=nn.CrossEntropyLoss(weight=torch.linspace(1,5,10)), torch_smooth=nn.CrossEntropyLoss(label_smoothing=.1), margin=nn.MultiMarginLoss())

@pytest.mark.parametrize('cb', ['mixup', 'pgd', 'iat', 'adautomix'])
@pytest.mark.parametrize('loss', LOSSES)
def test_any_loss(dls, loss, cb): assert torch.isfinite(weights(quiet(learner(dls, CBS[cb](), loss=LOSSES[loss])))).all()

def test_soft_target_losses_and_the_error_without_them(dls):
    def soft_only(p, t): return -(t*p.log_softmax(1)).sum(1).mean()
    class OneHot(Callback):
        "A user whose labels are soft from the start"
        order = -5
        def before_batch(self): self.learn.yb = (F.one_hot(self.y.as_subclass(torch.Tensor), 10).float(),)
    set_seed(0)
    learn = Learner(dls, net(), loss_func=soft_only, cbs=[MixCallback(MixUp()), OneHot()])
    quiet(learn)
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    with pytest.raises(ValueError, match='does not take soft targets'):
        quiet(learner(dls, MixCallback(MixUp(), loss_mode='soft'), loss=CrossEntropyLossFlat()))

def test_two_mixers_are_refused(dls):
    with pytest.raises(ValueError, match='AOMCallback and MixCallback|MixCallback and AOMCallback'): quiet(learner(dls, CBS['mixup'](), CBS['aom']()))
    with pytest.raises(ValueError, match='MixCallback and CutMix'): quiet(learner(dls, CBS['mixup'](), FastaiCutMix()))

def test_bad_images_are_named(dls):
    bad = copy.deepcopy(dls)
    bad.train.after_batch.add(Transform(lambda x: x*255 if x.is_floating_point() else x))
    with pytest.raises(ValueError, match=r'not in \[0,1\]'): quiet(learner(bad, CBS['mixup']()))

@pytest.mark.parametrize('kw', [dict(p=-1), dict(start=2), dict(stop=-.1)])
def test_fractions(kw):
    with pytest.raises(ValueError, match=r'outside \[0,1\]'): MixCallback(MixUp(), **kw)

def test_kl_with_another_loss_is_refused_before_training(dls):
    with pytest.raises(ValueError, match="ratio='ce'"): quiet(learner(dls, AOMCallback(ratio='kl'), loss=FocalLossFlat()))

class Seen(Callback):
    order,run_valid = 8,False
    def before_fit(self): self.xs = []
    def before_batch(self): self.xs.append(self.x.as_subclass(torch.Tensor).clone())

@pytest.mark.parametrize('cb', ['pgd', 'aom', 'iat'])
def test_normalised_loaders_give_the_same_pixels(cb):
    "8/255 stays 8/255 of a pixel: float32 rounding is all that differs"
    mean,std = [.3],[.35]
    def pixels(normalised):
        dls,model = tensors(),get_model('convnet', 10, c_in=1, size=8, mean=mean, std=std)
        if normalised:
            dls.add_tfms([Normalize.from_stats(mean, std, cuda=False)], 'after_batch')
            model[0] = nn.Identity()
        return model,dls
    res = []
    for normalised in (False, True):
        set_seed(0, reproducible=True)
        model,dls = pixels(normalised)
        learn = learner(dls, {'pgd': PGDCallback(eps=8/255, steps=2), 'aom': AOMCallback(eps=8/255, steps=2), 'iat': IATCallback(eps=8/255, steps=2)}[cb], model=model)
        quiet(learn, lr=0., cbs=ShortEpochCallback(.2))
        res.append(learn.cbs.filter(lambda c: isinstance(c, MixCallback))[0].terms[-1][1].x)
    assert (res[0]-res[1]).abs().max()<=1e-6

def test_epsilon_is_in_pixels_on_a_normalised_loader():
    dls = tensors()
    dls.add_tfms([Normalize.from_stats([.3], [.2], cuda=False)], 'after_batch')
    class Before(Callback):
        order,run_valid = 4,False
        def before_batch(self): self.x0 = self.x.as_subclass(torch.Tensor).clone()
    class After(Callback):
        order,run_valid = 8,False
        def before_batch(self): self.far = (self.x.as_subclass(torch.Tensor)-self.learn.before.x0).abs().max().item()*.2
    learn = learner(dls, PGDCallback(eps=8/255, step=8/255, steps=3), Before(), After())
    quiet(learn)
    assert 7.9/255<learn.after.far<=8/255+1e-6

def test_gradient_accumulation_divides_the_mixed_loss():
    "Two halves of a batch give the gradient of the whole"
    class Grads(Callback):
        order = 20
        def before_step(self): self.g = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]).clone()
    x,y = digits_dls(bs=32).train.one_batch()
    half_half = lambda x, y, model=None: MixUpFixed(x)
    def MixUpFixed(x):
        n = len(x)
        idx,w = torch.stack([torch.arange(n), torch.arange(n)], 1),torch.tensor([[.7,.3]]).expand(n,2)
        return Mixed(x*.5, idx, w)
    def grads(bs, *cbs):
        dls = tensor_dls(x, y, x[:4], y[:4], x[:4], y[:4], bs=bs, vocab=range(10))
        dls.train.shuffle = False
        torch.manual_seed(0)
        learn = learner(dls, MixCallback(half_half), Grads(), *cbs, model=nn.Sequential(nn.Flatten(), nn.Linear(64,10)))
        quiet(learn, lr=0.)
        return learn.grads.g
    assert torch.allclose(grads(32), grads(16, GradientAccumulation(32)), atol=1e-6)

@pytest.mark.parametrize('cb', ['mixup', 'aom', 'iat'])
def test_with_the_usual_company(dls, cb, tmp_path):
    learn = learner(dls, CBS[cb](), EMACallback(), GradientClip(1.), SaveModelCallback(monitor='accuracy_ema'), EarlyStoppingCallback(patience=5), CSVLogger(), path=tmp_path, model_dir='.')
    quiet(learn, 2, 1e-3, method='fit_one_cycle')
    assert (tmp_path/'history.csv').exists() and 'accuracy_ema' in (tmp_path/'history.csv').read_text()

def test_fine_tune_lr_find_and_precision(dls, tmp_path):
    learn = learner(dls, CBS['aom'](), EMACallback(), path=tmp_path)
    w,ema = weights(learn),learn.ema.average
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert torch.equal(w, weights(learn)) and learn.ema.average is ema is None
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1)
    before = copy.deepcopy(learn.ema.average.state_dict())
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(a, b) for a,b in zip(before.values(), learn.ema.average.state_dict().values()))
    quiet(learn.to_fp16())
    quiet(learn.to_fp32().to_bf16())
    assert torch.isfinite(weights(learn)).all()

def test_vision_learner(dls):
    "A torchvision body with fastai's head and Normalize in the loaders, frozen first"
    from fastai.vision.all import resnet18, vision_learner
    x,y = torch.rand(8,3,32,32),torch.arange(8)%2
    dls = tensor_dls(x, y, x, y, x, y, bs=4, vocab=['a','b'])
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=PGDCallback(steps=1))
    dls.add_tfms([Normalize.from_stats([.5]*3, [.2]*3, cuda=False)], 'after_batch')
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert (learn.pgd.mixed.x.min()>=0) and (learn.pgd.mixed.x.max()<=1)

def test_ema_is_the_closed_form(dls):
    "Ten steps of SGD, the average recomputed from the weights a probe wrote down"
    class Trace(Callback):
        order,run_valid = 6,False
        def before_fit(self): self.ws = []
        def after_step(self): self.ws.append(weights(self.learn).double())
    learn = quiet(learner(dls, EMACallback(.9), Trace()), 2)
    avg = learn.trace.ws[0]
    for w in learn.trace.ws[1:]: avg = .9*avg+.1*w
    got = torch.cat([p.flatten() for p in learn.ema.average.module.parameters()])
    assert torch.allclose(got.double(), avg, atol=1e-6)

def test_ema_average_instead_of_the_student(dls):
    learn = quiet(learner(dls, EMACallback(.5, validate='average')), 2)
    avg = Learner(dls, learn.ema.average.module, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert learn.validate()==avg.validate()
    assert [m.name for m in learn.metrics]==['accuracy']

def test_ema_columns_are_the_averages(dls):
    learn = quiet(learner(dls, EMACallback(.5)), 2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','accuracy_ema','time']
    avg = Learner(dls, learn.ema.average.module, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert learn.validate()[-1]==avg.validate()[-1]
    quiet(learn)
    assert len(learn.metrics)==2   # a second fit adds no second column

def test_saved_with_the_learner_and_plain_files_load(dls, tmp_path):
    learn = quiet(learner(dls, EMACallback(), path=tmp_path))
    learn.save('full')
    new = learner(dls, EMACallback(), path=tmp_path, seed=1).load('full')
    assert all(torch.equal(a, b) for a,b in zip(learn.ema.average.parameters(), new.ema.average.parameters()))
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
            if self.epoch==0: self.kept = copy.deepcopy(self.learn.ema.average.state_dict())
    class Worse(Callback):
        "Make the first epoch the best one"
        order = 51
        def after_epoch(self): self.recorder.values[-1] = [0., float(self.epoch), 0., 0.]
    learn = learner(dls, EMACallback(), SaveModelCallback(monitor='valid_loss'), Best(), Worse(), path=tmp_path)
    quiet(learn, 3)
    assert all(torch.equal(a, b) for a,b in zip(learn.best.kept.values(), learn.ema.average.state_dict().values()))

@pytest.mark.parametrize('cb', ['mixup', 'aom', 'ema', 'adautomix'])
def test_export_and_predict(dls, cb, tmp_path):
    d = digits_dls(bs=64)
    learn = learner(d, CBS[cb](), path=tmp_path)
    quiet(learn, cbs=ShortEpochCallback(.1))
    learn.export('m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    x = d[2].one_batch()[0][0].as_subclass(torch.Tensor)
    with loaded.no_bar(): got = loaded.predict(x)[2]
    with learn.no_bar(): want = learn.predict(x)[2]
    assert torch.allclose(got, want, atol=1e-6) and (tmp_path/'m.pkl').stat().st_size<3e6

def test_deepcopy_of_the_model_leaves_the_learner_behind(dls):
    learn = quiet(learner(dls, EMACallback()))
    c = copy.deepcopy(learn.model)
    assert not [k for k in c.state_dict() if 'advmix' in k] and [k for k in learn.model.state_dict() if 'advmix' in k]

def test_mixed_accuracy_on_known_predictions(dls):
    m,learn = MixedAccuracy(),learner(dls, CBS['mixup']())
    learn.mix.terms = [(1., Mixed(None, torch.tensor([[0,1],[1,0]]), torch.tensor([[.7,.3],[.6,.4]])))]
    learn.yb,learn.pred,learn.training = (torch.tensor([3,5]),),torch.eye(10)[[5,5]],True
    m.reset()
    m.accumulate(learn)
    assert abs(m.value-(.3+.6)/2)<1e-6

def test_two_processes_agree_and_draw_differently(tmp_path):
    "A real two-process run with gloo: equal weights, an equal average, different ratios"
    script = tmp_path/'two.py'
    script.write_text(textwrap.dedent('''
        import os, sys, torch
        os.environ.update(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
        torch.set_num_threads(1)
        from fastai.vision.all import *
        import fastai.distributed as fd
        from fastai.distributed import *
        from advmix.callbacks import *
        from advmix.data import *
        from advmix.mix import MixUp
        from advmix.models import get_model
        def broadcast(self, t, rank):
            "fastai's calls .cuda()"
            t = torch.tensor(list(t))
            torch.distributed.broadcast(t, rank)
            return t.tolist()
        DistributedDL._broadcast = broadcast
        class Lams(Callback):
            order,run_valid = 6,False
            def before_fit(self): self.lams = []
            def after_loss(self):
                m = self.learn.cbs.filter(lambda c: isinstance(c, MixCallback))[0].mixed
                self.lams.append(None if m is None else m.w[0,0].item())
        res = {}
        for name,cbs in dict(mix=[MixCallback(MixUp()), EMACallback()], game=[AdAutoMixCallback(p=.7)]).items():
            set_seed(rank_distrib())   # different beginnings must not matter
            learn = Learner(digits_dls(bs=64), get_model('convnet', 10, c_in=1, size=8), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[*cbs, Lams()])
            with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
            flat = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()])
            game = getattr(learn, 'ad_auto_mix', None)
            res[name] = dict(w=flat(learn.model), ema=flat(game.teacher if game else learn.ema.average.module), gen=flat(game.game.generator) if game else torch.zeros(1), lams=learn.lams.lams)
        torch.save(res, sys.argv[1]+f'/rank{rank_distrib()}.pt')
    '''))
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', str(script), str(tmp_path)], capture_output=True, text=True,
                       cwd=Path(__file__).resolve().parents[1], env=os.environ|dict(PYTHONPATH=str(Path(__file__).resolve().parents[1])), timeout=300)
    assert r.returncode==0, r.stderr[-4000:]
    a,b = (torch.load(tmp_path/f'rank{i}.pt') for i in (0,1))
    for k in a:
        for t in ('w','ema','gen'): assert torch.equal(a[k][t], b[k][t]), (k, t)
        assert a[k]['lams']!=b[k]['lams']

# the game

def game(learn): return learn.cbs.filter(lambda c: isinstance(c, GameCallback))[0].game
def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])

@pytest.mark.parametrize('cb', ['automix','adautomix','released'])
def test_both_players_and_the_teacher_move(dls, cb):
    learn = learner(dls, CBS[cb]())
    w = weights(learn)
    quiet(learn, lr=0.)   # builds the game; nobody learns at rate 0
    g,t = flat(game(learn).generator),flat(game(learn).teacher)
    assert torch.equal(w, weights(learn)) and torch.equal(t, w)
    quiet(learn, 2)
    assert not torch.equal(g, flat(game(learn).generator)) and not torch.equal(t, flat(game(learn).teacher)) and not torch.equal(w, weights(learn))
    assert not torch.equal(flat(game(learn).teacher), weights(learn))
    assert all(torch.isfinite(t).all() for t in (weights(learn), flat(game(learn).teacher), flat(game(learn).generator)))

def test_the_loop_plays_what_minmax_plays():
    "fastai's loop with the callback, and MinMax.step by hand, from the same state over the same batches: the same weights"
    from advmix.generator import AdAutoMixGenerator
    from advmix.minmax import MinMax
    d = digits_dls(bs=32)
    x,y = d.train.one_batch()
    one = tensor_dls(x, y, x[:4], y[:4], x[:4], y[:4], bs=32, vocab=range(10))
    class Start(Callback):
        order,run_valid = 4,False
        def before_batch(self):
            "After the game was built: keep a copy of everybody, then fix the draws"
            self.copies = copy.deepcopy(self.learn.model),copy.deepcopy(self.learn.ad_auto_mix.game.generator),*(t.as_subclass(torch.Tensor) for t in (self.x, self.y))
            torch.manual_seed(5)
    learn = learner(one, AdAutoMixCallback(), Start(), opt_func=lambda ps, lr, **kw: SGD(ps, lr=lr))
    quiet(learn, lr=.1)
    net,gen,x,y = learn.start.copies
    net.train()
    g = MinMax(net, gen, opt=torch.optim.SGD(net.parameters(), .1, weight_decay=0), gen_opt=torch.optim.Adam(gen.parameters(), 1e-2), c=.3, n_steps=1)
    torch.manual_seed(5)
    g.step(x, y)
    assert torch.allclose(flat(net), weights(learn), atol=1e-6) and torch.allclose(flat(gen), flat(game(learn).generator), atol=1e-6)

@pytest.mark.parametrize('cb', ['automix','adautomix','released'])
def test_game_saved_loaded_and_plain_files(dls, cb, tmp_path):
    learn = quiet(learner(dls, CBS[cb](), path=tmp_path), 2)
    learn.save('g')
    new = learner(dls, CBS[cb](), path=tmp_path, seed=1).load('g')
    for a,b in zip((game(learn).generator, game(learn).teacher), (game(new).generator, game(new).teacher)): assert torch.equal(flat(a), flat(b))
    assert game(new).k==game(learn).k
    plain = learner(dls, path=tmp_path)
    plain.load('g', strict=False)
    plain.save('c')
    k = game(new).k
    assert game(new.load('c')).k==k and torch.equal(weights(new), weights(learn))

def test_a_different_generator_is_refused(dls, tmp_path):
    quiet(learner(dls, CBS['adautomix'](), path=tmp_path)).save('g')
    for cb in (AdAutoMixCallback(stage=0), AdAutoMixCallback(lam_plane=False)):
        with pytest.raises(ValueError, match='saved generator'): learner(dls, cb, path=tmp_path).load('g')

def test_lr_find_rolls_the_game_back(dls, tmp_path):
    learn = quiet(learner(dls, CBS['released'](), path=tmp_path))
    keep = [flat(game(learn).generator), flat(game(learn).teacher), game(learn).k]
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert torch.equal(keep[0], flat(game(learn).generator)) and torch.equal(keep[1], flat(game(learn).teacher)) and keep[2]==game(learn).k

@pytest.mark.parametrize('kw,says', [(dict(alpha=2), r'outside \[0,1\]'), (dict(beta=-.1), r'outside \[0,1\]'), (dict(objective='paper'), 'poster'), (dict(stage=9), 'stage 9 not found.*stage1'),
                                     (dict(stage='conv7'), "'conv7' not found"), (dict(n_mix=17), 'more than the 16 images'), (dict(n_mix=1), 'two images'), (dict(gen_every=0), 'gen_every')])
def test_bad_game_settings_fail_before_training(dls, kw, says):
    class Never(Callback):
        order = 4
        def before_train(self): raise AssertionError('training began')
    with pytest.raises(ValueError, match=says): quiet(learner(dls, AdAutoMixCallback(**kw), Never()))

def test_a_model_without_a_map_is_refused(dls):
    with pytest.raises(ValueError): quiet(learner(dls, AdAutoMixCallback(), model=nn.Sequential(nn.Flatten(), nn.Linear(64,10))))

def test_columns_and_plot(dls):
    learn = quiet(learner(dls, CBS['adautomix']()), 2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','accuracy_ema','amce','mce','ace','amce_teacher','cosine','mask_entropy','time']
    assert all(v is not None for v in learn.recorder.values[-1]) and len(learn.ad_auto_mix.plot_game())==2
    assert learn.validate()[1]==Learner(dls, game(learn).teacher, loss_func=CrossEntropyLossFlat(), metrics=accuracy).validate()[1] or learn.validate()[2]>=0

def test_the_game_in_company(dls, tmp_path):
    learn = learner(dls, CBS['adautomix'](), GradientAccumulation(32), GradientClip(1.), SaveModelCallback(), CSVLogger(), path=tmp_path, model_dir='.')
    quiet(learn, 2, 1e-3, method='fit_one_cycle')
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1)
    quiet(learn.to_fp16())
    quiet(learn.to_bf16())
    assert torch.isfinite(weights(learn)).all()

def test_gradient_accumulation_withholds_the_generators_step(dls):
    learn = learner(dls, CBS['adautomix'](), GradientAccumulation(64))
    quiet(learn)
    n = len(dls.train)
    assert game(learn).k==n*16//64

def test_normalised_loaders_show_pixels():
    dls = tensors()
    dls.add_tfms([Normalize.from_stats([.3], [.2], cuda=False)], 'after_batch')
    learn = quiet(learner(dls, CBS['adautomix']()))
    m = learn.ad_auto_mix.mixed
    assert m.x.min()>=-1e-5 and m.x.max()<=1+1e-5
    learn.show_mix(2)
