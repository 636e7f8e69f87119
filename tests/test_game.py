"The game in the loop: both players move, it plays what MinMax plays, and it travels with the Learner"
import copy, inspect
import pytest, torch
from torch import nn
from fastai.vision.all import CSVLogger, Callback, GradientAccumulation, GradientClip, SGD, SaveModelCallback
from advmix.callbacks import *
from advmix.data import digits_dls, tensor_dls
from advmix.ema import Average
from advmix.generator import AdAutoMixGenerator, AutoMixGenerator
from advmix.minmax import MinMax
from learners import *

@pytest.fixture(scope='module')
def dls(): return tensors()

@pytest.mark.parametrize('cb', GAMES)
def test_both_players_and_the_teacher_move(dls, cb):
    learn = learner(dls, CBS[cb]())
    w = weights(learn)
    quiet(learn, lr=0.)   # builds the game; nobody learns at rate 0
    g,t = flat(game(learn).generator),flat(game(learn).teacher)
    assert torch.equal(w, weights(learn)) and torch.equal(t, w)
    quiet(learn, 2)
    now = flat(game(learn).generator),flat(game(learn).teacher),weights(learn)
    assert not any(torch.equal(a, b) for a,b in zip((g, t, w), now)) and not torch.equal(now[1], now[2])
    assert all(torch.isfinite(t).all() for t in now)

def test_the_loop_plays_what_minmax_plays():
    "fastai's loop with the callback, and MinMax.step by hand, from the same state over the same batches: the same weights"
    x,y = digits_dls(bs=32).train.one_batch()
    one = tensor_dls(x, y, x[:4], y[:4], x[:4], y[:4], bs=32, vocab=range(10))
    class Start(Callback):
        order,run_valid = 4,False
        def before_batch(self):
            "After the game was built: keep a copy of everybody, then fix the draws"
            parts = self.learn.model,self.learn.ad_auto_mix.game.generator
            self.copies = *map(copy.deepcopy, parts),*(t.as_subclass(torch.Tensor) for t in (self.x, self.y))
            torch.manual_seed(5)
    learn = learner(one, AdAutoMixCallback(), Start(), opt_func=lambda ps, lr, **kw: SGD(ps, lr=lr))
    quiet(learn, lr=.1)
    net,gen,x,y = learn.start.copies
    net.train()
    g = MinMax(net, gen, opt=torch.optim.SGD(net.parameters(), .1, weight_decay=0), gen_opt=torch.optim.Adam(gen.parameters(), 1e-2),
               teacher=Average(net, n_steps=1))
    torch.manual_seed(5)
    g.step(x, y)
    assert torch.allclose(flat(net), weights(learn), atol=1e-6) and torch.allclose(flat(gen), flat(game(learn).generator), atol=1e-6)

@pytest.mark.parametrize('cb', GAMES)
def test_saved_loaded_and_plain_files(dls, cb, tmp_path):
    learn = quiet(learner(dls, CBS[cb](), path=tmp_path), 2)
    learn.save('g')
    new = learner(dls, CBS[cb](), path=tmp_path, seed=1).load('g')
    for part in ('generator', 'teacher'): assert torch.equal(*(flat(getattr(game(l), part)) for l in (learn, new)))
    means = (next(c for c in l.cbs if isinstance(c, GameCallback)).means for l in (learn, new))
    assert game(new).k==game(learn).k and all(abs(a[k]-b[k])<1e-5 for a,b in zip(*means) for k in a)
    keys = [list(l.model.state_dict()) for l in (learn, new)]
    assert keys[0]==keys[1]
    terms = [k.rpartition('.')[2] for k in keys[0] if '.means.' in k]
    assert terms==list(next(c for c in learn.cbs if isinstance(c, GameCallback)).means[0])   # not in the order of a set
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
    for _ in range(2): lr_find(learn)
    assert torch.equal(keep[0], flat(game(learn).generator)) and torch.equal(keep[1], flat(game(learn).teacher)) and keep[2]==game(learn).k

