"Intervals: against formulas and published values, and they hold the truth as often as they say, also where little varies"
import math
import numpy as np, pytest, torch
from scipy.stats import binom, multinomial, norm
from advmix.intervals import bootstrap, paired, wilson

# one share

def test_wilson_against_its_formula_and_published_values():
    z = 1.959963984540054
    for k,n in [(0,10), (10,10), (81,263), (148,150)]:
        lo,hi = wilson(k, n)
        mid,half = (k+z*z/2)/(n+z*z),z/(n+z*z)*math.sqrt(k*(n-k)/n+z*z/4)
        assert abs(lo-(mid-half))<1e-9 and abs(hi-(mid+half))<1e-9
    assert [round(v, 4) for v in wilson(81, 263)]==[.2553,.3662]       # Newcombe 1998, Table I

@pytest.mark.parametrize('n', [48,150])
def test_wilson_coverage(n):
    ends = np.array([wilson(k, n) for k in range(n+1)])
    got = [binom.pmf(np.arange(n+1), n, p)[(ends[:,0]<=p)&(p<=ends[:,1])].sum() for p in np.linspace(.005, .995, 100)]
    assert np.mean(got)>.945 and np.quantile(got, .1)>.92

# a paired difference

def verdicts(plus, minus, n):
    v = np.zeros((2,n), dtype=bool)
    v[1,:plus],v[0,plus:plus+minus] = True,True
    return v

def ends(n):
    "All outcomes of `n` images and their intervals; the formula is held against `paired` below"
    plus,minus = (v.ravel() for v in np.mgrid[:n+1,:n+1])
    plus,minus = plus[plus+minus<=n],minus[plus+minus<=n]
    p,q,z = (plus+1)/(n+2),(minus+1)/(n+2),norm.ppf(.975)
    half = z*np.sqrt((p+q-(p-q)**2)/(n+2))
    d = (plus-minus)/n
    return plus,minus,np.minimum(p-q-half, d).clip(-1),np.maximum(p-q+half, d).clip(max=1)

def test_paired_is_bonett_and_price():
    n = 30
    plus,minus,lo,hi = ends(n)
    for k in range(0, len(plus), 17):
        assert paired(*verdicts(plus[k], minus[k], n))==pytest.approx(((plus[k]-minus[k])/n, lo[k], hi[k]))
    assert paired(torch.tensor([True,False]), torch.tensor([True,True]))[0]==.5

@pytest.mark.parametrize('n', [20,50,100,150])
def test_paired_coverage_also_where_little_is_discordant(n):
    plus,minus,lo,hi = ends(n)
    worst = 1.
    for share in (.0005,.002,.005,.01,.02,.04,.08,.15,.3,.6,.95):
        for one in (.5,.6,.75,.9,1.):
            p,q = share*one,share*(1-one)
            pm = multinomial.pmf(np.c_[plus,minus,n-plus-minus], n, [p,q,1-p-q])
            worst = min(worst, pm[(lo<=p-q+1e-12)&(p-q-1e-12<=hi)].sum())
    assert worst>=.93

def test_paired_by_simulation():
    rng,n,held = np.random.default_rng(0),150,[]
    for _ in range(400):                                               # 1 % of images are right only under the new network
        a = rng.random(n)<.8
        b = a|(rng.random(n)<.05)
        lo,hi = paired(a, b)[1:]
        held.append(lo<=.2*.05<=hi)
    assert np.mean(held)>=.93

def test_paired_has_width_and_is_symmetric():
    a = np.arange(150)<140
    d,lo,hi = paired(a, a)
    assert d==0 and lo<0<hi and hi==pytest.approx(-lo)
    b = np.arange(150)<147
    assert paired(b, a)==pytest.approx(tuple(-v for v in np.array(paired(a, b))[[0,2,1]]))
    assert -1<=paired(~b&False, b|True)[2]<=1
    for bad in (b[:5], np.zeros((2,75), bool)):
        with pytest.raises(ValueError, match='same images'): paired(a, bad)

# means

def test_bootstrap_against_indices():
    rng = np.random.default_rng(1)
    v = rng.beta(4, 2, 200)
    m,lo,hi = bootstrap(v, None)
    again = [rng.choice(v, 200).mean() for _ in range(4000)]
    assert m==pytest.approx(v.mean()) and [lo,hi]==pytest.approx(np.quantile(again, [.025,.975]), abs=.004)
    assert bootstrap(v)==bootstrap(v) and bootstrap(v, seed=1)!=bootstrap(v)
    big = bootstrap(np.repeat(rng.random(3000), 3))                   # drawn in pieces, for memory's sake
    assert big[2]-big[1]==pytest.approx(2*1.96*.29/9000**.5, rel=.15)

def test_bootstrap_has_width_where_nothing_varies():
    assert bootstrap(np.ones(150))[1]<.99 and bootstrap(np.zeros(150))[2]>.01
    d,lo,hi = bootstrap(np.zeros(150), (-1,1))
    assert d==0 and lo<0<hi
    assert bootstrap(np.ones(9), None)==(1,1,1)

@pytest.mark.parametrize('a,b,n', [(6,1,60), (1,1,60), (.3,.02,60), (.02,.5,150)])
def test_bootstrap_coverage(a, b, n):
    rng = np.random.default_rng(2)
    held = []
    for i in range(400):
        v = rng.binomial(55, rng.beta(a, b, n))/55
        _,lo,hi = bootstrap(v, draws=400, seed=i)
        held.append(lo<=a/(a+b)<=hi)
    assert np.mean(held)>=.925, np.mean(held)

def test_bootstrap_of_differences_coverage():
    rng,held = np.random.default_rng(3),[]
    for i in range(400):                                               # networks that agree on 95 of 100 images
        d = (rng.random(150)<.05)*rng.choice([-.2,.4], 150)
        _,lo,hi = bootstrap(d, (-1,1), draws=400, seed=i)
        held.append(lo<=.05*.1<=hi)
    assert np.mean(held)>=.93
