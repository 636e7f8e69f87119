"The game: routing and direction of every gradient, reversal, reuse, schedule, cost, state, faults"
import copy, math
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from advmix.core import *
from advmix.models import *
from advmix.ema import *
from advmix.mix import *
from advmix.generator import *
from advmix.minmax import *
from advmix.minmax import _reverse as reverse
from advmix.minmax import _share_loss, _source_cosine

class Net(nn.Module):
    "Batch norm, optionally dropout, a feature map"
    def __init__(self, p=0., c=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c,6,3,padding=1), nn.BatchNorm2d(6), nn.Tanh(),
                                  nn.Conv2d(6,8,3,stride=2,padding=1), nn.BatchNorm2d(8), nn.Tanh())
        self.drop,self.head = nn.Dropout(p),nn.Linear(8,4)
    def forward(self, x): return self.head(self.drop(self.body(x).mean((2,3))))

def data(b=7, c=1, dtype=torch.float64): return torch.rand(b,c,8,8,dtype=dtype),torch.randint(4, (b,))

def game(objective='balanced', n_mix=3, p=0., dtype=torch.float64, warm=True, average=None, **kw):
    "A game in which student, teacher and masks are all different and far from trivial"
    torch.manual_seed(1)
    net = Net(p).to(dtype)
    with torch.no_grad(): net.head.weight.mul_(3)
    gen = (AutoMixGenerator(8, stage=1) if objective=='automix' else AdAutoMixGenerator(8, n_mix=n_mix, stage=1)).to(dtype)
    for q in gen.parameters(): nn.init.normal_(q, std=.3)
    kw = dict(opt=torch.optim.SGD(net.parameters(), .1), gen_opt=torch.optim.SGD(gen.parameters(), .1)) | kw
    g = MinMax(net, gen, objective=objective, teacher=Average(net, **average or {}), **kw)
    if warm:
        for q in g.teacher.parameters(): q.add_(.1*torch.randn_like(q))
    return g

def play(g, x, y, seed=5):
    "Both halves of a step, from a given seed, without optimisers"
    torch.manual_seed(seed)
    m = g.mix(x, y)
    return m,g.loss(g.student(m.x), y)

def grads(t, params):
    gs = torch.autograd.grad(t, list(params), allow_unused=True, retain_graph=True)
    return [None if q is None else q.clone() for q in gs]
def moved(gs): return any(q is not None and q.abs().max()>1e-9 for q in gs)
def close(a, b, tol=1e-6): torch.testing.assert_close(a, b, atol=tol, rtol=0)

# --- what reaches whom

EQ4 = {'amce','amce_teacher','cosine'}
MINE = dict(balanced=EQ4, printed=EQ4, released={'amce_teacher','cosine'}, automix={'amce_teacher','share'})
@pytest.mark.parametrize('objective,mine', MINE.items())
def test_routing(objective, mine):
    g = game(objective, linear_weight=.5)
    x,y = data()
    _,t = play(g, x, y)
    assert t.keys()=={'amce','mce','ace','total'}|mine
    for k in t.keys()-{'total'}:
        assert moved(grads(t[k], g.student.parameters()))==(k in ('amce','mce','ace')), k
        assert t[k].item()==0 or moved(grads(t[k], g.generator.parameters()))==(k in mine), k   # a share within its margin has no gradient
    t['total'].backward()
    assert all(q.grad is None for q in g.teacher.parameters())
    assert all(q.grad is not None for q in [*g.student.parameters(),*g.generator.parameters()])

@pytest.mark.parametrize('objective', ('released','automix'))
def test_student_and_generator_have_losses_of_their_own(objective):
    g = game(objective, linear_weight=.5)
    _,t = play(g, *data())
    w = g.weights(3)
    mine,theirs = (sum(w[k]*t[k] for k in ks if w.get(k)) for ks in (('amce','mce','ace'), ('amce_teacher','cosine','share')))
    assert not moved(grads(mine, g.generator.parameters())) and not moved(grads(theirs, g.student.parameters()))
    for a,b in zip(grads(t['total'], g.student.parameters()), grads(mine, g.student.parameters())): close(a, b, 1e-12)
    for a,b in zip(grads(t['total'], g.generator.parameters()), grads(theirs, g.generator.parameters())): close(a, b, 1e-12)

