"The slow copy: its schedule, what is averaged and what copied, whose statistics, no traces, state"
from contextlib import nullcontext
import copy, math, pickle
import pytest, torch
from torch import nn
from advmix.models import *
from advmix.ema import *

class Net(nn.Module):
    "Batch norm, dropout, a constant buffer, a counting buffer"
    def __init__(self, p=.5):
        super().__init__()
        self.norm = Normalize(.5, .25)
        self.body = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,4,3), nn.BatchNorm2d(4))
        self.drop,self.head = nn.Dropout(p),nn.Linear(4,3)
        self.register_buffer('calls', torch.tensor(0))
    def forward(self, x):
        self.calls += 1
        return self.head(self.drop(self.body(self.norm(x)).mean((2,3))))

def learn(net, opt, b=8):
    opt.zero_grad()
    net(torch.rand(b,1,8,8, dtype=net.head.weight.dtype)).square().mean().backward()
    opt.step()

def trained(dtype=torch.float32, **kw):
    net = Net().to(dtype)
    avg,opt = Average(net, **kw),torch.optim.SGD(net.parameters(), .1)
    return net,avg,opt

def same(a, b): return all(torch.equal(s, t) for s,t in zip(a, b))

# --- the schedule

def test_published_schedule():
    a = Average(nn.Linear(1,1), .999, .999999, n_steps=1000)
    for k,m in {250:.9991463, 500:.9994995, 750:.9998527, 900:.9999746}.items(): assert abs(a.momentum(k)-m)<1e-7
    assert a.momentum(0)==a.momentum(99)==.999 and a.momentum(100)>.999
    assert abs(a.momentum(1000)-.999999)<1e-12 and a.momentum(5000)==a.momentum(1000)

@pytest.mark.parametrize('hold', (0., .25, 1.))
def test_hold(hold):
    a = Average(nn.Linear(1,1), .9, .99, n_steps=100, hold=hold)
    for k in range(101): assert (a.momentum(k)==.9)==(k<100*hold or k==0), k

@pytest.mark.parametrize('n,m0,m1', (
    (None,.999,.999), (20,0.,.995), (300,1-100/300,1-.1/300), (100_000,.999,.999999), (10**7,.999,.999999)))
def test_fitted_to_the_training(n, m0, m1):
    a = Average(nn.Linear(1,1), n_steps=n)
    assert a.momentum(0)==m0 and abs(a.momentum(n or 9999)-m1)<1e-12

def test_constant_where_no_end_is_given():
    for a in (Average(nn.Linear(1,1), .9), Average(nn.Linear(1,1), .9, n_steps=10), Average(nn.Linear(1,1), .9, .99)):
        assert {a.momentum(k) for k in (0,1,5,10,99)}=={.9}

@pytest.mark.parametrize('kw', (
    dict(), dict(decay=.9), dict(decay=.9, final=.99, n_steps=20), dict(n_steps=20), dict(decay=0.), dict(decay=1.)))
def test_average_is_its_formula(kw):
    net,avg,opt = trained(torch.float64, **kw)
    ref = [t.detach().clone() for t in net.parameters()]
    n,m0 = kw.get('n_steps'),kw.get('decay')
    m1 = kw.get('final', m0)
    if m0 is None: m0,m1 = (0.,.995) if n else (.999,.999)
    for k in range(6):
        learn(net, opt)
        assert avg.k==k
        avg.update(net)
        m = m0 if not n or k<.1*n else m1-(m1-m0)*(1+math.cos(math.pi*k/n))/2
        ref = [m*r+(1-m)*s.detach() for r,s in zip(ref, net.parameters())]
    for a,b in zip(avg.parameters(), ref): torch.testing.assert_close(a.data, b, atol=1e-12, rtol=0)

# --- buffers

