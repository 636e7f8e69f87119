"Calibration: equal to hand computations and torchmetrics, immune to the published mistakes, an honest floor, no trace"
import json, math, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize_scalar
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error
from advmix.calibration import _Temperature, _scores, calibrate, calibration_row, ece, plot_reliability
from advmix.calibration import _fit_temperature as fit_temperature, _reliability as reliability
from advmix.data import digits_dls, split_tensors

@pytest.fixture(scope='module')
def digits(): return split_tensors(digits_dls(), n=80)

def net():
    return nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(256,10))

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

def nll(z, y): return _scores(z, y)['nll'].mean().item()

# ECE

@given(st.integers(1,300), st.integers(2,12), st.integers(1,20), st.floats(.1,30), st.integers(0,10**6))
@settings(max_examples=60, deadline=None)
def test_ece_by_hand(n, k, n_bins, scale, seed):
    z,y = draw(n, k, scale, seed)
    conf = z.double().softmax(1).amax(1)*n_bins
    if (conf-conf.round()).abs().min()<1e-4: return   # on an edge float32 and float64 may disagree about the bin
    assert ece(z, y, n_bins)==pytest.approx(ece_by_hand(z, y, n_bins), abs=2e-5)

@pytest.mark.parametrize('n_bins', [3, 10, 15])
def test_mass_on_the_edges_of_bins_as_torchmetrics_and_the_diagram_alike(n_bins):
    conf  = (torch.arange(1, n_bins)/n_bins).float().repeat_interleave(7)   # every image on an edge
    right = torch.arange(len(conf))%3>0
    ours  = ece(conf, right, n_bins)
    assert ours==pytest.approx(binary_calibration_error(conf, right.long(), n_bins=n_bins).item(), abs=1e-6)
    z = torch.stack([conf.log(), (1-conf).clamp_min(1e-30).log()], 1)
    y = torch.where(right, z.argmax(1), z.argmin(1))
    c,a,n = reliability(z, y, n_bins)
    assert ((c-a).abs()*n).sum().item()/len(y)==pytest.approx(ece(z, y, n_bins), abs=1e-9)

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
    conf = torch.tensor([.55,.95])   # right nine times in ten when unsure, half the time when sure
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
    assert ece(z, y, 7, adaptive=True)==pytest.approx(((conf-acc).abs()*n).sum().item()/101)
    conf,acc,n = reliability(z, y, 7)
    assert ((conf-acc).abs()*n).sum().item()/101==pytest.approx(ece(z, y, 7), abs=1e-9)
    order = torch.randperm(101)
    assert ece(z[order], y[order], 7, True)==pytest.approx(ece(z, y, 7, True))
    p = z.double().softmax(1)
    chunks = np.array_split(p.amax(1).argsort().numpy(), 7)
    hand = sum(len(i)*abs(p.amax(1)[i].mean()-(p.argmax(1)==y)[i].double().mean()) for i in map(torch.from_numpy, chunks))/101
    assert ece(z, y, 7, True)==pytest.approx(hand.item(), abs=1e-6)
    few = (p.amax(1)-(p.argmax(1)==y).double())[:3].abs().mean().item()   # fewer images than bins
    assert ece(z[:3], y[:3], 15, True)==pytest.approx(few, abs=1e-6)

def test_confidences_instead_of_logits():
    z,y = draw()
    s = _scores(z, y)
    for adaptive in (False, True):
        assert ece(s['confidence'], s['right'], 15, adaptive)==ece(z, y, 15, adaptive)
        assert ece(s['confidence'], None, 15, adaptive)==ece(z, None, 15, adaptive)

@pytest.mark.parametrize('n,published', [(48,.17), (100,.11), (1000,.04)])
def test_floor_is_what_an_honest_network_scores(n, published):
    z = 1.5*torch.randn(n, 10, generator=torch.Generator().manual_seed(1))
    p = z.double().softmax(1)
    g = torch.Generator().manual_seed(2)
    hits = [ece(z, torch.multinomial(p, 1, generator=g)[:,0]) for _ in range(300)]   # labels drawn as the network says
    assert ece(z)==pytest.approx(np.mean(hits), rel=.08)
    assert ece(z)==pytest.approx(published, rel=.3)
    assert ece(z)==ece(z)

# proper scores

