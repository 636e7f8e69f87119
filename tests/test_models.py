"Networks: pixels in, published sizes, stages on every architecture, and a tap that leaves nothing behind"
import copy
import pytest, torch, torch.nn as nn, torch.nn.functional as F, torchvision
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import create_vision_model
from advmix.models import *
from advmix.models import _stage_shapes as stage_shapes
from advmix.models import _torchvision_net

def n_params(m): return sum(p.numel() for p in m.parameters())

def gmacs(net, x):
    with FlopCounterMode(display=False) as count, torch.no_grad(): net.eval()(x)
    return count.get_total_flops()/2/len(x)/1e9

def meta(arch, n=10, **kw):
    with torch.device('meta'): return get_model(arch, n, **kw)

@pytest.fixture(scope='module')
def nets():
    made = {}
    def get(arch): return made.setdefault(arch, get_model(arch, 10).eval())
    return get

def test_normalize_and_back():
    x,mean,std = torch.rand(4,3,5,7),[.1,.5,.9],[.2,.3,.4]
    z = Normalize(mean, std)(x)
    assert torch.allclose(z[:,1], (x[:,1]-.5)/.3)
    fastai_form = [torch.tensor(o)[None,:,None,None] for o in (mean,std)]
    for m,s in ((mean,std), fastai_form): assert torch.allclose(denormalize(z, m, s), x, atol=1e-6)

def test_normalize_moves_and_saves():
    n = Normalize(.5, [.2])
    assert set(n.state_dict())=={'mean','std'} and not list(n.parameters())
    m = Normalize(0., 1.)
    m.load_state_dict(n.state_dict())
    assert m.mean.item()==.5 and n.double().mean.dtype==torch.double
    for dtype in (torch.half, torch.bfloat16, torch.double): assert Normalize(.5,.2)(torch.rand(1,1,2,2, dtype=dtype)).dtype==dtype
    a = torch.tensor([.5])
    Normalize(a, .2).mean.add_(1)
    assert a.item()==.5

def test_normalize_refuses_zero_std():
    with pytest.raises(ValueError, match='above 0'): Normalize([.5,.5], [.2,0.])

@pytest.mark.parametrize('training', [True,False])
def test_on_pixels_is_the_model_on_normalised_images(training):
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*36,10)).train(training)
    x,mean,std = torch.rand(2,3,8,8),torch.tensor([.1,.5,.9]),torch.tensor([.2,.3,.4])
    net = on_pixels(model, mean, std)
    assert net.net is model and net.training==training and model.training==training
    ref = copy.deepcopy(model)
    assert torch.equal(net(x), ref((x-mean[None,:,None,None])/std[None,:,None,None]))
    assert on_pixels(model) is model

def test_pixel_gradient_is_scaled_by_one_over_std():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12,3)).double()
    x,std = torch.rand(2,3,2,2, dtype=torch.double, requires_grad=True),[.2,.3,.4]
    z = Normalize(.5, std)(x).detach().requires_grad_()
    gx, = torch.autograd.grad(on_pixels(model, .5, std)(x).square().sum(), x)
    gz, = torch.autograd.grad(model(z).square().sum(), z)
    assert torch.allclose(gx, gz/torch.tensor(std)[:,None,None].double(), rtol=1e-5)

@pytest.mark.parametrize('arch,n', [
    ('preact_resnet18',11_172_170), ('wrn34_10',46_160_474), ('resnet18',11_173_962), ('resnet34',21_282_122), ('resnet50',23_520_842)])
def test_published_sizes(arch, n): assert n_params(meta(arch))==n

@pytest.mark.parametrize('arch,g', [('resnet18',.5555),('preact_resnet18',.5555),('wrn34_10',6.66)])
def test_published_costs(arch, g): assert abs(gmacs(meta(arch), torch.rand(1,3,32,32, device='meta'))/g-1)<2e-3

def test_standard_stem_is_torchvisions():
    torch.manual_seed(0)
    ref = torchvision.models.resnet18()
    torch.manual_seed(0)
    ours = _torchvision_net('resnet18', 1000, 3, 64, False, False)
    x = torch.rand(1,3,64,64)
    assert torch.equal(ours.eval()(x), ref.eval()(x))
    assert torch.equal(torch.tensor([p.numel() for p in ours.parameters()]), torch.tensor([p.numel() for p in ref.parameters()]))

@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('c_in,size,n', [(1,8,10),(3,32,100),(4,64,2)])
def test_every_net_on_every_size(arch, c_in, size, n):
    net = meta(arch, n, c_in=c_in, size=size).eval()
    assert net(torch.rand(2,c_in,size,size, device='meta')).shape==(2,n)
    assert next(net.children()) is net.norm and isinstance(net.norm, Normalize)

