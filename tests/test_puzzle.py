"PuzzleMix's energy against enumeration and maximum flow, its transport against a slow one, its saliency against each image alone"
import itertools
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_flow
from advmix.mix import with_loss
from advmix.puzzle import PuzzleMix
from advmix.puzzle import _block_means as block_means, _loss_gradient as loss_gradient, _pad_to as pad_to
from advmix.puzzle import _energy as energy, _relax as relax, _seams as seams, _settle as settle, _solve as solve, _terms as puzzle_terms
from advmix.puzzle import _move as move, _transport as transport
from advmix.saliency import fine_grained

# ---------------------------------------------------------------- the energy
def random_terms(b, n, m):
    "Problems of the true form: saliency, binomial prior, edges within .5 to 1.5 of beta'"
    s   = (torch.rand(b,n*m)**3)
    s   = (s/s.sum(1, keepdim=True)).view(b, n, m)
    lam = torch.rand(b,1).clamp(1e-3,1-1e-3)
    pr  = -.2/(n*m)*torch.cat([(1-lam)**2, 2*lam*(1-lam), lam**2], 1).log()
    o,v = s.flip(0),1.2/(16*(n*m)**.5)
    return torch.stack([s, (s+o)/2, o], 1)+pr[:,:,None,None],v*(.5+torch.rand(b,n-1,m)),v*(.5+torch.rand(b,n,m-1))

def plain_energy(z, u, vr, vc):
    e = sum(u[int(2*z[i,j]),i,j] for i in range(z.shape[0]) for j in range(z.shape[1]))
    e += sum(vr[i,j]*(z[i,j]-z[i+1,j])**2 for i in range(z.shape[0]-1) for j in range(z.shape[1]))
    return e+sum(vc[i,j]*(z[i,j]-z[i,j+1])**2 for i in range(z.shape[0]) for j in range(z.shape[1]-1))

def least_by_flow(u, vr, vc):
    "Exact: bits x0>=x1 with z=(x0+x1)/2 on a minimum cut; capacities are int32, scaled by 2^24"
    u,n = u.double().numpy(),vr.shape[-1]*vc.shape[-2]
    d   = np.concatenate([(u[1]-u[0]).ravel(), (u[2]-u[1]).ravel()])
    es  = [(p, 2*n+1, c) if c>0 else (2*n, p, -c) for p,c in enumerate(d)] + [(n+p, p, 2.**6) for p in range(n)]
    ids = np.arange(n).reshape(u[0].shape)
    for a,b,v in ((ids[:-1],ids[1:],vr), (ids[:,:-1],ids[:,1:],vc)):
        for p,q,c in zip(a.ravel(), b.ravel(), v.double().numpy().ravel()):
            es += [(i+o, j+o, c/4) for o in (0,n) for i,j in ((p,q),(q,p))] + [(n+p, q, c/2), (n+q, p, c/2)]
    i,j,c = zip(*es)
    g = coo_matrix((np.round(np.array(c)*2**24).astype(np.int32), (i,j)), shape=(2*n+2,)*2).tocsr()
    return maximum_flow(g, 2*n, 2*n+1).flow_value/2**24 + d[d<0].sum() + u[0].sum()

def least_by_enumeration(u, vr, vc, chunk=25):
    every = torch.tensor(list(itertools.product([0,.5,1], repeat=u.shape[-2]*u.shape[-1]))).view(-1, 1, *u.shape[-2:])
    return torch.cat([energy(every, *(t[i:i+chunk] for t in (u,vr,vc))).amin(0) for i in range(0, len(u), chunk)])

def test_energy_against_loops():
    u,vr,vc = random_terms(3,3,4)
    z = torch.randint(0,3,(5,3,3,4))/2
    want = torch.stack([torch.stack([plain_energy(z[k,i], u[i], vr[i], vc[i]) for i in range(3)]) for k in range(5)])
    assert torch.allclose(energy(z, u, vr, vc), want, atol=1e-6)

