"Calibration: equal to hand computations, immune to the published mistakes, temperature at the optimum, no trace"
import json, math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize_scalar
from torch import nn
from advmix.calibration import (Temperature, adaptive_ece, brier, calibrate, calibration_row, ece, fit_temperature, nll, plot_reliability, reliability)
from advmix.data import digits_dls, split_tensors

@pytest.fixture(scope='module')
def digits(): return split_tensors(digits_dls(), n=80)

def net(): return nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(256,10))

def draw(n=500, k=5, scale=2., seed=0):
    "Logits and labels of a network that is right now and then"
    g = torch.Generator().manual_seed(seed)
    z = scale*torch.randn(n, k, generator=g)
    return z,torch.where(torch.rand(n, generator=g)<.5, z.argmax(1), torch.randint(k, (n,), generator=g))

def ece_by_hand(z, y, n_bins):
    "A textbook loop in numpy"
    p = F.softmax(z.double(), 1).numpy()
    conf,right,total = p.max(1),p.argmax(1)==y.numpy(),0.
    for i in range(n_bins):
        b = (conf>=i/n_bins)&((conf<(i+1)/n_bins)|(i==n_bins-1))
        if b.any(): total += b.mean()*abs(conf[b].mean()-right[b].mean())
    return total

# ECE

@given(st.integers(1,300), st.integers(2,12), st.integers(1,20), st.floats(.1,30), st.integers(0,10**6))
@settings(max_examples=60, deadline=None)
def test_ece_by_hand(n, k, n_bins, scale, seed):
    z,y = draw(n, k, scale, seed)
    conf = z.double().softmax(1).amax(1)*n_bins
    if (conf-conf.round()).abs().min()<1e-4: return   # on an edge float32 and float64 may disagree about the bin
    assert ece(z, y, n_bins)==pytest.approx(ece_by_hand(z, y, n_bins), abs=2e-5)

def test_saturated_confidence_is_in_the_last_bin():
    z = torch.tensor([[200.,0]]*5+[[3.,0]]*5)
    y = torch.tensor([1]+[0]*9)
    assert ece(z, y, 10)==pytest.approx(ece_by_hand(z, y, 10), abs=1e-6)
    conf,acc,n = reliability(z, y, 10)
    assert n.tolist()==[10] and acc.tolist()==[.9]

def test_logits_inside_0_1_are_logits():
    z,y = draw()
    z = (z-z.min())/(z.max()-z.min())
    assert ece(z, y)==pytest.approx(ece_by_hand(z, y, 15), abs=1e-5)

def test_bins_are_not_sorted_apart():
    conf,acc = torch.tensor([.55,.95]),torch.tensor([.9,.5])   # right when unsure, wrong when sure
    p = conf.repeat_interleave(10)
    z = torch.stack([p.log(), (1-p).log()], 1)
    y = torch.tensor([0]*9+[1]+[0]*5+[1]*5)
    assert ece(z, y, 10)==pytest.approx((.35+.45)/2, abs=1e-5)

def test_constant_confidence_at_the_base_rate_is_calibrated():
    z = torch.tensor([.7,.2,.1]).log().expand(10,3)
    y = torch.tensor([0]*7+[1,1,2])
    assert ece(z, y)==pytest.approx(0, abs=1e-6) and nll(z, y)>.8

def test_reliability_and_adaptive_bins():
    z,y = draw(101)
    conf,acc,n = reliability(z, y, 7, adaptive=True)
    assert n.sum()==101 and n.max()-n.min()<=1 and (conf.diff()>=0).all()
    assert adaptive_ece(z, y, 7)==pytest.approx(((conf-acc).abs()*n).sum().item()/101)
    conf,acc,n = reliability(z, y, 7)
    assert ((conf-acc).abs()*n).sum().item()/101==pytest.approx(ece(z, y, 7), abs=1e-5)
    order = torch.randperm(101)
    assert adaptive_ece(z[order], y[order], 7)==pytest.approx(adaptive_ece(z, y, 7))
    p = z.double().softmax(1)
    chunks = np.array_split(p.amax(1).argsort().numpy(), 7)
    hand = sum(len(i)*abs(p.amax(1)[i].mean()-(p.argmax(1)==y)[i].double().mean()) for i in map(torch.from_numpy, chunks))/101
    assert adaptive_ece(z, y, 7)==pytest.approx(hand.item())
    assert adaptive_ece(z[:3], y[:3], 15)==pytest.approx((p.amax(1)-(p.argmax(1)==y).double())[:3].abs().mean().item())   # fewer images than bins