# --- in which direction

def nudge(params, gs, length=.02):
    "A plain gradient step of a given length"
    gs = [torch.zeros_like(q) if d is None else d for q,d in zip(params, gs)]
    lr = length/sum(d.square().sum() for d in gs).sqrt()
    with torch.no_grad():
        for q,d in zip(params, gs): q.sub_(lr*d)

def theta_value(g, t): return g.c*t['amce']-g.beta*t['amce_teacher']+(1-g.beta)*t['cosine']
def w_value(t): return t['amce']+.5*t['mce']+.5*t['ace']

@pytest.mark.parametrize('objective', ('balanced','printed'))
def test_generator_climbs_and_student_descends(objective):
    g = game(objective, linear_weight=.5)
    x,y = data()
    _,t = play(g, x, y)
    th,W = list(g.generator.parameters()),list(g.student.parameters())
    dth,dW = grads(t['total'], th),grads(t['total'], W)
    nudge(th, dth)
    assert theta_value(g, play(g, x, y)[1])>theta_value(g, t)+1e-5
    nudge(th, dth, -.02)
    nudge(W, dW)
    assert w_value(play(g, x, y)[1])<w_value(t)-1e-4

def test_each_pull_on_the_generator_has_the_published_sign():
    "Alone, every term moves as Eq. 4 says: the student's loss up, the teacher's down, the cosine up"
    for k,sign in dict(amce=1, amce_teacher=-1, cosine=1).items():
        g = game('printed')
        g.weights = lambda n: dict(amce=0., mce=0., ace=0., amce_teacher=0., cosine=0.) | {k: dict(amce=1., amce_teacher=.3, cosine=-.7)[k]}
        x,y = data()
        _,t = play(g, x, y)
        nudge(list(g.generator.parameters()), grads(t['total'], g.generator.parameters()))
        assert sign*(play(g, x, y)[1][k]-t[k])>1e-6, k

@pytest.mark.parametrize('k', (0,1,2,3))
def test_generator_of_the_released_code(k):
    g = game('released')
    g.teacher.k = k
    x,y = data()
    value = (lambda t: -g.beta*t['amce_teacher']+(1-g.beta)*t['cosine']) if k%2==0 else (lambda t: t['amce_teacher'])
    _,t = play(g, x, y)
    nudge(list(g.generator.parameters()), grads(t['total'], g.generator.parameters()))
    assert value(play(g, x, y)[1])<value(t)-1e-6

# --- reversal

def two_passes(g, x, y, c):
    "Student and generator each with their own forward passes and their own backward, no reversal; from the same seed"
    torch.manual_seed(5)
    z,clean = features(g.teacher.net, x, 1)
    with torch.no_grad(): idx,lam = g.generator.draw(x)
    ce  = lambda p: mixed_loss(F.cross_entropy, p, y, idx, lam)
    xm  = g.generator.mix(x, z.detach(), idx, lam).x
    lin = sum(lam[:,n,None,None,None]*x[idx[:,n]] for n in range(idx.shape[1]))
    L   = ce(g.student(xm.detach()))+.5*ce(g.student(lin))+.5*F.cross_entropy(g.student(x).float(), y)
    W   = torch.autograd.grad(L, list(g.student.parameters()))
    pred = g.teacher(xm)
    cos = sum((lam[:,n]*F.cosine_similarity(pred, g.teacher(x)[idx[:,n]].detach())) for n in range(idx.shape[1])).mean()
    th  = torch.autograd.grad(-(c*ce(g.student(xm))-g.beta*ce(pred)+(1-g.beta)*cos), list(g.generator.parameters()))
    return W,th

@pytest.mark.parametrize('c', (1.,.4,0.))
def test_reversal_equals_two_passes(c):
    g = game(linear_weight=.5, c=c)
    x,y = data()
    W,th = two_passes(copy.deepcopy(g), x, y, c)
    _,t = play(g, x, y)
    for a,b in zip(grads(t['total'], g.student.parameters()), W): close(a, b)
    for a,b in zip(grads(t['total'], g.generator.parameters()), th): close(a, b)
    if c==0: assert not moved(grads(t['amce'], g.generator.parameters()))