def test_nll_and_brier():
    z,y = draw()
    p,s = z.double().softmax(1).numpy(),_scores(z, y)
    np.testing.assert_allclose(s['nll'], -np.log(p[np.arange(500),y]))
    np.testing.assert_allclose(s['brier'], ((p-np.eye(5)[y])**2).sum(1))
    assert _scores(torch.eye(3)*500, torch.arange(3))['brier'].max()<1e-12
    wrong = _scores(torch.eye(3)*500, torch.tensor([1,2,0]))
    assert wrong['brier'].mean().item()==pytest.approx(2)
    assert wrong['nll'].mean().item()==pytest.approx(500)   # not capped by the smallest float

# temperature

@pytest.mark.parametrize('scale', [.05, 1., 8., 60.])
def test_temperature_is_the_optimum(scale):
    z,y = draw(scale=scale)
    T = fit_temperature(z, y)
    best = minimize_scalar(lambda u: nll(z/math.exp(u), y), bounds=(-5,5), method='bounded', options=dict(xatol=1e-8))
    assert T==pytest.approx(math.exp(best.x), rel=1e-3)
    if 2*T<99: assert fit_temperature(2*z, y)==pytest.approx(2*T, rel=1e-4)

def test_temperature_bounds():
    with pytest.raises(ValueError, match='best temperature is 0'): fit_temperature(3*torch.eye(3), torch.arange(3))
    with pytest.warns(UserWarning, match='outside 0.01 to 100'):   # worse than chance: the more doubt the better
        assert 99<fit_temperature(torch.eye(3)*5, torch.tensor([1,2,0]))<=100
    z,y = draw()
    with pytest.warns(UserWarning, match='outside 0.01 to 100'): assert fit_temperature(z*1e-4, y)<.0101
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit_temperature(z, y)

def test_temperature_with_minus_infinity():
    z,y = draw()
    never = torch.cat([z, torch.full((500,1), -math.inf)], 1)
    assert fit_temperature(never, y)==pytest.approx(fit_temperature(z, y), rel=1e-6)
    row = _scores(never, y)
    assert all(v.double().isfinite().all() for v in row.values()) and ece(never, y)==ece(z, y)
    with pytest.raises(ValueError, match='probability 0'): fit_temperature(never, torch.where(torch.arange(500)==7, 5, y))

def test_calibrated_network(digits):
    x,y = digits
    model = net().eval()
    cool = calibrate(model, x, y)
    assert not cool.training and isinstance(cool, _Temperature)
    torch.testing.assert_close(cool(x)*cool.t, model(x))
    a,b = calibration_row(model, x, y),calibration_row(cool, x, y)
    assert a['accuracy']==b['accuracy'] and b['nll']<=a['nll']+1e-6

# rows, no trace, refusals

def test_row(digits):
    x,y = digits
    model = net()
    row = calibration_row(model, x, y, n_bins=10, bs=9)
    model.eval()
    with torch.no_grad(): z = model(x)
    assert row['name']=='calibration' and row['n']==80 and row['n_bins']==10
    s = _scores(z, y)
    want = dict(ece=ece(z,y,10), adaptive_ece=ece(z,y,10,True), ece_floor=ece(z,None,10), nll=s['nll'].mean(), brier=s['brier'].mean())
    for k,v in want.items(): assert row[k]==pytest.approx(float(v), abs=1e-5)
    assert row['accuracy']==(z.argmax(1)==y).double().mean().item()
    assert row['confidence']==pytest.approx(z.softmax(1).amax(1).mean().item(), abs=1e-5)
    for k,v in row['per_image'].items(): np.testing.assert_allclose([float(o) for o in v.split()], s[k].double(), atol=1e-5)
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

@pytest.mark.parametrize('f', [ece, fit_temperature, reliability])
def test_refusals(f):
    z,y = draw(20)
    bad = [(z.softmax(1), y, 'before the softmax'), (z[:9], y, 'one label per row'), (z/0, y, 'NaN'), (z, y+5, 'outside 0..4'),
           (z[0], y, 'float tensor'), (z[:0], y[:0], 'at least one')]
    for a,b,says in bad:
        with pytest.raises(ValueError, match=says): f(a, b)

def test_refuses_probabilities(digits):
    with pytest.raises(ValueError, match='before the softmax'): calibration_row(nn.Sequential(net(), nn.Softmax(1)), *digits)
    with pytest.raises(ValueError, match='n_bins 0'): reliability(*draw(), 0)
    with pytest.raises(ValueError, match='on_pixels'): calibration_row(net(), digits[0]*2-1, digits[1])