def test_statistics_are_its_own_and_other_buffers_the_networks():
    net,avg,opt = trained(decay=.5)
    for _ in range(3): learn(net, opt)
    net.norm.mean.fill_(.3)
    avg.update(net)
    assert torch.equal(avg.net.norm.mean, net.norm.mean) and avg.net.calls==net.calls==3
    assert avg.net.body[1].running_mean.abs().max()==0 and avg.net.body[1].num_batches_tracked==0
    x = torch.rand(8,1,8,8)
    ref = copy.deepcopy(avg.net).train()
    ref.drop.eval()
    ref(x)
    avg.see(x)
    assert same(avg.net.buffers(), ref.buffers()) and avg.net.body[1].num_batches_tracked==1

def test_frozen_batch_norm_is_frozen_in_the_average_as_well():
    net,avg,opt = trained(decay=.5)
    learn(net, opt)
    net.body[1].eval()
    for _ in range(2):
        learn(net, opt)
        avg.update(net)
        avg.see(torch.rand(8,1,8,8))
    assert torch.equal(avg.net.body[1].running_mean, net.body[1].running_mean) and avg.net.body[1].num_batches_tracked==1
    assert not torch.equal(avg.net.body[4].running_mean, net.body[4].running_mean) and avg.net.body[4].num_batches_tracked==2

def test_seeing_leaves_no_trace():
    net,avg,opt = trained(decay=.5)
    learn(net, opt)
    avg.update(net)
    flags,rng,params = [m.training for m in avg.net.modules()],torch.get_rng_state(),[p.clone() for p in avg.parameters()]
    x = torch.rand(8,1,8,8, requires_grad=True)
    torch.set_rng_state(rng)
    assert avg.see(x) is None
    assert torch.equal(rng, torch.get_rng_state())   # dropout drew nothing
    assert flags==[m.training for m in avg.net.modules()] and x.grad is None and same(params, avg.parameters())
    with pytest.raises(RuntimeError): avg.see(torch.rand(8,3,8,8))
    assert flags==[m.training for m in avg.net.modules()]

def test_nothing_to_see_without_statistics():
    called = []
    net = nn.Sequential(nn.Linear(2,2), nn.LayerNorm(2))
    avg = Average(net)
    avg.net.register_forward_hook(lambda *a: called.append(1))
    avg.see(torch.rand(3,2))
    assert not called
    avg.net.append(nn.BatchNorm1d(2, track_running_stats=False))
    avg.see(torch.rand(3,2))
    assert not called

def test_several_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm1d(2)
        def forward(self, a, b): return self.bn(a+b)
    avg = Average(Two())
    avg.see(torch.ones(3,2), torch.ones(3,2))
    assert torch.allclose(avg.net.bn.running_mean, torch.full((2,), .2)) and avg(torch.ones(3,2), torch.ones(3,2)).shape==(3,2)

@pytest.mark.parametrize('fail', (False, True))
def test_keep_stats(fail):
    net,avg,opt = trained()
    avg.net.body[4].eval()
    x = torch.rand(8,1,8,8, requires_grad=True)
    before = [b.clone() for b in avg.net.body.buffers()]
    avg.net.drop.eval()
    ref = copy.deepcopy(avg.net)(x)
    with pytest.raises(KeyError) if fail else nullcontext(), avg.keep_stats() as inner:
        assert inner is avg.net
        out = avg(x)
        if fail: raise KeyError
    torch.testing.assert_close(out, ref)   # batch statistics, nevertheless
    assert same(before, avg.net.body.buffers()) and all(avg.net.body[i].track_running_stats for i in (1,4))
    out.sum().backward()
    assert x.grad.abs().sum()>0 and all(p.grad is None for p in avg.parameters())

# --- a good citizen