def test_reverse():
    x = torch.randn(3, requires_grad=True)
    for c in (1.,.3,0.):
        r = reverse(x*1, c)
        assert torch.equal(r, x)
        if c: close(torch.autograd.grad((2*r).sum(), x)[0], torch.full((3,), -2*c))
        else: assert not r.requires_grad

# --- the teacher

@pytest.mark.parametrize('p,same', ((0.,True), (.5,False)))
def test_reused_logits_are_those_recomputed(p, same):
    g = game(p=p)
    x,y = data()
    m = g.mix(x, y)
    for n in range(3):
        a,b = g.batch.clean[m.idx[:,n]],copy.deepcopy(g.teacher)(x[m.idx[:,n]])
        assert torch.allclose(a, b, atol=1e-6, rtol=0)==same

@pytest.mark.parametrize('objective', ('balanced','released','automix'))
def test_teacher_keeps_its_own_statistics_of_clean_images(objective):
    g = game(objective)
    x,y = data()
    ref = copy.deepcopy(g.teacher)
    ref(x)
    g.step(x, y)
    for (n,a),b in zip(g.teacher.named_buffers(), ref.buffers()): assert torch.equal(a, b), n
    assert all(m.track_running_stats for m in g.teacher.modules() if isinstance(m, nn.BatchNorm2d))

def test_generated_pass_uses_batch_statistics_though():
    g = game()
    x,y = data()
    torch.manual_seed(5)
    g.mix(x, y)
    p = g.batch.probe
    ref = p.loss(F.cross_entropy, copy.deepcopy(g.teacher)(p.x), y)
    close(g._teacher_terms(y, g.weights(3))['amce_teacher'], ref, 1e-7)

def test_modes_follow_the_student_and_its_own_stay():
    g = game()
    g.student.body[1].eval()
    before = [m.training for m in g.student.modules()]
    g.step(*data())
    assert [m.training for m in g.student.modules()]==before==[m.training for m in g.teacher.net.modules()]

@pytest.mark.parametrize('average', (dict(), dict(decay=.9, final=.99, n_steps=20), dict(n_steps=20)))
def test_the_teacher_is_an_average_of_the_student(average):
    g = game(average=average)
    ref = Average(g.student, **average)
    ref.load_state_dict(g.teacher.state_dict())
    for k in range(5):
        g.step(*data())
        ref.update(g.student)
    for a,b in zip(g.teacher.parameters(), ref.parameters()): assert torch.equal(a, b)
    assert g.k==g.teacher.k==ref.k==5

def test_a_teacher_made_elsewhere():
    "One average may be the teacher of the game and the average one evaluates"
    avg = Average(Net().double(), .9)
    g = MinMax(Net().double(), AdAutoMixGenerator(8, stage=1).double(), teacher=avg)
    assert g.teacher is avg and isinstance(game().teacher, Average)

# --- values

def test_released_value_by_hand():
    g = game('released', linear_weight=None)
    x,y = data()
    for k in (0,1):
        g.teacher.k = k
        ref = copy.deepcopy(g)
        torch.manual_seed(5)
        z,clean = features(ref.teacher.net, x, 1)
        idx,lam = ref.generator.draw(x)
        sets = [(idx, lam), (ref.generator.draw(x, 3)[0], lam)]   # one ratio for both
        ce   = lambda p, s: sum(s[1][:,n]*F.cross_entropy(p, y[s[0][:,n]], reduction='none') for n in range(3)).mean()
        mb,bb = (ref.generator.mix(x, z, *s).x for s in sets)
        lin  = sum(sets[1][1][:,n,None,None,None]*x[sets[1][0][:,n]] for n in range(3))
        L_q  = ce(ref.student(bb), sets[1]) + .5*ce(ref.student(lin), sets[1]) + .5*F.cross_entropy(ref.student(x), y)
        pred = ref.teacher(mb)
        A    = ce(pred, sets[0])
        cos  = sum((sets[0][1][:,n]*F.cosine_similarity(pred, ref.teacher(x[sets[0][0][:,n]]))).mean() for n in range(3))
        L_k  = -.3*A+.7*cos if k==0 else A
        close(play(g, x, y)[1]['total'].double(), L_q+L_k)