@pytest.mark.parametrize('arch,sides', [('resnet18',(64,32,16,8)),('swin_t',(16,8,4,2)),('convnext_t',(16,8,4,2))])
def test_small_stem_at_64_and_standard_above(arch, sides):
    maps = lambda size, **kw: tuple(s[-1] for s in shapes_on_meta(meta(arch, size=size, **kw), size).values())
    assert maps(64)==sides
    assert maps(224)==(56,28,14,7) and maps(64, small_stem=False)==(16,8,4,2)

def shapes_on_meta(net, size): return stage_shapes(net, torch.rand(1,3,size,size, device='meta'))

@pytest.mark.parametrize('size,sides', [(8,(8,4,4)),(16,(16,8,4)),(28,(28,14,7)),(32,(32,16,8)),(9,(9,5,5)),(5,(5,5,5))])
def test_convnet_keeps_at_least_four_pixels(size, sides):
    assert tuple(s[-1] for s in shapes_on_meta(meta('convnet', size=size), size).values())==sides

@pytest.mark.parametrize('bad,says', [
    (dict(arch='vgg'),                          'use one of convnet, preact_resnet18, wrn34_10, resnet18'),
    (dict(arch='convnet', pretrained=True),     'without published weights'),
    (dict(arch='wrn34_10', small_stem=False),   'small images'),
    (dict(arch='convnet', c_in=1, mean=[.1]*3), 'mean has 3 numbers for images of 1 channels'),
    (dict(arch='convnet', c_in=3, std=[.1]*2),  'std has 2 numbers'),
])
def test_get_model_says_what_is_wrong(bad, says):
    with pytest.raises(ValueError, match=says): get_model(**bad)

@pytest.mark.parametrize('arch', ['alexnet','densenet121','efficientnet_b0','googlenet','inception_v3',
    'mnasnet0_5','mobilenet_v2','mobilenet_v3_small','regnet_x_400mf','resnet101','resnext101_32x8d','shufflenet_v2_x0_5',
    'squeezenet1_1','swin_v2_t','vgg11_bn','vit_b_16','wide_resnet50_2','convnext_tiny','maxvit_t'])
def test_any_classification_network_of_torchvision(arch):
    size = dict(inception_v3=299).get(arch, 224)
    net = get_model(arch, 7, size=size).to('meta') if 'regnet' in arch else meta(arch, 7, size=size)   # its builder computes
    assert net.train()(torch.rand(2,3,size,size, device='meta')).shape==(2,7)   # a tensor in training too
    assert sum(p.numel() for p in net.parameters())>1e5 and isinstance(stages(net), dict)
    if arch in ('maxvit_t','regnet_x_400mf'): return
    assert meta(arch, 5, c_in=1, size=size).eval()(torch.rand(1,1,size,size, device='meta')).shape==(1,5)

@pytest.mark.parametrize('arch', ['squeezenet1_1','vit_b_16','mobilenet_v2','swin_t'])
def test_published_weights_get_a_head_for_our_classes(arch, monkeypatch):
    import torchvision.models as m
    real = m.get_model
    monkeypatch.setattr(m, 'get_model', lambda name, weights=None, **kw: real(name, weights=None, **kw))   # no download
    with torch.device('meta'):
        assert get_model(arch, 7, size=224, pretrained=True).eval()(torch.rand(1,3,224,224, device='meta')).shape==(1,7)
        assert get_model(arch, 1000, size=224, pretrained=True).eval()(torch.rand(1,3,224,224, device='meta')).shape==(1,1000)

def test_names_are_torchvisions_own_too():
    for ours,theirs in (('resnext50','resnext50_32x4d'),('convnext_t','convnext_tiny')):
        torch.manual_seed(0); a = get_model(ours).state_dict()
        torch.manual_seed(0); b = get_model(theirs).state_dict()
        assert all(torch.equal(a[k],b[k]) for k in a) and a.keys()==b.keys()
    for name in ('segmentation_fcn','fcn_resnet50','raft_large','r3d_18','quantized_resnet18'):
        with pytest.raises(ValueError, match='unknown: use one of convnet'): get_model(name)   # not classifiers of images
    with pytest.raises(ValueError, match='small_stem is for ResNets, Swin and ConvNeXt, not for vgg11'): get_model('vgg11', small_stem=True)

# ---------------------------------------------------------------- timm, where it is installed

