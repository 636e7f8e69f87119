"What test_distributed.py runs in one process, and by torchrun in two: the same fixed batch, whole or in halves"
import os, sys, types
os.environ.update(OMP_NUM_THREADS='1')
import torch
from torch import nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.distributed import DistributedDL, rank_distrib
from advmix.aom import AOM
from advmix.attack import PGD
from advmix.callbacks import AdAutoMixCallback, EMACallback, MixCallback
from advmix.data import digits_dls
from advmix.iat import IAT
from advmix.minmax import MinMax
from advmix.mix import Mixed, MixUp, as_terms, with_loss
from advmix.models import get_model

class PerRank:
    "Each rank's part of a batch, mixed with that rank's seed: in one process one part after the other"
    def __init__(self, mixer, ranks): self.mixer,self.ranks = mixer,ranks
    def with_loss(self, loss): return PerRank(with_loss(self.mixer, loss), self.ranks)
    def __call__(self, x, y, model=None):
        parts = []
        for r,xs,ys in zip(self.ranks, x.chunk(len(self.ranks)), y.chunk(len(self.ranks))):
            torch.manual_seed(100+r)
            parts.append(as_terms(self.mixer(xs, ys, model)))
        n = len(x)//len(self.ranks)
        def join(ms):
            mask = None if ms[0].mask is None else torch.cat([m.mask for m in ms])
            return Mixed(torch.cat([m.x for m in ms]), torch.cat([m.idx+i*n for i,m in enumerate(ms)]), torch.cat([m.w for m in ms]), mask)
        return [(terms[0][0], join([m for _,m in terms])) for terms in zip(*parts)]

class Fixed(Callback):
    "The same 16 images for everybody, or this rank's half of them; equal generators, draws by rank; gradients as they are stepped with"
    order,run_valid = -6,False
    def __init__(self, ranks): self.ranks,self.grads = ranks,None
    def before_batch(self):
        x,y = FIXED
        half = slice(None) if len(self.ranks)>1 else slice(8*self.ranks[0], 8*self.ranks[0]+8)
        self.learn.xb,self.learn.yb = (x[half],),(y[half],)
        game = getattr(getattr(self.learn, 'ad_auto_mix', None), 'game', None)
        if game is not None and self.iter==0: self.prepare(game.generator)
    def prepare(self, gen):
        torch.manual_seed(7)
        for p in gen.parameters(): p.data.normal_().mul_(.3)
        draw = gen.draw
        def by_rank(x, n=None):
            idx,lam,m = [],[],len(x)//len(self.ranks)
            for i,r in enumerate(self.ranks):
                torch.manual_seed(200+r)
                a,b = draw(x[:m], n)
                idx.append(a+i*m)
                lam.append(b)
            return torch.cat(idx),torch.cat(lam)
        gen.draw = by_rank
    def before_step(self):
        if self.grads is None: self.grads = [p.grad.clone() for p in self.learn.model.parameters()]

FIXED = (torch.rand(16,1,8,8, generator=torch.Generator().manual_seed(3)), torch.arange(16)%10)

def plain_net():
    "No batch norm, whose statistics would be those of half the batch"
    convs = [m for n in (1,8,8) for m in (nn.Conv2d(n, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(512, 10))

def methods(ranks):
    return dict(mixup=lambda: [MixCallback(PerRank(MixUp(), ranks))], pgd=lambda: [MixCallback(PerRank(PGD(.1, steps=2), ranks))],
                aom=lambda: [MixCallback(PerRank(AOM(.1, steps=2, ratio='kl'), ranks))],
                iat=lambda: [MixCallback(PerRank(IAT(.1, steps=2), ranks))],
                adautomix=lambda: [AdAutoMixCallback(), EMACallback(.9)])

def first_gradients(ranks, context):
    "Gradients of the first step of each method, the generator's too, and where the average is after it"
    res,step = {},MinMax.gen_step
    for name,cbs in methods(ranks).items():
        set_seed(0)
        learn = Learner(digits_dls(bs=512), plain_net(), loss_func=CrossEntropyLossFlat(), cbs=[*cbs(), Fixed(ranks)])
        gen = []
        def gen_step(self, scaler=None):
            if not gen: gen.extend(p.grad.clone() for p in self.generator.parameters())
            return step(self, scaler)
        MinMax.gen_step = gen_step
        with context(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        MinMax.gen_step = step
        res[name] = [*learn.fixed.grads, *gen]
    return res

def everything(m): return torch.cat([t.detach().flatten().float() for t in (*m.parameters(), *m.buffers())])

class Ratios(Callback):
    order,run_valid = 6,False
    def before_fit(self): self.lams = []
    def after_loss(self):
        m = next(c for c in self.learn.cbs if isinstance(c, MixCallback)).mixed
        self.lams.append(None if m is None else m.w[0,0].item())

def trained(context):
    "Networks and companions, parameters and buffers, after an epoch from different beginnings"
    res = {}
    for name,cbs in dict(mix=[MixCallback(MixUp()), EMACallback()], game=[AdAutoMixCallback(p=.7)]).items():
        set_seed(rank_distrib())
        net = get_model('convnet', 10, c_in=1, size=8)
        learn = Learner(digits_dls(bs=128), net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[*cbs, Ratios()])
        with context(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        game = getattr(learn, 'ad_auto_mix', None)
        res[name] = dict(w=torch.cat([p.detach().flatten() for p in learn.model.parameters()]), lams=learn.ratios.lams,
                         companion=everything(game.teacher if game else learn.ema.average.net),
                         gen=everything(game.game.generator) if game else torch.zeros(1))
    return res

class Fails(Callback):
    order = 6
    def after_loss(self):
        if rank_distrib()==1: raise RuntimeError('rank one fails here')

if __name__=='__main__':
    os.environ.update(ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    def broadcast(self, t, rank):
        "fastai's calls .cuda()"
        t = torch.tensor(list(t))
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    def context(learn): return learn.distrib_ctx(sync_bn=False, cpu=True)
    torch.save(dict(trained=trained(context), grads=first_gradients([rank_distrib()], context)), f'{sys.argv[1]}/rank{rank_distrib()}.pt')
    learn = Learner(digits_dls(bs=128), plain_net(), loss_func=CrossEntropyLossFlat(), cbs=[AdAutoMixCallback(), Fails()])
    with context(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
