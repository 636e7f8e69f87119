"Looking inside: Grad-CAM against the formula on CNNs and Swin, segments and planes hit their corners, nothing left behind"
import sys
import pytest, torch, torch.nn.functional as F
from torch import nn
from advmix.interp import grad_cam, gradient_axes, overlay, plane, plot_plane, segment, segment_loss, show_mask_history
from advmix.models import find_stage, get_model

def cnn(inplace=True): return nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4,6,3,stride=2,padding=1), nn.ReLU(inplace), nn.Dropout(.5), nn.Flatten(), nn.Linear(96,10))

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

def state(m): return [(k.training, len(k._forward_hooks), len(k._forward_pre_hooks)) for k in m.modules()],[p.requires_grad for p in m.parameters()],[p.grad for p in m.parameters()]

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
        plane(model, x[0], *gradient_axes(model, x[0], 1, x[1]), torch.linspace(0,1,3), torch.linspace(0,1,3))
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
    "Probabilities that are linear in the first pixel: no loss on any segment"
    def forward(self, x):
        p = x[:,0,0,0]
        return torch.stack([1-p, p], 1).clamp_min(1e-30).log()

def test_a_network_linear_between_images_has_no_segment_loss():
    kl = segment_loss(Linear(), torch.zeros(1,1,2,2), torch.tensor([0]), torch.ones(1,1,2,2), torch.tensor([1]))
    assert kl.abs().max()<1e-5

# plane

def test_plane(x):
    model,a,b = cnn(False).eval(),x[0],x[1]
    u,v = gradient_axes(model, a, 4, b)
    assert abs((u*v).sum())<1e-4 and torch.allclose(u.norm(), v.norm()) and torch.equal(u, b-a)
    z = a[None].clone().requires_grad_()
    g = torch.autograd.grad(F.cross_entropy(model(z), torch.tensor([4])), z)[0][0]
    in_plane = (g*u).sum()/(u*u).sum()*u + (g*v).sum()/(v*v).sum()*v
    assert (g*v).sum()>0 and torch.allclose(in_plane, g, atol=1e-6)
    s,r = torch.tensor([0.,.5,1.]),torch.tensor([-.1,0.,.2,.4])
    out = plane(model, a, u, v, s, r, bs=5)
    assert out.shape==(4,3,10)
    with torch.no_grad():
        for i in range(4):
            for j in range(3): torch.testing.assert_close(out[i,j], model((a+s[j]*u+r[i]*v)[None])[0])
    axs = plot_plane(dict(one=out), s, r, points=[(0,0,'a')])
    assert len(axs)==1 and len(plot_plane(dict(one=out, two=out), s, r, 4))==2

def test_refusals(x):
    model = cnn()
    with pytest.raises(ValueError, match='same shape'):     segment(model, x, x[:1])
    with pytest.raises(ValueError, match='same image'):     gradient_axes(model, x[0], 1, x[0])
    with pytest.raises(ValueError, match='gradient vanishes'): gradient_axes(nn.Sequential(nn.Flatten(), nn.Linear(64,10), nn.Hardtanh(-1e-9,1e-9)), x[0]*100, 1, x[1])
    with pytest.raises(ValueError, match='masks is empty'): show_mask_history([])
    with pytest.raises(ValueError, match='on_pixels'):      grad_cam(model, x*3)

def test_mask_history():
    flat,hard = torch.full((2,3,4,4), 1/3),F.one_hot(torch.randint(3,(2,4,4)),3).permute(0,3,1,2).float()
    axs = show_mask_history([flat,hard], ['0','9'], n=5)
    assert axs.shape==(2,2) and 'H 1.00' in axs[0,0].get_title() and 'H 0.00' in axs[0,1].get_title().replace('-','')