@pytest.mark.parametrize('name,side,shapes', [
    ('resnet18',                     32,  [(64,8),(128,4),(256,2),(512,1)]),
    ('convnext_atto',                64,  [(40,16),(80,8),(160,4),(320,2)]),
    ('swin_tiny_patch4_window7_224', 224, [(96,56),(192,28),(384,14),(768,7)]),
    ('swinv2_cr_tiny_224',           224, [(96,56),(192,28),(384,14),(768,7)]),
])
def test_timm(name, side, shapes):
    pytest.importorskip('timm')
    net,x = meta(f'timm:{name}', 7, size=side).eval(),torch.rand(1,3,side,side, device='meta')
    assert net(x).shape==(1,7) and isinstance(net.norm, Normalize)
    got = stage_shapes(net, x)
    assert [(s[1],s[2]) for s in got.values()]==shapes and all(s[2]==s[3] for s in got.values())
    assert features(net, x, 2)[0].shape[1:]==(shapes[2][0],shapes[2][1],shapes[2][1])

def test_timm_transformers_have_no_map():
    pytest.importorskip('timm')
    net = get_model('timm:deit_tiny_patch16_224', 5, size=32)
    assert net(torch.rand(2,3,32,32)).shape==(2,5)
    with pytest.raises(ValueError, match='not a feature map .* a vision transformer keeps no places'):
        features(net, torch.rand(1,3,32,32), 0)
    assert meta('timm:vit_tiny_patch16_224', 5, c_in=1, size=48).eval()(torch.rand(1,1,48,48, device='meta')).shape==(1,5)

def test_timm_unknown_or_absent(monkeypatch):
    import builtins
    real = builtins.__import__
    def without(name, *a, **k):
        if name=='timm': raise ImportError(name)
        return real(name, *a, **k)
    with monkeypatch.context() as m:
        m.setattr(builtins, '__import__', without)
        with pytest.raises(ValueError, match=r"timm:resnet18 needs timm: pip install 'advmix\[timm\]'"): get_model('timm:resnet18')
    pytest.importorskip('timm')
    with pytest.raises(ValueError, match="timm has no network 'resnet17'"): get_model('timm:resnet17')

def test_timm_statistics_come_with_pretrained(monkeypatch):
    timm = pytest.importorskip('timm')
    real = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kw: real(name, **kw))   # no download
    net = get_model('timm:vit_tiny_patch16_224', 5, size=32, pretrained=True)
    assert net.norm.mean.flatten().tolist()==[.5]*3 and net.norm.std.flatten().tolist()==[.5]*3   # this network's own

def test_imagenet_statistics_come_with_imagenet_weights(monkeypatch):
    def fake(name, weights=None, **kw):
        assert weights=='DEFAULT' and not kw
        return torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, 'get_model', fake)
    net = get_model('resnet18', 7, size=32, pretrained=True)
    assert torch.allclose(net.norm.mean.flatten(), torch.tensor([.485,.456,.406])) and net.net.fc.out_features==7
    assert net.net.conv1.stride==(2,2)   # published weights keep the stem they were trained with
    assert get_model('resnet18', 7, c_in=1, pretrained=True).net.conv1.in_channels==1

@pytest.mark.parametrize('arch,names', [
    ('convnet',         ['net.stage1','net.stage2','net.stage3']),
    ('preact_resnet18', ['net.stage1','net.stage2','net.stage3','net.stage4']),
    ('resnet50',        ['net.layer1','net.layer2','net.layer3','net.layer4']),
    ('swin_t',          ['net.features.1','net.features.3','net.features.5','net.features.7']),
    ('convnext_t',      ['net.features.1','net.features.3','net.features.5','net.features.7']),
])
def test_stages(arch, names): assert list(stages(meta(arch)))==names

def test_stages_of_other_peoples_nets():
    t = torchvision.models
    assert list(stages(t.regnet_y_400mf()))==[f'trunk_output.block{i}' for i in (1,2,3,4)]
    with torch.device('meta'):
        assert list(stages(create_vision_model(t.resnet18, 10, pretrained=False)))==['0.4','0.5','0.6','0.7']
        assert list(stages(t.efficientnet_b0()))==[f'features.{i}' for i in range(1,8)]
        assert len(stages(t.vgg11()))==8   # its convolutions
        assert list(stages(on_pixels(t.resnet18(), .5, .5)))==['net.layer1','net.layer2','net.layer3','net.layer4']
    from fastai.vision.models.xresnet import xresnet18
    assert len(stages(xresnet18(n_out=10)))==4

@pytest.mark.parametrize('arch', ['convnet','preact_resnet18','resnet18','swin_t','convnext_t'])
def test_features_and_logits_of_one_pass(arch, nets):
    net,x = nets(arch),torch.rand(2,3,32,32)
    calls = []
    h = net.register_forward_hook(lambda *a: calls.append(1))
    shapes = stage_shapes(net, x)
    calls.clear()
    for i,(name,shape) in enumerate(shapes.items()):
        f,out = features(net, x, i)
        assert f.shape==shape and f.shape[2]==f.shape[3]
        assert torch.equal(out, net(x))
        assert torch.equal(features(net, x, name)[0], f)
    h.remove()
    assert len(calls)==3*len(shapes)
    assert not any(m._forward_hooks for m in net.modules())
    assert features(net, x, -1)[0].shape==list(shapes.values())[-1]

