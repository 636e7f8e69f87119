"Attention into masks: against literal transcriptions of Eq. 1 and of AutoMix, symmetries, precision, faults"
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from advmix.attention import *
from advmix.attention import _to_masks as to_masks
from advmix.attention import _attend

def loud(m, dtype=torch.float64):
    "Weights large enough that masks are far from flat"
    m = m.to(dtype)
    for p in m.parameters(): nn.init.normal_(p, std=.3)
    return m

def batch(b=5, n=3, c=6, h=4, w=3, dtype=torch.float64):
    lam = torch.rand(b, n, dtype=dtype)
    return torch.randn(b, c, h, w, dtype=dtype),torch.randint(b, (b,n)),lam/lam.sum(1, keepdim=True)

def literal(att, z, idx, lam):
    "Eq. 1 as printed: planes concatenated, every copy projected, a sum over the others, one pair of images at a time"
    b,n = idx.shape
    h,w = z.shape[2:]
    out = []
    for i in range(b):
        zs = [z[idx[i,k]] for k in range(n)]
        if att.q.in_channels>z.shape[1]: zs = [torch.cat([t, lam[i,k]*torch.ones(1,h,w).to(z)]) for k,t in enumerate(zs)]
        zs = [t[None] for t in zs]
        act = F.relu if att.relu else lambda t: t
        q,k,v = ([f(m(t)).flatten(2)[0] for t in zs] for m,f in ((att.q,act), (att.k,act), (att.v,lambda t: t)))
        P = []
        for j in range(n):
            s = sum((q[j].T@k[l]/math.sqrt(len(q[j])) for l in range(n) if l!=j), torch.zeros(h*w,h*w).to(z))
            P.append((torch.softmax(s, 1)*v[j]).sum(1).view(h,w))
        out.append(torch.stack(P))
    return torch.stack(out)

@pytest.mark.parametrize('plane', (True,False))
@pytest.mark.parametrize('relu', (True,False))
@pytest.mark.parametrize('n', (1,2,3,4))
def test_equation_1(n, relu, plane):
    att = loud(MixAttention(6, plane, relu))
    z,idx,lam = batch(n=n)
    torch.testing.assert_close(att(z, idx, lam), literal(att, z, idx, lam), atol=1e-12, rtol=0)

def test_automix():
    att = loud(PairAttention(6))
    z,idx,lam = batch(n=2)
    mask = to_masks(att(z, idx, lam), (8,6), 'nearest')
    for i in range(5):
        za,zb = (torch.cat([z[idx[i,k]], lam[i,k].expand(1,4,3)])[None] for k in (0,1))
        q,k,v = att.qk(za).flatten(2)[0],att.qk(zb).flatten(2)[0],att.v(zb).flatten(2)[0]
        m_b = torch.sigmoid(F.interpolate(((q.T@k/math.sqrt(3)).softmax(1)@v.T).view(1,1,4,3), scale_factor=2, mode='nearest'))[0,0]
        torch.testing.assert_close(mask[i], torch.stack([1-m_b,m_b]), atol=1e-12, rtol=0)

def test_published_number_of_parameters():
    assert sum(p.numel() for p in MixAttention(256, lam_plane=False).parameters())==66049

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0,9999), b=st.integers(1,6), n=st.integers(1,5), h=st.integers(1,5), w=st.integers(1,5),
       up=st.sampled_from(('bilinear','nearest')))
def test_masks_and_symmetries(seed, b, n, h, w, up):
    torch.manual_seed(seed)
    att = loud(MixAttention(4))
    z,idx,lam = batch(b, n, 4, h, w)
    P = att(z, idx, lam)
    m = to_masks(P, (2*h+1,3*w), up)
    assert m.shape==(b,n,2*h+1,3*w) and m.min()>0 and m.max()<1+1e-12
    torch.testing.assert_close(m.sum(1), torch.ones_like(m[:,0]), atol=1e-6, rtol=0)
    order,rows = torch.randperm(n),torch.randperm(b)
    same = lambda a, b: torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    same(att(z, idx[:,order], lam[:,order]), P[:,order])
    same(att(z, idx[rows], lam[rows]), P[rows])
    same(att(z[rows], rows.argsort()[idx], lam), P)

def test_starts_flat_whatever_the_ratio():
    z,idx,lam = batch(n=3, c=64, dtype=torch.float32)
    assert (to_masks(MixAttention(64)(z, idx, lam), (8,8))-1/3).abs().max()<.02

@pytest.mark.parametrize('cls,idle', ((MixAttention,{'k.bias','v.bias'}), (PairAttention,set())))
def test_every_parameter_learns(cls, idle):
    "A bias of the keys is the same for every key, one of the values the same for every image: neither softmax can see it"
    att = loud(cls(6))
    z,idx,lam = batch(n=2)
    (to_masks(att(z, idx, lam), (8,8))[:,1]*torch.randn(8,8)).sum().backward()
    assert {n for n,p in att.named_parameters() if p.grad.abs().max()<1e-12}==idle

def test_gradient_in_float64():
    z,idx,lam = batch(b=2, n=2, c=2, h=2, w=2)
    att = loud(MixAttention(2))
    assert torch.autograd.gradcheck(lambda z: to_masks(att(z, idx, lam), (4,4)), (z.requires_grad_(),))

@pytest.mark.parametrize('dtype', (torch.float16,torch.bfloat16))
def test_half_precision_features(dtype):
    z,idx,lam = batch(dtype=torch.float32)
    att = loud(MixAttention(6), torch.float32)
    full,half = (to_masks(att(t, idx, lam), (8,6)) for t in (z, z.to(dtype)))
    assert half.dtype==torch.float32
    torch.testing.assert_close(half, full, atol=.05, rtol=0)
    with torch.autocast('cpu', dtype=torch.bfloat16): auto = to_masks(att(z, idx, lam), (8,6))
    assert auto.dtype==torch.float32
    torch.testing.assert_close(auto.sum(1), torch.ones(5,8,6), atol=1e-6, rtol=0)
    torch.testing.assert_close(auto, full, atol=.05, rtol=0)

def test_scores_that_overflow_float16():
    big = torch.full((1,256,4), 20.).half()
    P,A = _attend(big, big, big)
    assert A.dtype==torch.float32 and P.isfinite().all()

def test_faults():
    z,idx,lam = batch()
    with pytest.raises(ValueError, match='z has 6 channels'): loud(MixAttention(9))(z, idx, lam)
    with pytest.raises(ValueError, match='mixes pairs'): loud(PairAttention(6))(z, idx, lam)