def test_automix_value_by_hand():
    g = game('automix')
    x,y = data()
    m,t = play(g, x, y)
    assert set(t)=={'amce','ace','amce_teacher','share','total'}
    close(t['total'].double(), t['amce']+t['ace']+t['amce_teacher']+.1*t['share'])

def test_share_loss():
    mask = torch.stack([torch.full((2,4,4), .9), torch.full((2,4,4), .1)], 1)
    close(_share_loss(mask, torch.tensor([[.5,.5],[.85,.15]])), torch.tensor(.15))

def test_log_forensic():
    "Losses in the published log of an unlearned network follow from the objective"
    ce,cos,beta = 5.31,.774,.3
    assert abs(2*ce + .5*((1-beta)*ce+(1-beta)*cos) - 12.750)<1e-3

def test_starts_adversarial_and_parity_survives():
    g = game('released')
    assert g.weights(3)['amce_teacher']<0
    g.step(*data())
    assert g.weights(3)['amce_teacher']>0
    h = game('released')
    h.load_state_dict(g.state_dict())
    assert h.weights(3)['amce_teacher']>0 and h.k==1

def test_a_loaded_game_shares_nothing():
    g,h = game(gen_opt=OPTIMISERS['adam']),game(gen_opt=OPTIMISERS['adam'])
    g.step(*data())
    h.load_state_dict(g.state_dict())
    saved = copy.deepcopy(g.state_dict())
    for _ in range(2): h.step(*data())
    assert any('exp_avg' in k for k in saved)
    assert all(torch.equal(v, saved[k]) for k,v in g.state_dict().items())

def test_to_moves_everything_but_the_student():
    g = game(gen_opt=OPTIMISERS['adam'])
    g.step(*data())
    assert g.to('cpu') is g and g.step(*data())['total'].isfinite()

def test_to_takes_the_generator_the_teacher_and_what_the_optimiser_knows():
    "Seen by a type, which PyTorch's `to` takes as it takes a device"
    g = game(gen_opt=OPTIMISERS['adam'], dtype=torch.float32)
    g.step(*data(dtype=torch.float32))
    g.to(torch.float64)
    kept = [v for s in g.gen_opt.state.values() for k,v in s.items() if k!='step']
    for ts in (g.generator.parameters(), g.teacher.parameters(), kept): assert {t.dtype for t in ts}=={torch.float64}

def test_parity_with_rarer_generator_steps():
    g,signs = game('released', gen_every=2),[]
    for _ in range(8):
        signs.append(g.weights(3)['amce_teacher']>0)
        g.step(*data())
    assert signs==[False,False,True,True]*2

OPTIMISERS = dict(adam=partial(torch.optim.Adam, lr=.01), sgd=partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=1e-4),
                  plain=partial(torch.optim.SGD, lr=.1), adamw=partial(torch.optim.AdamW, lr=np.float64(.01), amsgrad=True))

@pytest.mark.parametrize('opt', OPTIMISERS)
@pytest.mark.parametrize('objective', ('balanced','printed','released','automix'))
def test_resumed_is_the_same_as_uninterrupted(objective, opt, tmp_path):
    def fresh(): return game(objective, average=dict(n_steps=20), dtype=torch.float32, gen_opt=OPTIMISERS[opt])
    def steps(g, ks):
        for k in ks:
            torch.manual_seed(k)
            g.step(*data(dtype=torch.float32))
    a = fresh()
    steps(a, range(6))
    b = fresh()
    steps(b, range(3))
    torch.save(dict(game=b.state_dict(), student=b.student.state_dict()), tmp_path/'s.pt')
    c = fresh()
    saved = torch.load(tmp_path/'s.pt', weights_only=True)
    c.load_state_dict(saved['game'])
    c.student.load_state_dict(saved['student'])
    steps(c, range(3,6))
    for u,v in ((a.student,c.student), (a.teacher,c.teacher), (a.generator,c.generator)):
        for s,t in zip(u.state_dict().values(), v.state_dict().values()): assert torch.equal(s, t)
    assert all(isinstance(v, torch.Tensor) for v in saved['game'].values()) and a.state_dict().keys()==c.state_dict().keys()