WRONG = [(dict(linear_weight=2), r'outside \[0,1\]'), (dict(beta=-.1), r'outside \[0,1\]'), (dict(objective='paper'), 'balanced'),
         (dict(n_mix=1), 'two images'), (dict(gen_every=0), 'gen_every'), (dict(alpha=0), 'alpha'), (dict(decay=2), 'decay'),
         (dict(objective='released', c=.5), 'c'), (dict(p=3), r'outside \[0,1\]')]
@pytest.mark.parametrize('kw,says', WRONG)
def test_wrong_settings_fail_in_the_constructor(kw, says):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=says): AdAutoMixCallback(**kw)
    AdAutoMixCallback(), AutoMixCallback()
    assert torch.equal(state, torch.get_rng_state())   # a trial draws nothing
    with pytest.raises(TypeError): AdAutoMixCallback(sharpness=1)

class Never(Callback):
    order = 4
    def before_train(self): raise AssertionError('training began')

@pytest.mark.parametrize('kw,says', [(dict(stage=9), 'stage 9 not found.*stage1'), (dict(stage='conv7'), "'conv7' not found"),
                                     (dict(n_mix=17), 'more than the 16 images')])
def test_what_does_not_fit_the_model_fails_before_training(dls, kw, says):
    with pytest.raises(ValueError, match=says): quiet(learner(dls, AdAutoMixCallback(**kw), Never()))

def test_a_model_without_a_map_is_refused(dls):
    with pytest.raises(ValueError): quiet(learner(dls, AdAutoMixCallback(), model=linear()))

@pytest.mark.parametrize('cb,gen', [(AdAutoMixCallback, AdAutoMixGenerator), (AutoMixCallback, AutoMixGenerator)])
def test_defaults_are_those_of_the_parts(cb, gen):
    mine = inspect.signature(cb).parameters
    for part in (gen, MinMax, Average, MixCallback):
        for k,v in inspect.signature(part).parameters.items():
            if k in mine: assert mine[k].default==v.default, k
    assert {'alpha','stage','linear_weight','gen_every','decay','final','hold','p','loss_mode'} <= set(mine)
    assert all(v.kind==v.KEYWORD_ONLY for v in mine.values())

def test_settings_reach_their_part(dls):
    kw = dict(alpha=.7, relu=True, n_mix=2, per_sample=True, lam_margin=.1)
    g = game(quiet(learner(dls, AdAutoMixCallback(**kw, c=.5, linear_weight=.2, decay=.9, final=.99))))
    assert g.generator.alpha==.7 and g.generator.n_mix==(2,) and g.generator.lam_margin==.1
    assert g.c==.5 and g.linear_weight==.2 and g.teacher.momentum(0)==.9

def test_at_most_three_ancestors():
    ours = [c for c in AdAutoMixCallback.__mro__[1:] if c.__module__.startswith('advmix')]
    assert [c.__name__ for c in ours]==['GameCallback','MixCallback']

COLUMNS = dict(adautomix='amce mce ace amce_teacher cosine', released='amce mce ace amce_teacher cosine',
               automix='amce ace amce_teacher share')
@pytest.mark.parametrize('cb', COLUMNS)
def test_columns_and_plot(dls, cb):
    learn = quiet(learner(dls, CBS[cb]()), 2)
    want = ['epoch','train_loss','valid_loss','accuracy','accuracy_ema',*COLUMNS[cb].split(),'mask_entropy','slope','time']
    assert list(learn.recorder.metric_names)==want
    assert all(v is not None for v in learn.recorder.values[-1])
    assert len(next(c for c in learn.cbs if isinstance(c, GameCallback)).plot_game())==2

