"Whatever holds weights becomes a network that takes pixels, or a sentence says what does not fit"
import hashlib, json, pickle
from pathlib import Path
import advmix, numpy as np, pytest, torch, torchvision
from safetensors.torch import save_file
from torch import nn
from fastai.vision.all import Learner, CrossEntropyLossFlat, create_vision_model
from advmix.attack import Threat, pgd
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

# ---------------------------------------------------------------- what ships

SHELF = Path(advmix.__file__).parent/'pretrained'
VOCAB = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
NAMES = sorted(p.stem for p in SHELF.glob('*.safetensors'))
ABOUT = json.loads((SHELF/'pretrained.json').read_text())
FLOOR = {'vanilla-cifar10':.65, 'adautomix-cifar10':.6, 'pgd-cifar10':.4, 'cutmix_pgd-cifar10':.3, 'aom-cifar10':.3}   # clean, of 1

@pytest.fixture(scope='module')
def sheet(): return cifar_sheet()

def test_the_shelf_is_described_and_small():
    assert set(NAMES)==set(ABOUT)==set(FLOOR)
    assert sum(p.stat().st_size for p in SHELF.iterdir())<3e6 and (SHELF/'cifar10_sheet.png').stat().st_size<3e5

def test_the_sheet_is_cifars(sheet):
    x,y,names = sheet
    assert x.shape==(100,3,32,32) and x.dtype==torch.float32 and 0<=x.min() and x.max()<=1
    assert torch.equal(y.bincount(), torch.full((10,), 10)) and names==VOCAB
    px = (x*255).round().byte().numpy().tobytes()
    assert hashlib.sha256(px).hexdigest()[:16]=='b6f0867f8c2d71ba'   # of the bytes of the originals
    assert 'Krizhevsky' in cifar_sheet.__doc__ and '2009' in cifar_sheet.__doc__ and 'Krizhevsky' in (SHELF/'README.md').read_text()

@pytest.mark.parametrize('name', NAMES)
def test_every_network_of_the_shelf(name, sheet):
    x,y,names = sheet
    net,vocab = from_pretrained(name, vocab=True)
    assert vocab==net.vocab==names and not net.training and net.about==ABOUT[name]
    with torch.no_grad(): out = net(x)
    right = (out.argmax(1)==y).float().mean().item()
    assert out.isfinite().all() and right>FLOOR[name]
    assert abs(right-ABOUT[name]['clean']['accuracy'])<.15   # three standard deviations of a hundred images
    stands = (net(pgd(net, x, y, Threat(8/255, steps=10))).argmax(1)==y).float().mean().item()
    assert stands>.2 if name.split('-')[0] in ('pgd','cutmix_pgd','aom') else stands<.1

def test_a_plain_loader_takes_the_same_file(sheet):
    a = model_with(SHELF/'adautomix-cifar10.safetensors', 'convnet_s')   # what is beside the network stays out
    with torch.no_grad(): assert torch.equal(a(sheet[0]), from_pretrained('adautomix-cifar10')(sheet[0]))

def test_what_is_not_on_the_shelf(tmp_path):
    with pytest.raises(ValueError, match='resnet50 does not ship with advmix: choose one of '+', '.join(NAMES)): from_pretrained('resnet50')
    with pytest.raises(FileNotFoundError): from_pretrained(tmp_path/'absent.safetensors')
    save_file({'w':torch.zeros(2)}, tmp_path/'plain.safetensors')
    with pytest.raises(ValueError, match='does not say what network'): from_pretrained(tmp_path/'plain.safetensors')
    half = tmp_path/'half.safetensors'
    half.write_bytes((SHELF/'pgd-cifar10.safetensors').read_bytes()[:9000])
    with pytest.raises(ValueError, match='cannot be read'): from_pretrained(half)

def test_it_travels(tmp_path):
    net = from_pretrained('adautomix-cifar10')
    twin = pickle.loads(pickle.dumps(net))
    assert twin.vocab==net.vocab and set(net.beside)=={'student','generator'} and not [k for k in net.state_dict() if 'beside' in k]

def test_the_notebook_says_what_was_measured():
    "The table of 06_weights, as printed, against the JSON"
    nb = json.loads((Path(__file__).parents[1]/'nbs/06_weights.ipynb').read_text())
    rows = [l.split() for c in nb['cells'] for o in c.get('outputs', []) for l in o.get('data', {}).get('text/plain', [])]
    for name,a in ABOUT.items():
        row = next(r for r in rows if r[:1]==[name])
        assert [float(v) for v in row[1:4]]==[a['settings']['epochs'], *(round(100*a[k]['accuracy'], 1) for k in ('clean','robust'))]
