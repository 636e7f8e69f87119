"The watch for catastrophic overfitting, and what attacks of few steps cost"
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, set_seed
from advmix import loop
from advmix.aom import AOM
from advmix.attack import PGD, Threat, fgsm, pgd
from advmix.callbacks import AOMCallback, MixCallback, PGDCallback
from advmix.data import tensor_dls
from advmix.fast import catastrophic
from advmix.iat import IAT
from advmix.mix import as_terms

class Bent(nn.Module):
    "Brighter is worse, but right at grey the gradient says darker: one step from there gets lost"
    def forward(self, x):
        d = (x.flatten(1).mean(1)-.5)/.1   # in radii
        way = torch.where(d.detach().abs()<1e-4, -1., 1.)
        m = .5-(way*d+(d-way*d).detach())
        return torch.stack([m, -m], 1)

class Steady(nn.Module):
    def forward(self, x):
        m = .05-(x.flatten(1).mean(1)-.5)
        return torch.stack([m, -m], 1)

def grey(n=64): return torch.full((n,1,4,4), .5),torch.zeros(n, dtype=torch.long)

def test_a_network_that_resists_single_steps_only_is_named():
    x,y = grey()
    one,ten,says = catastrophic(Bent(), x, y, .1)
    assert one==1 and ten<.1   # a random start may lie in the flat middle
    assert 'catastrophic overfitting' in says and '100%' in says and f'{ten:.0%}' in says and '\n' not in says

def test_a_network_that_falls_to_both_or_to_none_is_not():
    x,y = grey()
    assert catastrophic(Steady(), x, y, .1)==(0.,0.,'') and catastrophic(Steady(), x, y, .02)==(1.,1.,'')
    assert catastrophic(Bent(), x, y, .1, gap=1.)[2]=='' and catastrophic(Bent(), x, y, .1, gap=.9)[2]

def test_it_is_fgsm_and_pgd_with_ten_steps():
    torch.manual_seed(0)
    f,x,y = nn.Sequential(nn.Flatten(), nn.Linear(16,8), nn.Tanh(), nn.Linear(8,3)),torch.rand(64,1,4,4),torch.randint(3, (64,))
    for norm,eps in (('linf',.1), ('l2',.4)):
        torch.manual_seed(1); got = catastrophic(f, x, y, eps, norm=norm)
        torch.manual_seed(1)
        t = Threat(eps, norm=norm)
        want = [(f(z).argmax(1)==y).float().mean().item() for z in (fgsm(f, x, y, t), pgd(f, x, y, t))]
        assert list(got[:2])==want and t.steps==10

def test_nothing_is_disturbed():
    f = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(.5), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16,3)).train()
    f[0].eval()
    x,y = torch.rand(8,1,4,4),torch.randint(3, (8,))
    f(x).sum().backward()
    s,before,grads = torch.get_rng_state(),[v.clone() for v in f.state_dict().values()],[p.grad.clone() for p in f.parameters()]
    got = catastrophic(f, x, y)
    assert torch.equal(torch.get_rng_state(), s) and all(map(torch.equal, before, f.state_dict().values()))
    assert f.training and f[1].training and not f[0].training and all(torch.equal(g, p.grad) for g,p in zip(grads, f.parameters()))
    assert all(isinstance(v, float) for v in got[:2])

@pytest.mark.parametrize('kw,passes', [(dict(steps=1, step=.1, random_start=2., confine=False), 5), (dict(steps=2, step=.06), 7),
                                       (dict(steps=(2,10)), 15), (dict(direction='random'), 3), ({}, 23)], ids=str)
@pytest.mark.parametrize('mixer', [PGD, AOM, IAT])
def test_settings_of_all_and_their_passes(mixer, kw, passes):
    "Forward equivalents of a training step in the middle of a training, counted by torch; IAT trains on two batches"
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.Conv2d(4,8,3), nn.Flatten(), nn.Linear(128,5))
    x,y = torch.rand(4,3,8,8),torch.randint(5, (4,))
    def flops(g):
        with FlopCounterMode(display=False) as c: g()
        return c.get_total_flops()
    def step(m): sum(c*t.loss(F.cross_entropy, f(t.x), y) for c,t in as_terms(m(x, y, f))).backward()
    batches = 2 if mixer is IAT else 1
    F1,first = flops(lambda: f(x)),flops(lambda: f[0](x))   # training needs no gradient of the images
    assert flops(lambda: step(mixer(.1, **kw).at(.5)))==(passes+3*(batches-1))*F1-batches*first