def test_the_network_is_not_touched():
    net,avg,opt = trained(decay=.5)
    assert not any(p.requires_grad for p in avg.parameters()) and all(p.requires_grad for p in net.parameters())
    learn(net, opt)
    before = [t.clone() for t in net.state_dict().values()],[m.training for m in net.modules()],[p.grad.clone() for p in net.parameters()]
    avg.update(net)
    avg.see(torch.rand(8,1,8,8))
    after = list(net.state_dict().values()),[m.training for m in net.modules()],[p.grad for p in net.parameters()]
    assert same(before[0], after[0]) and before[1]==after[1] and same(before[2], after[2])
    with torch.no_grad():
        for p in net.parameters(): p.add_(1)
    assert not any(torch.equal(a, b) for a,b in zip(avg.parameters(), net.parameters()))

def test_flags_follow():
    net = Net().eval()
    avg = Average(net)
    net.train()
    net.body.eval()
    avg.follow(net)
    assert [m.training for m in avg.net.modules()]==[m.training for m in net.modules()]

def test_half_precision_parameters():
    net = nn.Linear(4,4).to(torch.bfloat16)
    avg = Average(net, .5)
    avg.update(net)
    assert avg.net.weight.dtype==torch.bfloat16 and torch.equal(avg.net.weight, net.weight)

def test_equal_weights_stay_equal_to_the_bit():
    net,avg,_ = trained(decay=.9)
    for _ in range(5): avg.update(net)
    assert same(avg.parameters(), net.parameters())

# --- state

@pytest.mark.parametrize('n', (None, 30))
def test_continued_is_the_same_as_uninterrupted(n, tmp_path):
    def steps(net, avg, opt, ks):
        for k in ks:
            torch.manual_seed(k)
            learn(net, opt)
            avg.update(net)
            avg.see(torch.rand(8,1,8,8))
    torch.manual_seed(0)
    a = trained(n_steps=n)
    start = copy.deepcopy(a[0].state_dict())
    steps(*a, range(12))
    torch.manual_seed(0)
    b = trained(n_steps=n)
    assert same(b[0].state_dict().values(), start.values())
    steps(*b, range(5))
    torch.save(dict(net=b[0].state_dict(), avg=b[1].state_dict()), tmp_path/'s.pt')
    c,saved = trained(),torch.load(tmp_path/'s.pt', weights_only=True)
    c[0].load_state_dict(saved['net'])
    c[1].load_state_dict(saved['avg'])
    assert (c[1].k,c[1].n_steps)==(5,n) and type(c[1].k) is int
    steps(*c, range(5,12))
    assert same(a[1].state_dict().values(), c[1].state_dict().values()) and a[1].k==c[1].k==12

def test_state_is_flat_tensors_and_shares_nothing():
    net,avg,opt = trained(decay=.5, n_steps=9)
    state = avg.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in state.values()) and state['_extra_state'].tolist()==[0,9]
    other = trained(decay=.5)[1]
    other.load_state_dict(state)
    learn(net, opt)
    avg.update(net)
    assert other.k==0 and not same(other.parameters(), avg.parameters())
    with pytest.raises(RuntimeError, match='head.weight'): other.load_state_dict({k:v for k,v in state.items() if k!='net.head.weight'})
    with pytest.raises(RuntimeError): Average(nn.Linear(2,2)).load_state_dict(state)

@pytest.mark.parametrize('copied', (copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))))
def test_copies(copied):
    net,avg,opt = trained(n_steps=9)
    avg.update(net)
    other = copied(avg)
    assert (other.k,other.n_steps)==(1,9) and same(other.state_dict().values(), avg.state_dict().values())

@pytest.mark.parametrize('kw,msg', [
    (dict(decay=1.5), r'decay=1.5 is outside \[0,1\]'), (dict(decay=.9, final=-1), 'final=-1 is outside'),
    (dict(final=.99), 'give both momenta'),
    (dict(hold=2), 'hold=2'), (dict(n_steps=0), 'n_steps=0'), (dict(decay=float('nan')), 'decay=nan')])
def test_faults(kw, msg):
    with pytest.raises(ValueError, match=msg): Average(nn.Linear(1,1), **kw)