# proper scores

def test_nll_and_brier():
    z,y = draw()
    p = z.double().softmax(1).numpy()
    assert nll(z, y)==pytest.approx(-np.log(p[np.arange(500),y]).mean())
    assert brier(z, y)==pytest.approx(((p-np.eye(5)[y])**2).sum(1).mean())
    assert brier(torch.eye(3)*500, torch.arange(3))==pytest.approx(0, abs=1e-12)
    assert brier(torch.eye(3)*500, torch.tensor([1,2,0]))==pytest.approx(2)
    assert nll(torch.eye(3)*500, torch.tensor([1,2,0]))==pytest.approx(500)   # not capped by the smallest float

# temperature

@pytest.mark.parametrize('scale', [.05, 1., 8.])
def test_temperature_is_the_optimum(scale):
    z,y = draw(scale=scale)
    T = fit_temperature(z, y)
    best = minimize_scalar(lambda u: nll(z/math.exp(u), y), bounds=(-5,5), method='bounded', options=dict(xatol=1e-8))
    assert T==pytest.approx(math.exp(best.x), rel=1e-3)
    assert fit_temperature(2*z, y)==pytest.approx(2*T, rel=1e-4)

def test_temperature_bounds():
    with pytest.raises(ValueError, match='best temperature is 0'): fit_temperature(3*torch.eye(3), torch.arange(3))
    assert fit_temperature(torch.eye(3)*5, torch.tensor([1,2,0]))<=100            # worse than chance: any doubt helps
    with pytest.raises(ValueError, match='above 0'): Temperature(nn.Identity(), 0.)

def test_calibrated_network(digits):
    x,y = digits
    model = net().eval()
    cool = calibrate(model, x, y)
    assert not cool.training
    torch.testing.assert_close(cool(x)*cool.t, model(x))
    a,b = calibration_row(model, x, y),calibration_row(cool, x, y)
    assert a['accuracy']==b['accuracy'] and b['nll']<=a['nll']+1e-9

# rows, no trace, refusals

def test_row(digits):
    x,y = digits
    model = net()
    row = calibration_row(model, x, y, n_bins=10, bs=9)
    model.eval()
    with torch.no_grad(): z = model(x)
    assert row['name']=='calibration' and row['n']==80 and row['n_bins']==10
    for k,f in dict(ece=lambda z,y: ece(z,y,10), adaptive_ece=lambda z,y: adaptive_ece(z,y,10), nll=nll, brier=brier).items(): assert row[k]==pytest.approx(f(z,y), abs=1e-5)
    assert row['accuracy']==(z.argmax(1)==y).double().mean().item() and row['confidence']==pytest.approx(z.softmax(1).amax(1).mean().item(), abs=1e-5)
    json.dumps(row)
    assert calibration_row(model, x, y.int())['ece']==pytest.approx(calibration_row(model, x, y)['ece'])
    assert calibration_row(model.bfloat16(), x, y)['n']==80

def test_no_trace(digits):
    model = net()
    model[1].eval()
    flags,bufs,rng = [m.training for m in model.modules()],[b.clone() for b in model.buffers()],torch.get_rng_state()
    calibration_row(model, *digits)
    calibrate(model, *digits)
    assert [m.training for m in model.modules()]==flags and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a,b in zip(bufs, model.buffers())) and all(p.grad is None for p in model.parameters())

def test_plot():
    axs = plot_reliability(dict(a=draw(), b=draw(scale=.1)))
    assert axs[0].get_title().startswith('a: ECE')

@pytest.mark.parametrize('f', [ece, adaptive_ece, nll, brier, fit_temperature, reliability])
def test_refusals(f):
    z,y = draw(20)
    for a,b,says in ((z.softmax(1), y, 'before the softmax'), (z[:9], y, 'one label per row'), (z/0, y, 'NaN'), (z, y+5, 'outside 0..4'), (z[0], y, 'float tensor'), (z[:0], y[:0], 'at least one')):
        with pytest.raises(ValueError, match=says): f(a, b)

def test_refuses_probabilities(digits):
    with pytest.raises(ValueError, match='before the softmax'): calibration_row(nn.Sequential(net(), nn.Softmax(1)), *digits)
    with pytest.raises(ValueError, match='n_bins 0'): reliability(*draw(), 0)
    with pytest.raises(ValueError, match='on_pixels'): calibration_row(net(), digits[0]*2-1, digits[1])