def test_a_wide_start_trains_through_aom_as_through_pgd():
    "With each image its own partner N-FGSM through AOM is N-FGSM"
    from advmix.mix import Mixed, compose
    class Own:
        blend = True
        def __call__(self, x, y=None, model=None):
            idx = torch.arange(len(x))[:,None].expand(-1,2)
            w = torch.tensor([1.,0.]).double().expand(len(x),2)
            mask = w[:,:,None,None].expand(-1,-1,*x.shape[-2:])
            return Mixed(compose(x, idx, mask), idx, w, mask, w)
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(16,8), nn.Tanh(), nn.Linear(8,3)).double()
    x,y = torch.rand(6,1,4,4).double(),torch.randint(3, (6,))
    kw = dict(steps=1, step=.1, random_start=2., confine=False)
    torch.manual_seed(1); a = PGD(.1, **kw)(x, y, f).x
    torch.manual_seed(1); b = AOM(.1, where='mix', mixer=Own(), **kw)(x, y, f).x
    assert (a-b).abs().max()<1e-12 and (a-x).abs().max()>.2

# --- while training ---

class Bends(Bent):
    "`Bent`, with something to learn"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x): return super().forward(x)*self.scale.abs()

def grey_dls(bs=16):
    x,y = torch.full((64,1,4,4), .5),torch.arange(64)%2
    return tensor_dls(x, 0*y, x, 0*y, x, 0*y, bs=bs, vocab=range(2))

def fit(cb, net=None, epochs=3, **kw):
    learn = Learner(grey_dls(), net or Bends(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cb, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn

@pytest.mark.parametrize('cb', [lambda: PGDCallback(.1, steps=1), lambda: AOMCallback(.1, steps=2), lambda: MixCallback(PGD(.1, steps=1))])
def test_training_against_few_steps_is_watched_and_said_once(cb, caplog):
    fit(cb())
    says = [r.message for r in caplog.records if r.name=='advmix']
    assert len(says)==1 and says[0].startswith('epoch 0: FGSM leaves 100% right') and 'Train with more steps' in says[0]

@pytest.mark.parametrize('cb', [lambda: PGDCallback(.1, steps=3), lambda: PGDCallback(.1, steps=(1,2)), lambda: MixCallback('mixup')])
def test_others_are_not(cb, caplog, monkeypatch):
    monkeypatch.setattr(loop, 'catastrophic', lambda *a, **k: 1/0)
    fit(cb())
    assert not caplog.records

def test_a_network_that_is_sound_is_not_named(caplog):
    class Sound(Steady):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
        def forward(self, x): return super().forward(x)*self.scale.abs()
    fit(PGDCallback(.02, steps=1), Sound())
    assert not caplog.records

def test_watching_changes_nothing(monkeypatch):
    "Weights, random streams, hooks, metrics and callbacks are those of a training that isn't watched"
    def trained(watch):
        with monkeypatch.context() as m:
            if not watch: m.setattr(loop, '_is_weak', lambda t: False)
            set_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Dropout(.2), nn.BatchNorm1d(16), nn.Linear(16,2))
            learn = fit(PGDCallback(.1, steps=1), net)
        hooks = [len(o._forward_hooks)+len(o._forward_pre_hooks) for o in net.modules()]
        state  = [dl.rng.getstate() for dl in learn.dls.loaders]
        state += [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
        return net.state_dict(),state,hooks,len(learn.metrics),len(learn.cbs),[o.training for o in net.modules()]
    (w,*a),(v,*b) = trained(True),trained(False)
    assert a==b and all(torch.equal(w[k], v[k]) for k in w)

def test_training_without_validation_images_is_not_watched(caplog):
    dls = grey_dls()
    dls.loaders = dls.loaders[:1]
    learn = Learner(dls, Bends(), loss_func=CrossEntropyLossFlat(), cbs=PGDCallback(.1, steps=1))
    with learn.no_bar(), learn.no_logging():
        learn.create_opt()
        learn.dls.loaders.append([])   # fastai itself wants one
        learn.fit(1, 1e-3)
    assert not caplog.records