# --- masks

@pytest.mark.parametrize('objective,n,margin', (('released',3,.03), ('released',2,.03), ('automix',2,.08)))
def test_margin(objective, n, margin):
    g = game(objective, n_mix=n)
    x,y = data()
    z = features(g.teacher.net, x, 1)[0]
    for own,flat in ((margin-.01,True), (margin,True), (margin+.001,False), (.5,False), (1-margin,False), (1.005-margin,True)):
        lam = torch.tensor([[own,*[(1-own)/(n-1)]*(n-1)]]).expand(7,n)
        g.generator.draw = lambda *args: (torch.randint(7, (7,n)), lam)
        m = g._own_mix(x, z, SimpleNamespace(idx=torch.zeros(7,n), lam=lam))
        assert torch.allclose(m.mask, lam[:,:,None,None].to(m.mask).expand_as(m.mask))==flat, own

@pytest.mark.parametrize('objective,n,same', (('released',3,True), ('released',4,True), ('released',2,False), ('automix',2,False)))
def test_one_ratio_for_both_paths_except_for_pairs(objective, n, same):
    g = game(objective, n_mix=n)
    g.mix(*data())
    b = g.batch
    assert torch.equal(b.mixed.lam, b.probe.lam)==same and not torch.equal(b.mixed.idx, b.probe.idx)
    assert b.probe.mask.requires_grad and not b.mixed.mask.requires_grad

def test_share_slope():
    lam = torch.rand(50,3).double()
    lam = lam/lam.sum(1, keepdim=True)
    flat = lam[:,:,None,None].expand(-1,-1,4,4)
    close(share_slope(flat, lam), torch.tensor(1.).double(), 1e-12)
    close(share_slope(.25*flat+.25, lam), torch.tensor(.25).double(), 1e-12)
    close(share_slope(torch.full_like(flat, 1/3), lam), torch.tensor(0.).double(), 1e-12)
    noisy = flat+.1*torch.randn(50,3,4,4)
    ref = np.polyfit(lam.flatten().numpy(), noisy.mean((2,3)).flatten().numpy(), 1)[0]
    close(share_slope(noisy, lam), torch.tensor(ref), 1e-9)

def test_entropy_of_linear_mixtures_is_that_of_the_ratio():
    lam = torch.tensor([[.7,.2,.1],[.5,.5,0.]])
    ref = -(torch.special.xlogy(lam, lam)).sum(1).mean()/math.log(3)
    close(mask_entropy(lam[:,:,None,None].expand(-1,-1,5,5)), ref)

def test_mask_entropy():
    close(mask_entropy(torch.full((2,3,4,4), 1/3)), torch.tensor(1.))
    assert mask_entropy(torch.eye(3)[None,:,:,None])==0
    close(mask_entropy(torch.tensor([.9,.1]).view(1,2,1,1)), torch.tensor(-(.9*math.log(.9)+.1*math.log(.1))/math.log(2)))

@pytest.mark.parametrize('objective', ('balanced','released','automix'))
def test_stays_finite_and_masks_stay_masks(objective):
    g = game(objective, average=dict(n_steps=60), warm=False, dtype=torch.float32, gen_opt=OPTIMISERS['adam'])
    x,y = data(32, dtype=torch.float32)
    for _ in range(60): t = g.step(x, y)
    assert all(v.isfinite() for v in t.values())
    m = g.mix(x, y)
    assert m.mask.min()>=0 and not m.mask.requires_grad
    close(m.mask.sum(1), torch.ones(32,8,8))

# --- cost