def test_swin_features_are_channels_first(nets):
    net,x = nets('swin_t'),torch.rand(2,3,32,32)
    assert stage_shapes(net, x)=={f'net.features.{2*i+1}': (2,96*2**i,16//2**i,16//2**i) for i in range(4)}
    raw = net.net.features[:4](net.norm(x))
    assert torch.equal(features(net, x, 1)[0], raw.permute(0,3,1,2))
    assert features(net, x, 'features.4')[0].shape==(2,384,4,4)   # patch merging too

def test_non_square_images(nets):
    for arch in ('convnet','swin_t','convnext_t'): assert features(nets(arch), torch.rand(1,3,32,48), 1)[0].shape[-2:] in ((16,24),(8,12))

def test_features_carry_gradients(nets):
    net,x = nets('convnet'),torch.rand(2,3,32,32, requires_grad=True)
    f,out = features(net, x, 1)
    assert torch.autograd.grad(f.sum(), x, retain_graph=True)[0].abs().sum()>0
    assert torch.autograd.grad(F.cross_entropy(out, torch.tensor([0,1])), x)[0].abs().sum()>0

def test_names_through_wrappers():
    net = on_pixels(create_vision_model(torchvision.models.resnet18, 10, pretrained=False), .5, .5).eval()
    x = torch.rand(2,3,64,64)
    assert find_stage(net, 2)[0]=='net.0.6'
    assert features(net, x, 2)[0].shape==(2,256,4,4)
    assert find_stage(net, '0.6')[0]=='net.0.6'
    assert features(net, x, 'net.0.6.1')[0].shape==(2,256,4,4)
    assert find_stage(nn.Sequential(get_model('convnet')), 'stage2')[0]=='0.net.stage2'

def test_wrong_stage_lists_stages_and_shapes():
    net,x = get_model('convnet', c_in=1, size=8),torch.rand(2,1,8,8)
    flags,buffers = [m.training for m in net.modules()],copy.deepcopy(list(net.buffers()))
    for stage in (3, -4, 'layer3', '', None, 1.5):
        with pytest.raises(ValueError, match=r'0 net.stage1 \(2, 32, 8, 8\), 1 net.stage2 \(2, 64, 4, 4\), 2 net.stage3'):
            features(net, x, stage)
    with pytest.raises(ValueError, match='0 net.stage1, 1 net.stage2'): find_stage(net, 'layer3')
    with pytest.raises(ValueError, match='not found'): find_stage(net, '0')   # ambiguous
    assert flags==[m.training for m in net.modules()] and all(map(torch.equal, buffers, net.buffers()))

def test_models_without_maps():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
    with pytest.raises(ValueError, match='no stages'): features(mlp, torch.rand(2,1,8,8))
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)
    with pytest.raises(ValueError, match=r'gives \(1, 17, 16\), not a feature map'): features(vit, torch.rand(1,3,32,32), 0)
    net = get_model('convnet')
    with pytest.raises(ValueError, match='model.module'): features(nn.DataParallel(net), torch.rand(1,3,32,32))

def test_unused_stage_is_named():
    class Skips(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.head = nn.Conv2d(1,2,3),nn.Conv2d(1,2,3),nn.Linear(72,3)
        def forward(self, x): return self.head(self.a(x).flatten(1))
    assert features(Skips(), torch.rand(2,1,8,8), 'a')[0].shape==(2,2,6,6)
    with pytest.raises(ValueError, match="stage 'b' gives NoneType"): features(Skips(), torch.rand(2,1,8,8), 'b')

def test_no_hook_stays_when_the_pass_raises():
    net = get_model('convnet', c_in=1, size=8)
    with pytest.raises(RuntimeError): features(net, torch.rand(2,5,8,8), 1)
    assert not any(m._forward_hooks for m in net.modules())

def test_state_dict_roundtrip_includes_statistics():
    a,b = get_model('convnet', c_in=1, size=8, mean=.3, std=.4),get_model('convnet', c_in=1, size=8)
    b.load_state_dict(a.state_dict())
    x = torch.rand(3,1,8,8)
    assert torch.equal(a.eval()(x), b.eval()(x)) and torch.equal(copy.deepcopy(a)(x), a(x))

@pytest.mark.parametrize('arch', ['convnet','preact_resnet18'])
def test_trains_in_float64_and_at_batch_one(arch):
    net = get_model(arch, 3, c_in=1, size=16).double().train()
    F.cross_entropy(net(torch.rand(1,1,16,16).double()), torch.tensor([1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
