"Whatever holds weights becomes a network that takes pixels, or a sentence says what does not fit"
import pickle, numpy as np, pytest, torch, torchvision
from safetensors.torch import save_file
from torch import nn
from fastai.vision.all import Learner, CrossEntropyLossFlat, create_vision_model
from advmix.data import digits_dls
from advmix.models import *
from advmix.weights import *

x = torch.rand(3,3,32,32)

def wrapped(state, norm=None):
    "One state dict in every wrapping that people save"
    yield state
    yield {f'module.{k}':v for k,v in state.items()}
    yield {f'_orig_mod.{k}':v for k,v in state.items()}
    yield {f'module._orig_mod.{k}':v for k,v in state.items()}
    for k in ('model','state_dict','net'): yield {k:state, 'epoch':3, 'optimizer':{'state':{}}}
    yield {'state_dict':{f'model.{k}':v for k,v in state.items()}}

@pytest.mark.parametrize('arch', ['convnet','convnet_s'])
def test_every_wrapping(arch):
    net = get_model(arch, 7, mean=[.1,.2,.3], std=[.3,.2,.1]).eval()
    for state in wrapped(net.state_dict()): assert torch.equal(model_with(state, arch, n_classes=7)(x), net(x))
    for state in wrapped(net.net.state_dict()):
        assert torch.equal(model_with(state, arch, [.1,.2,.3], [.3,.2,.1], n_classes=7)(x), net(x))

def test_statistics_are_those_of_the_weights_or_given_or_none():
    net = get_model('convnet', mean=.3, std=.4)
    assert model_with(net.state_dict()).norm.mean.item()==torch.tensor(.3).item()
    assert model_with(net.state_dict(), mean=.6).norm.mean.item()==torch.tensor(.6).item()
    bare = model_with(net.net.state_dict())
    assert torch.equal(bare(x), bare.net(x))   # pixels as they are

@pytest.mark.parametrize('small', [True,False])
@pytest.mark.parametrize('size', [32,128])
def test_the_stem_is_found_by_its_shape(small, size):
    net = get_model('resnet18', size=size, small_stem=small).eval()
    assert torch.equal(model_with(net.state_dict(), 'resnet18', size=size)(x), net(x))

@pytest.mark.parametrize('name', ['mobilenet_v3_small','shufflenet_v2_x0_5','squeezenet1_1'])
def test_torchvisions_own_files(name):
    net = torchvision.models.get_model(name, num_classes=7).eval()
    assert torch.equal(model_with(net.state_dict(), name, n_classes=7)(x), net(x))

def test_timms_own_files():
    timm = pytest.importorskip('timm')
    net = timm.create_model('resnet10t', num_classes=7).eval()
    assert torch.equal(model_with(net.state_dict(), 'timm:resnet10t', n_classes=7)(x), net(x))

def test_what_training_kept_is_left_out():
    net = get_model('convnet').eval()
    state = net.state_dict()|{'advmix.ema.net.0.weight':torch.rand(3), 'advmix.game.k':torch.tensor(4)}
    assert torch.equal(model_with(state)(x), net(x))

def test_a_file_of_learn_save(tmp_path):
    net = get_model('convnet', c_in=1, size=8)
    learn = Learner(digits_dls(), net, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    path = learn.save('a')
    state = torch.load(path, map_location='cpu', weights_only=False)
    d = torch.rand(2,1,8,8)
    assert torch.equal(model_with(state, 'convnet', c_in=1, size=8)(d), net.eval()(d))

def test_old_files_lack_counters():
    net = get_model('convnet').eval()
    state = {k:v for k,v in net.state_dict().items() if 'num_batches' not in k}
    assert torch.equal(model_with(state)(x), net(x))

@pytest.mark.parametrize('kw,says', [
    (dict(arch='resnet18', n_classes=7), 'do not fit resnet18: fc.weight is .7, 512. here and .10, 512. there'),
    (dict(arch='resnet18', c_in=1),      'do not fit resnet18: conv1.weight is .64, 1, 3, 3. here'),
    (dict(arch='resnet34'),              r'do not fit resnet34: .*; \.\.\.\. Give the architecture, size and number of classes'),
    (dict(arch='resnet18', small_stem=False), 'conv1.weight is .64, 3, 7, 7. here and .64, 3, 3, 3. there'),
    (dict(arch='vgg'),                   'use one of convnet'),
    (dict(arch='squeezenet1_1'),         'do not fit squeezenet1_1'),
])
def test_what_does_not_fit(kw, says):
    with torch.device('meta'), pytest.raises(ValueError, match=says): model_with(get_model('resnet18').state_dict(), **kw)

@pytest.mark.parametrize('state', [{}, {'a':1}, {'model':{'a':torch.rand(2)}}, {'opt':{}}, {'weight':torch.rand(2)}])
def test_no_weights_at_all(state):
    with pytest.raises(ValueError, match='do not fit convnet'): model_with(state)

def test_somebody_elses_body_and_head():
    state = create_vision_model(torchvision.models.resnet18, 10, pretrained=False).state_dict()
    with pytest.raises(ValueError, match='do not fit resnet18'): model_with(state, 'resnet18')

def test_the_network_is_ready_to_be_judged():
    net = model_with(get_model('resnet18').state_dict(), 'resnet18')
    assert not any(m.training for m in net.modules()) and isinstance(net, nn.Sequential) and list(stages(net))[0]=='net.layer1'

class Evil:
    def __reduce__(self): return eval, ('open("pwned","w").close()',)

def test_files_are_read_and_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = get_model('convnet', 7, mean=[.1,.2,.3], std=[.3,.2,.1]).eval()
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    torch.save(dict(model=net.state_dict(), opt=dict(hypers=[dict(lr=np.float64(.1), mom=np.float32(.9))])), tmp_path/'w.pth')
    for f in ('w.safetensors','w.pth'): assert torch.equal(model_with(f, 'convnet', n_classes=7)(x), net(x))
    (tmp_path/'half.pth').write_bytes((tmp_path/'w.pth').read_bytes()[:900])
    (tmp_path/'half.safetensors').write_bytes((tmp_path/'w.safetensors').read_bytes()[:900])
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path/'evil2.pth')
    for f in ('half.pth','half.safetensors','evil.pth','evil2.pth'):
        with pytest.raises(ValueError, match='cannot be read as weights'): model_with(tmp_path/f)
    torch.save([1,2], tmp_path/'list.pth')
    with pytest.raises(ValueError, match='a list holds no weights'): model_with(tmp_path/'list.pth')
    with pytest.raises(FileNotFoundError): model_with(tmp_path/'nothing.pth')
    assert not (tmp_path/'pwned').exists()