def counted(objective, n_mix, weight=None, k=0, **kw):
    "FLOPs of one step of a ResNet-18 with CIFAR stem, in forward passes; on the meta device, so nothing is computed"
    net = get_model('resnet18', 100, size=32).to('meta')
    gen = (AutoMixGenerator(256) if objective=='automix' else AdAutoMixGenerator(256, n_mix=n_mix)).to('meta')
    g = MinMax(net, gen, objective=objective, linear_weight=weight, **kw)
    g.teacher.k = k
    x,y = torch.zeros(64,3,32,32,device='meta'),torch.zeros(64,dtype=torch.long,device='meta')
    with FlopCounterMode(display=False) as one, torch.no_grad(): net(x)
    with FlopCounterMode(display=False) as c: g.loss(net(g.mix(x, y).x), y)['total'].backward()
    return c.get_total_flops()/one.get_total_flops()

COSTS = [(12,('balanced',3)), (9,('balanced',2)), (12,('balanced',2,.5)), (9,('balanced',3,0.)), (9,('printed',3,1.)),
         (12,('released',3)), (12,('released',3,None,1)), (9,('released',2)), (9,('automix',2))]
@pytest.mark.parametrize('F_,args', COSTS)
def test_cost(F_, args): assert abs(counted(*args)/F_-1)<.02

def test_cost_without_a_turn_of_the_generator(): assert abs(counted('balanced', 3, k=1, gen_every=2)/10-1)<.02

# --- a good citizen

@pytest.mark.parametrize('objective', ('balanced','released','automix'))
@pytest.mark.parametrize('b', (1,2,5))
def test_small_and_odd_batches(objective, b):
    g = game(objective)
    x,y = data(b)
    before = x.clone()
    t = g.step(x, y)
    assert all(v.isfinite() for v in t.values()) and torch.equal(x, before)

def test_several_numbers_of_images():
    g,seen = game(n_mix=(2,3)),set()
    for _ in range(12): seen.add('mce' in g.step(*data()))
    assert seen=={True,False}   # pairs do without linear mixtures

@pytest.mark.parametrize('lf', (
    nn.CrossEntropyLoss(label_smoothing=.1), CrossEntropyLossFlat(), CrossEntropyLossFlat(weight=torch.tensor([1.,2.,3.,4.])),
    FocalLossFlat(), LabelSmoothingCrossEntropyFlat(), lambda p, t: F.cross_entropy(p, t)))
def test_any_loss(lf):
    g = game(loss_func=lf, dtype=torch.float32)
    t = g.step(*data(dtype=torch.float32))
    assert all(v.isfinite() for v in t.values())

def test_multi_label():
    g = game(loss_func=nn.BCEWithLogitsLoss(), dtype=torch.float32)
    x,_ = data(dtype=torch.float32)
    assert g.step(x, (torch.rand(7,4)>.5).float())['total'].isfinite()

def test_frozen_student_still_teaches_the_generator():
    g = game()
    for q in g.student.body.parameters(): q.requires_grad_(False)
    _,t = play(g, *data())
    t['total'].backward()
    assert all(q.grad is None for q in g.student.body.parameters()) and moved([q.grad for q in g.generator.parameters()])

def test_generator_rests_between_its_turns():
    g = game(gen_every=3)
    for k in range(6):
        before = [q.clone() for q in g.generator.parameters()]
        t = g.step(*data())
        assert any(not torch.equal(a, b) for a,b in zip(before, g.generator.parameters()))==(k%3==0)
        assert ('amce_teacher' in t)==(k%3==0)

def test_somebody_elses_loop():
    "What a training framework does: its own forward pass, its own backward, accumulated over two batches"
    g,h = game(),game()
    (x1,y1),(x2,y2) = data(),data()
    for x,y in ((x1,y1),(x2,y2)):
        _,t = play(g, x, y)
        (t['total']/2).backward()
    parts = [grads(play(h, x, y)[1]['total'], [*h.student.parameters(),*h.generator.parameters()]) for x,y in ((x1,y1),(x2,y2))]
    for q,a,b in zip([*g.student.parameters(),*g.generator.parameters()], *parts): close(q.grad, (a+b)/2, 1e-9)
    g.gen_step()
    g.after_step()
    assert all(q.grad is None for q in g.generator.parameters()) and g.k==1