@pytest.mark.parametrize('per_sample', [True, False])
def test_the_slope_is_that_of_all_mixtures_of_an_epoch(dls, per_sample):
    "One line through the shares of every image of every batch, also where a batch has one set of ratios"
    from advmix.minmax import share_slope
    seen = []
    class See(Callback):
        order,run_valid = 90,False
        def after_batch(self): seen.append((self.learn.ad_auto_mix.mixed.mask.mean((2,3)).detach(), self.learn.ad_auto_mix.mixed.lam))
    learn = quiet(learner(dls, AdAutoMixCallback(per_sample=per_sample, gen_lr=.1), See()), 1, 1e-2)
    share,lam = map(torch.cat, zip(*seen))
    slope = learn.ad_auto_mix.means[-1]['slope']
    assert len(share)==64 and abs(slope-share_slope(share[:,:,None,None], lam))<1e-4 and learn.recorder.values[-1][-1]==slope

def test_equal_ratios_have_no_slope(dls):
    learn = learner(dls, AdAutoMixCallback(n_mix=2))
    class Half(Callback):
        order,run_valid = 4,False
        def before_batch(self): self.learn.ad_auto_mix.game.generator.draw = lambda x, n=None: (
            torch.stack([torch.arange(len(x)), torch.randperm(len(x))], 1), torch.full((len(x),2), .5))
    quiet(learn, cbs=Half())
    assert 'slope' not in learn.ad_auto_mix.means[-1] and learn.recorder.values[-1][-1] is None

def test_pairs_have_no_column_that_is_never_computed(dls):
    learn = quiet(learner(dls, AdAutoMixCallback(n_mix=2)))
    assert 'mce' not in names(learn) and 'ace' in names(learn)
    assert 'mce' in names(quiet(learner(dls, AdAutoMixCallback(n_mix=2, linear_weight=.5))))

def test_in_company(dls, tmp_path):
    company = GradientAccumulation(32),GradientClip(1.),SaveModelCallback(),CSVLogger()
    learn = learner(dls, CBS['adautomix'](), *company, path=tmp_path, model_dir='.')
    quiet(learn, 2, 1e-3, method='fit_one_cycle')
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1)
    quiet(learn.to_fp16())
    quiet(learn.to_bf16())
    assert torch.isfinite(weights(learn)).all()

def test_gradient_accumulation_withholds_the_generators_step(dls):
    learn = quiet(learner(dls, CBS['adautomix'](), GradientAccumulation(64)))
    assert game(learn).k==game(learn).teacher.n_steps==len(dls.train)*16//64

@pytest.mark.parametrize('cb', GAMES)
def test_normalised_loaders(cb):
    "Images in pixels, the teacher validated on what the loaders give, and the same columns as from its own Learner"
    from fastai.vision.all import Learner, accuracy, CrossEntropyLossFlat
    dls = normalised(tensors())
    learn = quiet(learner(dls, CBS[cb]()), 2)
    c = next(c for c in learn.cbs if isinstance(c, GameCallback))
    assert c.mixed.x.min()>=-1e-5 and c.mixed.x.max()<=1+1e-5
    learn.show_mix(2)
    avg = Learner(dls, c.teacher, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert dict(zip(names(learn), learn.validate()[1:]))['accuracy_ema']==avg.validate()[1]

def test_the_generators_state_is_plain_numbers(dls):
    "A schedule leaves NumPy numbers, which the safe loader refuses"
    learn = quiet(learner(dls, CBS['adautomix']()), 1, 1e-3, method='fit_one_cycle')
    assert all(type(g['lr']) is float for g in game(learn).gen_opt.param_groups)

@pytest.mark.parametrize('cb,name', [(AdAutoMixCallback, 'adautomix'), (AutoMixCallback, 'automix')])
def test_as_published(dls, cb, name):
    "All settings of the published code at one go, its optimiser too; the rate follows the learner's schedule to that optimiser's"
    from advmix.objectives import PUBLISHED
    learn = quiet(learner(dls, cb(**PUBLISHED[name])), 2)
    opt = game(learn).gen_opt
    assert isinstance(opt, torch.optim.SGD) and abs(opt.param_groups[0]['lr']-.1)<1e-9 and torch.isfinite(flat(game(learn).generator)).all()
    learn = quiet(learner(dls, cb(gen_lr=.05)))
    assert game(learn).gen_opt.param_groups[0]['lr']==.05
    with pytest.raises(ValueError, match='gen_lr'): cb(gen_lr=-1)