@pytest.mark.parametrize('n,m,count', [(2,2,300),(3,3,150),(2,4,100)])
def test_solver_against_enumeration(n, m, count):
    "550 random problems: within 1 % of the exact optimum, and nearly always on it"
    prob  = random_terms(count, n, m)
    least = least_by_enumeration(*prob)
    gap   = (energy(solve(*prob), *prob)-least)/least.abs()
    assert gap.min()>-1e-5 and gap.max()<.01 and (gap<1e-5).float().mean()>.99
    flow = torch.tensor([least_by_flow(*(t[i] for t in prob)) for i in range(8)])
    assert torch.allclose(flow.float(), least[:8], atol=1e-5)

@pytest.mark.parametrize('n,m,count', [(5,5,10),(8,8,8),(6,11,4),(16,16,3)])
def test_solver_against_maximum_flow(n, m, count):
    prob  = random_terms(count, n, m)
    least = torch.tensor([least_by_flow(*(t[i] for t in prob)) for i in range(count)])
    gap   = (energy(solve(*prob), *prob)-least)/least.abs()
    assert gap.min()>-1e-5 and gap.max()<.012 and gap.mean()<.006

def test_solver_on_problems_from_images():
    x = F.interpolate(torch.rand(24,3,8,8), (32,32), mode='bicubic').clamp(0,1)
    p = torch.randperm(24)
    for side in (8,4):
        s = block_means(torch.rand(24,32,32)**4, side)
        prob  = puzzle_terms(x, p, s, .4)
        b     = 1.2/(16*32//side)
        assert prob[1].min()>=b/2-1e-7 and prob[2].min()>=b/2-1e-7   # what makes it convex
        least = torch.tensor([least_by_flow(*(t[i] for t in prob)) for i in range(8)])
        gap   = (energy(solve(*prob), *prob)[:8]-least)/least.abs()
        assert gap.min()>-1e-5 and gap.max()<.01

def test_solver_never_worse_than_the_obvious():
    for n,m in ((2,2),(4,7),(16,16),(1,1),(1,5)):
        prob = random_terms(64, n, m)
        z,alone = solve(*prob),prob[0].argmin(1)/2
        for start in (alone, torch.zeros_like(z), torch.ones_like(z)):
            assert (energy(z, *prob)<=energy(start, *prob)+1e-6).all()
            assert (energy(settle(start, *prob), *prob)<=energy(start, *prob)+1e-6).all()
        assert z.unique().tolist()==[v for v in (0,.5,1) if v in z]

def test_relaxation_is_the_convex_optimum():
    u,vr,vc = (t.double() for t in random_terms(4,3,3))
    z = relax(u, vr, vc, sweeps=200)
    def value(z):
        own = torch.where(z<.5, u[:,0]+2*z*(u[:,1]-u[:,0]), u[:,1]+(2*z-1)*(u[:,2]-u[:,1]))
        return own.sum((1,2))+(vr*(z[:,1:]-z[:,:-1])**2).sum((1,2))+(vc*(z[...,1:]-z[...,:-1])**2).sum((1,2))
    for scale in (.3,.03,.003):
        for _ in range(300): assert (value(z)<=value((z+scale*torch.randn_like(z)).clamp(0,1))+1e-9).all()

def test_terms_equal_plain_sums_of_seams_up_to_a_constant():
    x,p,b = torch.rand(2,3,16,24),torch.tensor([1,0]),1.2/(16*24**.5)
    terms = puzzle_terms(x, p, torch.zeros(2,4,6), .5, eta=0)
    gaps  = []
    for _ in range(12):
        z  = (torch.rand(4,6)<.5).float()
        big = z.repeat_interleave(4,0).repeat_interleave(4,1)
        im  = F.avg_pool2d((big*x[0]+(1-big)*x[1])[None], 4)[0]
        cut = (z[1:]!=z[:-1]).sum()+(z[:,1:]!=z[:,:-1]).sum()
        e   = b*.5*((im[:,1:]-im[:,:-1]).abs().mean(0).sum()+(im[:,:,1:]-im[:,:,:-1]).abs().mean(0).sum())+b*cut
        gaps.append(energy(z[None], *(t[:1] for t in terms))[0]-e)
    assert torch.stack(gaps).std()<1e-6

def test_seams_against_loops():
    a,b = torch.rand(2,3,12,8),torch.rand(2,3,12,8)
    down,right = seams(a, b, 4)
    assert down.shape==(2,2,2) and right.shape==(2,3,1)
    for i,j in itertools.product(range(2), range(2)):
        assert torch.allclose(down[:,i,j], (a[:,:,4*i+3,4*j:4*j+4]-b[:,:,4*i+4,4*j:4*j+4]).abs().mean((1,2)))
    for i in range(3): assert torch.allclose(right[:,i,0], (a[:,:,4*i:4*i+4,3]-b[:,:,4*i:4*i+4,4]).abs().mean((1,2)))

# ---------------------------------------------------------------- transport, the whole
def slow_transport(s, z, factor=.8):
    "As published, with dense plans and loops"
    n,m = s.shape
    at  = [(i,j) for i in range(n) for j in range(m)]
    def price(a, b, c, d): return factor*((a-c)**2+(b-d)**2)/max(n-1,m-1,1)**2-(s[a,b].item() if z[c,d]>0 else 0.)
    cost = np.array([[price(*p, *q) for q in at] for p in at], dtype=np.float32)
    for _ in range(max(n,m)):
        place,winner = cost.argmin(1),{}
        for p,q in enumerate(place):
            if q not in winner or cost[p,q]<cost[winner[q],q]: winner[q] = p
        for p,q in enumerate(place):
            if winner[q]!=p: cost[p,q] += 1
    return [winner.get(q, q) for q in range(n*m)],set(winner)

@pytest.mark.parametrize('n,m', [(2,2),(4,4),(8,8),(4,7)])
def test_transport_against_loops(n, m):
    s = torch.rand(6,n*m)**6
    s = (s/s.sum(1, keepdim=True)).view(6, n, m)
    z = torch.randint(0,3,(6,n,m))/2
    got = transport(s, z)
    holes = 0
    for i in range(6):
        want,claimed = slow_transport(s[i], z[i])
        assert got[i].tolist()==want
        holes += sum(1 for q in range(n*m) if q not in claimed and z[i].flatten()[q]>0)
    assert holes<=.02*6*n*m   # shown places are (nearly) always claimed
    assert (s.flatten(1).gather(1, got)*(z.flatten(1)>0)).sum()>=(s*(z>0)).sum()-1e-6

def test_move_and_pad():
    x = torch.arange(2*3*8*12.).view(2,3,8,12)
    src = torch.stack([torch.randperm(6) for _ in range(2)])
    y = move(x, src, 4)
    for b in range(2):
        for q in range(6):
            p = src[b,q].item()
            assert torch.equal(y[b,:,q//3*4:q//3*4+4,q%3*4:q%3*4+4], x[b,:,p//3*4:p//3*4+4,p%3*4:p%3*4+4])
    z = pad_to(x, 5)
    assert torch.equal(z[:,:,:8,:12], x) and z.shape==(2,3,10,15) and torch.equal(z[...,-1,-1], x[...,-1,-1])

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))

def test_saliency_is_the_gradient_of_each_image_alone():
    net,x,y = Net().double(),torch.rand(3,3,8,8).double(),torch.tensor([0,3,1])
    got = loss_gradient(net, x, y)
    for i in range(3):
        z = x[i:i+1].clone().requires_grad_()
        net.eval()
        F.cross_entropy(net(z), y[i:i+1]).backward()
        assert torch.allclose(got[i], z.grad[0], atol=1e-12)
    soft = loss_gradient(net, x, F.one_hot(y,4).double())
    assert torch.allclose(soft, got, atol=1e-12)

LOSSES = dict(weighted=nn.CrossEntropyLoss(weight=torch.tensor([1.,5.,.2,0.])), smooth=nn.CrossEntropyLoss(label_smoothing=.3),
              sum_=nn.CrossEntropyLoss(reduction='sum'), own=lambda p, y: ((p-F.one_hot(y,4))**2).mean())
@pytest.mark.parametrize('name', LOSSES)
def test_saliency_is_that_of_the_loss_one_trains_with(name):
    net,x,y,lf = Net(),torch.rand(4,3,8,8),torch.tensor([0,3,1,2]),LOSSES[name]
    seen = {}
    class Seen(PuzzleMix):
        def _look(self, *a):
            seen[self.loss] = super()._look(*a)[0]
            return seen[self.loss],0
    open_ = Seen(blocks=(2,))
    bound = with_loss(open_, lf)
    assert bound.loss is lf and open_.loss is None and with_loss(PuzzleMix(loss=lf), F.nll_loss).loss is lf
    for m in (open_,bound): m(x, y, net)
    net.eval()
    for loss,s in seen.items():
        z = x.clone().requires_grad_()
        for i in range(4):   # one at a time; a mean over one image with class weight w is unweighted, so by hand
            if name=='weighted' and loss: (lf.weight[y[i]]*F.cross_entropy(net(z[i:i+1]), y[i:i+1])).backward()
            else: (loss or F.cross_entropy)(net(z[i:i+1]), y[i:i+1]).backward()
        assert torch.allclose(s, z.grad.pow(2).mean(1).sqrt(), atol=1e-6)
    a,b = seen.values()
    assert not torch.allclose(a/a.sum(), b/b.sum(), atol=1e-5) or name=='sum_'

def test_default_loss_is_exactly_cross_entropy():
    net,x,y = Net(),torch.rand(4,3,8,8),torch.tensor([0,3,1,2])
    a,b = loss_gradient(net, x, y),loss_gradient(net, x, y, nn.CrossEntropyLoss())
    z = x.clone().requires_grad_()
    net.eval()
    assert torch.equal(a, b) and torch.equal(a, torch.autograd.grad(F.cross_entropy(net(z), y, reduction='sum'), z)[0])

def test_puzzle_adversarial_option():
    net,x,y = Net(),torch.rand(4,3,8,8),torch.tensor([0,3,1,2])
    eps,moved = 10/255,0
    for seed in range(6):
        torch.manual_seed(seed)
        m = PuzzleMix(blocks=(1,), transport=False, adv_p=1., eps=eps)(x, y, net)   # one block: the mask is w
        assert m.mask is None and m.x.min()>=0 and m.x.max()<=1
        clean = m.w[:,0,None,None,None]*x+m.w[:,1,None,None,None]*x[m.idx[:,1]]
        moved = max(moved, (m.x-clean).abs().max().item())
        assert (m.x-clean).abs().max()<=eps+1e-6
    assert moved>eps/4 and all(p.grad is None for p in net.parameters())
    for bad in (dict(adv_p=2), dict(adv_p=.1, saliency=fine_grained), dict(eps=0, adv_p=.1), dict(blocks=(0,)), dict(t_size=0)):
        with pytest.raises(ValueError, match=[*bad][0]): PuzzleMix(**bad)

def test_puzzle_mean_follows_the_prior():
    "Flat images and saliency leave the prior alone: the binomial's mode"
    x = torch.full((1,1,16,16), .5)
    for lam,want in ((.01,0),(.3,0),(.36,.5),(.64,.5),(.7,1),(.99,1)):
        assert (solve(*puzzle_terms(x, torch.tensor([0]), torch.full((1,4,4),1/16), lam))==want).all()
    s = block_means(torch.rand(32,32,32)**3, 4)
    means = [solve(*puzzle_terms(torch.rand(32,3,32,32), torch.randperm(32), s, lam)).mean().item() for lam in (.1,.3,.5,.7,.9)]
    assert means==sorted(means) and means[0]<.25 and means[-1]>.75 and abs(means[2]-.5)<.05

@pytest.mark.parametrize('sz', [(8,8),(20,32),(65,33),(31,7),(2,2)])
def test_puzzle_any_size(sz):
    net,x,y = Net(),torch.rand(3,3,*sz),torch.arange(3)
    for t in (True,False):
        for _ in range(3):
            m = PuzzleMix(transport=t)(x, y, net)
            assert m.x.shape==x.shape and m.x.isfinite().all() and torch.allclose(m.w.sum(1), torch.ones(3), atol=1e-6)

