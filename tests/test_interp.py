"Looking inside: Grad-CAM against the formula on CNNs and Swin, segments and planes hit their corners, nothing left behind"
import sys
import pytest, torch, torch.nn.functional as F
from torch import nn
from advmix.attack import Threat
from advmix.interp import _gradient_axes, _plane, grad_cam, _overlay as overlay, plot_plane, _segment as segment, segment_loss
from advmix.models import find_stage, get_model

def cnn(inplace=True):
    return nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4,6,3,stride=2,padding=1),
                         nn.ReLU(inplace), nn.Dropout(.5), nn.Flatten(), nn.Linear(96,10))

@pytest.fixture
def x(): return torch.rand(3,1,8,8)

# Grad-CAM

def by_hand(model, x, y, stage):
    got = {}
    name,module = find_stage(model, stage)
    hook = module.register_forward_hook(lambda m,i,o: got.update(f=o))
    z = model(x)
    hook.remove()
    g = torch.autograd.grad(z.gather(1, y[:,None]).sum(), got['f'])[0]
    f,g = (t.permute(0,3,1,2) if 'swin' in str(type(list(model.net.modules())[0])).lower() else t for t in (got['f'],g))
    cam = F.interpolate((g.mean((2,3), keepdim=True)*f).sum(1, keepdim=True).relu().detach(), x.shape[-2:], mode='bilinear')[:,0]
    return cam/cam.amax((1,2), keepdim=True).clamp_min(1e-12)

@pytest.mark.parametrize('arch', ['convnet', 'preact_resnet18', 'resnet18', 'swin_t', 'convnext_t'])
def test_grad_cam_is_the_formula(arch):
    pytest.importorskip('captum')
    model,x,y = get_model(arch, 10, c_in=3, size=32).eval(),torch.rand(2,3,32,32),torch.tensor([3,7])
    for stage in (-1,1): torch.testing.assert_close(grad_cam(model, x, y, stage), by_hand(model, x, y, stage), atol=1e-3, rtol=1e-3)

def test_grad_cam_targets(x):
    pytest.importorskip('captum')
    model = cnn(False).eval()
    y = model(x).argmax(1)
    torch.testing.assert_close(grad_cam(model, x), grad_cam(model, x, y))
    torch.testing.assert_close(grad_cam(model, x, 3), grad_cam(model, x, torch.tensor([3,3,3])))
    cam = grad_cam(model, x)
    assert cam.shape==(3,8,8) and cam.min()>=0 and cam.max()<=1 and not cam.requires_grad
    with torch.no_grad(): torch.testing.assert_close(grad_cam(model, x), cam)   # also where gradients are off
    for p in model.parameters(): p.requires_grad_(False)
    torch.testing.assert_close(grad_cam(model, x), cam)                         # and with frozen weights

def state(m):
    hooks = [(k.training, len(k._forward_hooks), len(k._forward_pre_hooks)) for k in m.modules()]
    return hooks,[p.requires_grad for p in m.parameters()],[p.grad for p in m.parameters()]

@pytest.mark.parametrize('fails', [False, True])
def test_no_trace(x, fails):
    pytest.importorskip('captum')
    model = cnn()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    if fails: model[7] = nn.Linear(5,10)
    before,bufs,rng,x0 = state(model),[b.clone() for b in model.buffers()],torch.get_rng_state(),x.clone()
    def run():
        grad_cam(model, x, 1)
        segment(model, x, x.flip(0))
        segment_loss(model, x, torch.arange(3), x.flip(0), torch.arange(3), torch.tensor([0.,.5]), Threat(eps=.1, steps=2))
        plot_plane(dict(one=model), x[0], 1, x[1], s=(0,1,3), r=(0,1,3))
    if fails:
        with pytest.raises(RuntimeError): run()
    else: run()
    assert state(model)==before and all(torch.equal(a, b) for a,b in zip(bufs, model.buffers()))
    assert torch.equal(rng, torch.get_rng_state()) and torch.equal(x, x0) and not x.requires_grad

def test_without_captum(monkeypatch, x):
    monkeypatch.setitem(sys.modules, 'captum.attr', None)
    with pytest.raises(ImportError, match=r"pip install 'advmix\[interp\]'"): grad_cam(cnn(), x)

def test_overlay(x):
    y = overlay(x, torch.rand(3,8,8))
    assert y.shape==(3,3,8,8) and y.min()>=0 and y.max()<=1
    torch.testing.assert_close(overlay(x, torch.rand(3,8,8), 0.), x.expand(3,3,8,8))

# segment

def test_segment(x):
    model = cnn().eval()
    z = segment(model, x, x.flip(0), torch.tensor([0.,.25,1.]))
    assert z.shape==(3,3,10)
    with torch.no_grad():
        for k,t in enumerate((0.,.25,1.)): torch.testing.assert_close(z[k], model((1-t)*x+t*x.flip(0)))
    assert segment(model, x, x).shape==(41,3,10)

def test_segment_loss(x):
    model,ya,yb,t = cnn().eval(),torch.tensor([1,2,3]),torch.tensor([4,5,3]),torch.tensor([0.,.3,1.])
    kl = segment_loss(model, x, ya, x.flip(0), yb, t)
    with torch.no_grad():
        for k,s in enumerate(t):
            q = (1-s)*F.one_hot(ya,10)+s*F.one_hot(yb,10)
            ce = F.cross_entropy(model((1-s)*x+s*x.flip(0)), q, reduction='none')
            torch.testing.assert_close(kl[k], ce-torch.special.entr(q).sum(1))
    assert (kl>=0).all()

