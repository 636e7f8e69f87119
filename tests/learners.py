"Tiny Learners for the tests of callbacks"
import pytest, torch
from torch import nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, Normalize, accuracy, set_seed
from advmix.callbacks import (AdAutoMixCallback, AOMCallback, AutoMixCallback, EMACallback, IATCallback, MixCallback, PGDCallback)
from advmix.data import digits_dls, tensor_dls
from advmix.manifold import ManifoldMix
from advmix.mix import CutMix, MixUp
from advmix.models import get_model

def tensors(n=70, bs=16, **kw):
    "A few real digits; 70 = 4*16 + an odd rest"
    x,y = digits_dls(bs=n).train.one_batch()
    return tensor_dls(x[:n].clone(), y[:n].clone(), x[:20], y[:20], x[:10], y[:10], bs=bs, vocab=range(10), **kw)

def normalised(dls, mean=.3, std=.2):
    dls.add_tfms([Normalize.from_stats([mean], [std], cuda=False)], 'after_batch')
    return dls

def net(n=10): return get_model('convnet', n, c_in=1, size=8)
def linear(n=10): return nn.Sequential(nn.Flatten(), nn.Linear(64, n))   # no batch norm, which needs two

def learner(dls, *cbs, loss=None, seed=0, model=None, metrics=accuracy, **kw):
    set_seed(seed, reproducible=True)
    return Learner(dls, model or net(), loss_func=loss or CrossEntropyLossFlat(), metrics=metrics, cbs=list(cbs), **kw)

def quiet(learn, n=1, lr=1e-3, cbs=None, method='fit', **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(n, lr, cbs=cbs, **kw)
    return learn

def lr_find(learn):
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)

def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])
def weights(learn): return flat(learn.model)
def game(learn): return next(c for c in learn.cbs if hasattr(type(c), 'plot_game')).game
def names(learn): return [m.name for m in learn.metrics]

CBS = dict(
    mixup      = lambda: MixCallback(MixUp()),
    cutmix     = lambda: MixCallback(CutMix(per_sample=True)),
    clean_too  = lambda: MixCallback('mixup', c_clean=1.),
    several    = lambda: MixCallback([('cutmix', .5), 'fmix'], p=.8),
    manifold   = lambda: MixCallback(ManifoldMix(layers=(0,1))),
    pgd        = lambda: PGDCallback(eps=.1, steps=2),
    aom        = lambda: AOMCallback(eps=.1, steps=2, ratio='kl'),
    aom_cutmix = lambda: AOMCallback(eps=.1, steps=2, mixer=CutMix(), c_clean=.5),
    iat        = lambda: IATCallback(eps=.1, steps=2),
    ema        = lambda: EMACallback(),
    automix    = lambda: AutoMixCallback(),
    adautomix  = lambda: AdAutoMixCallback(),
    released   = lambda: AdAutoMixCallback(objective='released'))
GAMES = ['automix','adautomix','released']
MIXING = [k for k in CBS if k!='ema']
PLAIN = [k for k in MIXING if k not in GAMES]

EVENTS = '''before_fit before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch
            after_train before_validate after_validate after_epoch after_fit'''.split()

class Bomb(Callback):
    "Something that goes wrong at one event, after our callbacks had their turn"
    order = 6
    def __init__(self, event, error=KeyboardInterrupt): self.event,self.error = event,error
    def __call__(self, event):
        if event==self.event: raise self.error('stop')

class Probe(Callback):
    "What the model is shown, and the loss that is differentiated"
    order,run_valid = 8,False
    def before_fit(self): self.xs,self.losses = [],[]
    def before_batch(self): self.xs.append(self.x.as_subclass(torch.Tensor).clone())
    def after_loss(self): self.losses.append(self.learn.loss_grad.detach().clone())