def test_scaler_and_autocast():
    g = game(dtype=torch.float32)
    scaler = torch.amp.GradScaler('cpu')
    x,y = data(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        m = g.mix(x, y)
        t = g.loss(g.student(m.x), y)
    assert m.mask.dtype==torch.float32
    before = [q.clone() for q in g.generator.parameters()]
    scaler.scale(t['total']).backward()
    g.gen_step(scaler)
    scaler.update()
    after = list(g.generator.parameters())
    assert any(not torch.equal(a, b) for a,b in zip(before, after)) and all(q.isfinite().all() for q in after)
    g.gen_step(scaler)   # without a gradient: nothing to do, nothing raised

@pytest.mark.parametrize('objective', ('balanced','released','automix'))
def test_looking_without_learning(objective):
    "As a Mixer like any other: same mixture again, nothing of the game has changed"
    g = game(objective)
    g.student.body[1].eval()
    x,y = data()
    state = {k:v.clone() for k,v in g.state_dict().items()}
    flags = [m.training for m in g.teacher.modules()]
    with torch.no_grad():
        torch.manual_seed(3)
        m = g.mix(x, y, g.student)
        torch.manual_seed(3)
        assert torch.equal(g.mix(x).x, m.x)
    assert not m.x.requires_grad and g.batch is None and flags==[m.training for m in g.teacher.modules()]
    assert all(torch.equal(v, state[k]) for k,v in g.state_dict().items())
    close(m.x, compose(x, m.idx, m.mask), 1e-12)

def test_defaults_of_c():
    assert game('balanced', beta=.2).c==.2 and game('printed', beta=.2).c==1 and game('balanced', c=.7).c==.7 and game('printed', c=0.).c==0

def test_one_hook_for_the_loss():
    class Flat(MinMax):
        def terms(self, pred, y):
            mask = self.batch.probe.mask
            return super().terms(pred, y) | dict(flat=mask.var((2,3)).mean())
    g = game()
    h = Flat(g.student, g.generator, teacher=g.teacher)
    x,y = data()
    a,b = play(g, x, y)[1],play(h, x, y)[1]
    assert set(b)-set(a)=={'flat'}
    close(b['total'], a['total']+b['flat'], 1e-12)
    assert moved(grads(b['flat'], g.generator.parameters()))

def test_made_for_a_network():
    net,(x,y) = Net(),data(dtype=torch.float32)
    opt = torch.optim.SGD(net.parameters(), .1)
    g = MinMax.for_model(net, x, stage=1, n_mix=2, alpha=.4, lam_margin=.1, relu=True, beta=.2, decay=.9, final=.99, n_steps=7,
                         opt=opt, gen_opt=OPTIMISERS['sgd'])
    q = g.generator
    assert (q.stage,q.n_mix,q.alpha,q.lam_margin,q.attention.relu)==(1,(2,),.4,.1,True) and type(q) is AdAutoMixGenerator
    assert (g.beta,g.teacher.decay,g.teacher.final,g.teacher.n_steps)==(.2,.9,.99,7) and isinstance(g.gen_opt, torch.optim.SGD)
    assert g.step(x, y)['total'].isfinite()
    assert type(MinMax.for_model(net, x, stage=1, objective='automix').generator) is AutoMixGenerator
    with pytest.raises(TypeError, match='strength'): MinMax.for_model(net, x, stage=1, strength=1)

@pytest.mark.parametrize('kw,msg', [
    (dict(objective='eq4'), "'balanced', 'printed', 'released', 'automix'"),
    (dict(linear_weight=1.5), r'linear_weight=1.5\): outside \[0,1\]'),
    (dict(beta=-.1), r'beta=-0.1\): outside \[0,1\]'), (dict(beta=float('nan')), 'outside'), (dict(c=-1.), r'c=-1.0\): negative'),
    (dict(objective='released', c=1.), 'no reversal'), (dict(objective='automix', c=.3), 'no reversal'),
    (dict(gen_every=0), 'whole number from 1')])
def test_faults(kw, msg):
    with pytest.raises(ValueError, match=msg): game(**kw)

def test_more_faults():
    net = Net()
    with pytest.raises(ValueError, match='use AutoMixGenerator'): MinMax(net, AdAutoMixGenerator(8), objective='automix')
    with pytest.raises(ValueError, match='needs an optimiser for the student'):
        MinMax(net, AdAutoMixGenerator(8, stage=1)).step(*data(dtype=torch.float32))
    g = game()
    with pytest.raises(ValueError, match='call mix'): g.loss(torch.zeros(7,4), torch.zeros(7).long())
    g.generator.stage = 9
    with pytest.raises(ValueError, match='stage 9 not found'): g.mix(*data())

def test_cosine_gives_the_sources_no_gradient():
    pred,clean = torch.randn(5,4,requires_grad=True),torch.randn(5,4,requires_grad=True)
    idx,w = torch.randint(5, (5,3)),torch.rand(5,3)
    _source_cosine(pred, clean, idx, w).backward()
    assert pred.grad is not None and clean.grad is None

# --- mixed precision, compiled networks

@pytest.mark.parametrize('objective', ('balanced','released','automix'))
def test_bfloat16_is_close_to_float32(objective):
    "Student, teacher and generator under CPU autocast: every term within 2 %, masks within .02, gradients in the same direction"
    x,y = data(16, dtype=torch.float32)
    def half_step(on):
        g = game(objective, dtype=torch.float32, warm=True)
        torch.manual_seed(5)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=on):
            m = g.mix(x, y)
            t = g.loss(g.student(m.x), y)
        t['total'].backward()
        assert all(v.dtype==torch.float32 for v in (m.x, m.mask, m.w, t['total']))
        return m,t,[torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (g.student, g.generator)]
    (m,t,gs),(m16,t16,gs16) = half_step(False),half_step(True)
    close(m16.mask, m.mask, .02)
    close(m16.mask.sum(1), torch.ones(16,8,8))
    for k in t: assert abs(t16[k]-t[k])<=.02*abs(t[k])+.01, k
    for a,b in zip(gs, gs16): assert b.isfinite().all() and F.cosine_similarity(a, b, dim=0)>.98

