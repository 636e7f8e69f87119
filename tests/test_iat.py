"IAT: two terms, their draws in order, and one plain loop for every adversarial Mixer"
import inspect
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from advmix.aom import AOM
from advmix.attack import PGD, Threat, pgd
from advmix.core import item_losses
from advmix.iat import IAT
from advmix.mix import MixUp, as_terms, with_loss
from sync import check_meta, check_no_reads

def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512,5)).to(dtype)

def batch(b=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.rand(b,3,8,8, generator=g, dtype=dtype),torch.randint(5, (b,), generator=g)

@pytest.mark.parametrize('loss', [None, F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1)], ids=['none','ce','smooth'])
@pytest.mark.parametrize('kw', [{}, dict(bn='as_is'), dict(norm='l2', step=.1), dict(random_start=False)], ids=str)
def test_two_halves_draw_in_this_order(loss, kw):
    "Clean ratio and partners, the start of the attack, then ratio and partners of the attacked half"
    (x,y),f = batch(),net().train()
    torch.manual_seed(3)
    got = with_loss(IAT(.1, steps=3, alpha=.4, **kw), loss)(x, y, f)
    torch.manual_seed(3)
    mix,bn = MixUp(.4),kw.get('bn', 'eval')
    t = Threat(.1, kw.get('step'), 3, kw.get('norm', 'linf'), kw.get('random_start', True))
    clean = mix(x, y, f)
    z = pgd(f, x, y, t, loss=loss and partial(item_losses, loss), bn=bn)
    want = [(.5, clean), (.5, mix(z, y, f))]
    for (a,m),(b,n) in zip(got, want):
        assert a==b==.5 and all(torch.equal(getattr(m,k), getattr(n,k)) for k in ('x','idx','w','mask','lam'))
    assert as_terms(got)==got and (got[0][1].lam[0]-got[1][1].lam[0]).abs().max()>0

def test_settings_are_those_of_pgd():
    p,q = (inspect.signature(c).parameters for c in (IAT, PGD))
    assert set(p)==set(q)|{'alpha'} and all(p[k].default==q[k].default for k in q) and len(p)<=12
    assert all(v.kind==v.KEYWORD_ONLY for k,v in p.items() if k!='eps')
    a = IAT(.1, steps=(1,3), norm='l2', early_stop=True)
    assert a.attack.threat==Threat(.1, None, (1,3), 'l2') and a.attack.early_stop and a.mixer.alpha==1 and 'alpha' in repr(a)
    assert a.at(.5).attack.threat.steps==2 and a.attack.threat.steps==(1,3) and a.at(.5).mixer is a.mixer
    with pytest.raises(TypeError, match='nonsense'): IAT(nonsense=1)

def test_the_loss_is_bound_in_a_copy():
    a,lf = IAT(),nn.CrossEntropyLoss(label_smoothing=.1)
    assert with_loss(a, lf).attack.loss is lf and a.attack.loss is None
    assert with_loss(IAT(loss=F.cross_entropy), lf).attack.loss is F.cross_entropy

def test_clear_errors():
    (x,y),f = batch(),net()
    with pytest.raises(ValueError, match=r'^IAT attacks.*with the model, IAT\('): IAT()(x, y)
    with pytest.raises(ValueError, match='alpha'): IAT(alpha=0.)
    with pytest.raises(ValueError, match='8/255'): IAT(8)
    with pytest.raises(ValueError, match='more outputs'): IAT()(x, y+5, f)
    with pytest.raises(ValueError, match=r'not in \[0,1\]'): IAT()(x*2, y, f)

def test_no_trace():
    (x,y),f = batch(),net().train()
    f(x).sum().backward()
    before = [v.clone() for v in f.state_dict().values()],[p.grad.clone() for p in f.parameters()],x.clone()
    IAT()(x, y, f)
    assert all(map(torch.equal, before[0], f.state_dict().values())) and torch.equal(x, before[2]) and all(m.training for m in f.modules())
    assert all(torch.equal(g, p.grad) for g,p in zip(before[1], f.parameters()))

def test_a_trusted_step_reads_no_value():
    (x,y),f = batch(),net()
    check_no_reads(IAT(steps=2), x, y, f)
    check_meta(IAT(steps=2), x, y, f)

def test_cost():
    (x,y),f,K = batch(),net(),3
    def flops(g):
        with FlopCounterMode(display=False) as c: g()
        return c.get_total_flops()
    def step(mixer): sum(c*m.loss(F.cross_entropy, f(m.x), y) for c,m in as_terms(mixer(x, y, f))).backward()
    F1,first = flops(lambda: f(x)),2*8*64*8*27   # of the first layer, training needs no gradient of its input
    for mixer,passes in ((PGD(steps=K), 1), (AOM(steps=K), 1), (IAT(steps=K), 2), (AOM(steps=K, c_clean=1.), 2)):
        n = 2*K+3*passes
        assert flops(lambda: step(mixer))==n*F1-passes*first

@pytest.mark.parametrize('mixer', [PGD(.1, steps=2), IAT(.1, steps=(1,2)), AOM(.1, steps=2, c_clean=1),
                                   AOM(.1, steps=2, ratio='kl', label='distance')], ids=['pgd','iat','aom','aom-kl'])
def test_one_plain_loop_trains_with_all(mixer):
    "Class by brightness: a loop without fastai learns it and the loss falls"
    torch.manual_seed(0)
    y = torch.arange(64)%2
    x = (.3+.4*y.view(-1,1,1,1)+.1*torch.randn(64,3,8,8)).clamp(0,1)
    f,losses = net(),[]
    opt = torch.optim.Adam(f.parameters(), 1e-2)
    for e in range(6):
        now = mixer.at(e/6)
        for b in torch.randperm(64).split(16):
            loss = sum(c*m.loss(F.cross_entropy, f(m.x), y[b]) for c,m in as_terms(now(x[b], y[b], f)))
            opt.zero_grad(), loss.backward(), opt.step()
            losses.append(loss.item()/len(as_terms(now(x[b], y[b], f))))
    assert sum(losses[-4:])<.7*sum(losses[:4]) and (f.eval()(x).argmax(1)==y).float().mean()>.95
