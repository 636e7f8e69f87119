"AOM-style geometric labels: what must hold whatever the paper did, in float64"
import pytest, torch
from hypothesis import given, settings, strategies as st
from advmix.labels import geometric_weight

rules = 'projection', 'distance'
EPS = 8/255

def pairs(b=16, shape=(3,5,4), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    a, c = (torch.rand(b, *shape, generator=g, dtype=dtype) for _ in range(2))
    return a, c, torch.rand(b, generator=g, dtype=dtype)

def mix(a, b, lam): return lam.view(-1,1,1,1)*a + (1-lam).view(-1,1,1,1)*b

@pytest.mark.parametrize('rule', rules)
def test_on_the_segment_the_weight_is_the_ratio(rule):
    a,b,lam = pairs()
    lam[0], lam[1] = 0., 1.
    assert (geometric_weight(mix(a,b,lam), a, b, rule)-lam).abs().max()<=1e-12

@pytest.mark.parametrize('rule', rules)
def test_swapping_the_images_swaps_the_weight(rule):
    a,b,lam = pairs()
    p = mix(a,b,lam) + EPS*torch.randn_like(a).sign()
    assert (geometric_weight(p,a,b,rule) - (1-geometric_weight(mix(b,a,1-lam)+(p-mix(a,b,lam)),b,a,rule))).abs().max()<=1e-12

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0,2**31), eps=st.floats(0,.5), rule=st.sampled_from(rules), scale=st.sampled_from([1.,1e-3,1e-8]))
def test_weights_are_shares(seed, eps, rule, scale):
    a,b,lam = pairs(4, (1,3,3), seed)
    b = a+scale*(b-a)   # nearly equal images too
    p = mix(a,b,lam) + eps*(2*torch.rand_like(a)-1)
    w = geometric_weight(p, a, b, rule)
    assert w.shape==(4,) and (w>=0).all() and (w<=1).all()
    both = torch.stack([w, 1-w], 1)
    assert (both.sum(1)-1).abs().max()<=1e-12 and (both>=0).all()

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0,2**31), eps=st.floats(0,.3))
def test_projection_is_bounded_by_hoelder(seed, eps):
    a,b,lam = pairs(6, (2,3,3), seed)
    D = a-b
    bound = eps*D.abs().flatten(1).sum(1)/D.square().flatten(1).sum(1)
    w = geometric_weight(mix(a,b,lam) + eps*(2*torch.rand_like(a)-1), a, b, 'projection')
    assert ((w-lam).abs()<=bound+1e-12).all()

def test_walking_along_the_sign_of_D_reaches_the_bound():
    a,b,lam = pairs(shape=(3,16,16))
    D = a-b
    bound = EPS*D.abs().flatten(1).sum(1)/D.square().flatten(1).sum(1)
    w = geometric_weight(mix(a,b,lam) + EPS*D.sign(), a, b, 'projection')
    assert torch.allclose(w, (lam+bound).clamp(0,1), atol=1e-12, rtol=0)

def test_projection_is_lambda_plus_the_share_along_D():
    a,b,lam = pairs()
    d, D = .05*torch.randn_like(a), a-b
    want = (lam + (d*D).flatten(1).sum(1)/D.square().flatten(1).sum(1)).clamp(0,1)
    assert (geometric_weight(mix(a,b,lam)+d, a, b, 'projection')-want).abs().max()<=1e-12

def test_distance_closed_form():
    a,b,_ = pairs(11)
    lam, D = torch.linspace(0,1,11,dtype=a.dtype), a-b
    d = torch.randn_like(a)
    d = .05*(d - ((d*D).flatten(1).sum(1)/D.square().flatten(1).sum(1)).view(-1,1,1,1)*D)   # orthogonal to D
    u, v = d.flatten(1).norm(dim=1), D.flatten(1).norm(dim=1)
    A, B = (lam**2*v**2+u**2).sqrt(), ((1-lam)**2*v**2+u**2).sqrt()
    assert (geometric_weight(mix(a,b,lam)+d, a, b, 'distance')-A/(A+B)).abs().max()<=1e-12

@pytest.mark.parametrize('rule', rules)
def test_one_image_twice_keeps_the_ratio(rule):
    a,_,lam = pairs()
    assert torch.equal(geometric_weight(a+.01*torch.randn_like(a), a, a, rule, lam), lam)
    assert torch.equal(geometric_weight(a, a, a, rule, .25), torch.full((16,), .25, dtype=a.dtype))

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float32))
def test_half_precision_is_computed_in_float32(dtype):
    a,b,lam = pairs(shape=(3,64,64), dtype=torch.float32)   # squares of 12,288 differences overflow nothing in float32
    for rule in rules:
        w = geometric_weight(*(t.to(dtype) for t in (mix(a,b,lam), a, b)), rule)
        assert w.dtype==torch.float32 and (w-lam).abs().max()<2e-2

def test_no_gradient_and_inputs_untouched():
    a,b,lam = pairs()
    a.requires_grad_()
    v = a._version, b._version
    assert not geometric_weight(mix(a,b,lam), a, b).requires_grad
    assert v==(a._version, b._version)

def test_clear_errors():
    a,b,lam = pairs()
    with pytest.raises(ValueError, match="'ratio' unknown.*projection"): geometric_weight(a, a, b, 'ratio')
    with pytest.raises(ValueError, match='its own two images'): geometric_weight(a[:3], a, b)

@pytest.mark.parametrize('rule', rules)
def test_only_the_same_image_counts_as_the_same(rule):
    "The guard is for images that are equal, not for images that are nearly so"
    a = torch.full((3,1,2,2), .5, dtype=torch.float64)
    b,lam = a.clone(),torch.tensor([.9,.9,.9], dtype=torch.float64)
    b[0,0,0,0] += 1e-11    # further apart than 1e-12: the rule decides
    b[1,0,0,0] += 2e-13    # nearer: the ratio
    p = .25*a+.75*b
    w = geometric_weight(p, a, b, rule, lam)
    assert abs(w[0]-.25)<1e-4 and w[1]==.9 and w[2]==.9

def test_a_number_for_the_ratio_and_its_default():
    a,_,_ = pairs()
    assert (geometric_weight(a, a, a)==.5).all() and (geometric_weight(a, a, a, lam=1)==1).all()

def test_the_module_says_whose_reading_this_is():
    import advmix.labels
    assert 'AOM-style' in advmix.labels.__doc__