@pytest.mark.parametrize('wrapped', (False, True))
def test_compiled_student(wrapped):
    "Compiled in place or by a wrapper (here with the backend that changes nothing): the same step"
    x,y = data(dtype=torch.float32)
    g,h = game(dtype=torch.float32),game(dtype=torch.float32)
    if wrapped: h.student = torch.compile(h.student, backend='eager')
    else: h.student.compile(backend='eager')
    for k,v in play(g, x, y)[1].items(): close(play(h, x, y)[1][k] if k=='amce' else v, v)
    for q in (g,h):
        torch.manual_seed(5)
        q.step(x, y)
    for a,b in zip(g.teacher.parameters(), h.teacher.parameters()): close(a, b)

def test_a_game_goes_on_from_the_shelf():
    from advmix.weights import cifar_sheet, from_pretrained
    x,y,_ = cifar_sheet()
    g = MinMax.from_pretrained('adautomix-cifar10', per_sample=True, c=.1)
    net = from_pretrained('adautomix-cifar10')
    with torch.no_grad():
        assert torch.equal(g.teacher(x), net(x)) and not torch.equal(g.student(x), net(x))
        right = [(n(x).argmax(1)==y).float().mean().item() for n in (g.student, g.teacher)]
        m = g.mix(x, y)
    assert g.c==.1 and g.generator.per_sample and min(right)>.5
    assert .6<share_slope(m.mask, m.lam)<1.4 and mask_entropy(m.mask)<.95
    g.opt = torch.optim.SGD(g.student.parameters(), .01)
    before = [p.clone() for p in (*g.student.parameters(), *g.generator.parameters())]
    assert all(v.isfinite() for v in g.step(x, y).values())
    moved = [not torch.equal(a, b) for a,b in zip(before, (*g.student.parameters(), *g.generator.parameters()))]
    assert sum(moved)>.9*len(moved)
    with pytest.raises(ValueError, match='no generator of masks was trained with'): MinMax.from_pretrained('vanilla-cifar10')
    with pytest.raises(TypeError, match='strength'): MinMax.from_pretrained('adautomix-cifar10', strength=1)