class Linear(nn.Module):
    "Probabilities that are linear in the first pixel, exactly 0 and 1 at the ends: no loss on any segment"
    def forward(self, x):
        p = x[:,0,0,0]
        return torch.stack([1-p, p], 1).log()

def test_a_network_linear_between_images_has_no_segment_loss():
    ends = torch.zeros(1,1,2,2),torch.tensor([0]),torch.ones(1,1,2,2),torch.tensor([1])
    assert segment(Linear(), *ends[::2])[0].isinf().any()                      # a logit of minus infinity at the end
    kl = segment_loss(Linear(), *ends)
    assert kl.isfinite().all() and kl.abs().max()<1e-5
    wrong = segment_loss(Linear(), ends[0], ends[3], ends[2], ends[1])          # the labels the other way round
    assert wrong[0].isinf() and wrong[-1].isinf() and wrong[20].item()==pytest.approx(0, abs=1e-5)

class Slope(nn.Module):
    "Two classes, logits linear in the mean pixel: the worst point of the ball is known"
    def forward(self, x):
        m = 10*(x.mean((1,2,3))-.5)
        return torch.stack([-m, m], 1)

def test_segment_loss_under_attack():
    model,xa,xb = Slope(),torch.full((2,1,4,4), .2),torch.full((2,1,4,4), .8)
    ya,yb,t = torch.tensor([0,0]),torch.tensor([1,1]),torch.tensor([0.,.5,1.])
    clean = segment_loss(model, xa, ya, xb, yb, t)
    kl    = segment_loss(model, xa, ya, xb, yb, t, Threat(eps=.1, steps=20))
    assert (kl>2*clean).all()
    torch.testing.assert_close(kl[0], F.cross_entropy(model(xa+.1), ya, reduction='none'))   # all pixels towards the other class
    torch.testing.assert_close(kl[2], F.cross_entropy(model(xb-.1), yb, reduction='none'))
    q = torch.full((2,2), .5)                                                               # in the middle either way is the worst
    torch.testing.assert_close(kl[1], F.cross_entropy(model(torch.full_like(xa, .6)), q, reduction='none')-torch.log(torch.tensor(2.)))
    torch.testing.assert_close(segment_loss(model, xa, ya, xb, yb, t, Threat(eps=0., steps=3)), clean)
    again = segment_loss(model, xa, ya, xb, yb, t, Threat(eps=.1, steps=3), seed=1)
    assert torch.equal(again, segment_loss(model, xa, ya, xb, yb, t, Threat(eps=.1, steps=3), seed=1))

# plane

def test_plane(x):
    model,a,b = cnn(False).eval(),x[0],x[1]
    u,v = _gradient_axes(model, a, 4, b)
    assert abs((u*v).sum())<1e-4 and torch.allclose(u.norm(), v.norm()) and torch.equal(u, b-a)
    z = a[None].clone().requires_grad_()
    g = torch.autograd.grad(F.cross_entropy(model(z), torch.tensor([4])), z)[0][0]
    in_plane = (g*u).sum()/(u*u).sum()*u + (g*v).sum()/(v*v).sum()*v
    assert (g*v).sum()>0 and torch.allclose(in_plane, g, atol=1e-6)
    s,r = torch.tensor([0.,.5,1.]),torch.tensor([-.1,0.,.2,.4])
    out = _plane(model, a, u, v, s, r, bs=5)
    assert out.shape==(4,3,10)
    with torch.no_grad():
        for i in range(4):
            for j in range(3): torch.testing.assert_close(out[i,j], model((a+s[j]*u+r[i]*v)[None])[0])
    axs = plot_plane(dict(one=model, two=cnn()), a, 4, b, s=(0,1,3), r=(-.1,.4,4))
    assert [ax.get_title() for ax in axs]==['one','two'] and axs[0].images[0].get_array().shape==(4,3)
    corners = torch.stack([a-.1*v, b-.1*v])
    with torch.no_grad(): loss = F.cross_entropy(model(corners), torch.tensor([4,4]), reduction='none')
    assert axs[0].images[0].get_array()[0,[0,2]].tolist()==pytest.approx(loss.tolist(), abs=1e-4)
    assert plot_plane(dict(one=model), a, 4, b, loss=False, s=(0,1,3), r=(0,1,3))[0].images[0].get_array().shape==(3,3,3)

def test_refusals(x):
    model = cnn()
    with pytest.raises(ValueError, match='same shape'):     segment(model, x, x[:1])
    with pytest.raises(ValueError, match='same shape'):     segment_loss(model, x, torch.arange(3), x[:1], torch.arange(3))
    with pytest.raises(ValueError, match='same image'):     plot_plane(dict(a=model), x[0], 1, x[0])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64,10), nn.Hardtanh(-1e-9,1e-9))
    with pytest.raises(ValueError, match='gradient vanishes'): plot_plane(dict(a=flat), x[0]*100, 1, x[1])
    with pytest.raises(ValueError, match='on_pixels'):      grad_cam(model, x*3)
