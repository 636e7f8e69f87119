"Maps against brute force; where boxes and cells go; SnapMix's conditions and evidence"
import itertools
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from advmix.models import get_model
from advmix.mix import CutMix
from advmix.saliency import SaliencyMix, AttentiveMix, SnapMix, fine_grained
from advmix.saliency import _centre_surround, _grey, _class_map as class_map, _snap as snap, _stage_map as stage_map
from sync import check_no_reads, reads

# ---------------------------------------------------------------- maps
# Made with OpenCV 5.0 (opencv-contrib-python-headless): `map` is cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency of the
# bytes in `image`, `floats` the same of (image/255-mean)/std with CIFAR-10's mean and std, which is what the released SaliencyMix gives it
STORED = np.load(Path(__file__).parent/'data/fine_grained.npz')
IMAGES = sorted({k.rpartition('.')[0] for k in STORED})

def stored(name):
    im = torch.tensor(STORED[name+'.image'])
    return (im[None] if im.ndim==2 else im.permute(2,0,1))[None]/255,torch.tensor(STORED[name+'.map']).float()/255

def ranks(a, b): return spearmanr(a.flatten().numpy(), b.flatten().numpy())[0]

@pytest.mark.parametrize('name', IMAGES)
def test_fine_grained_is_that_of_opencv(name):
    x,want = stored(name)
    got = fine_grained(x)[0]
    assert got.shape==want.shape and ranks(got, want)>.999 and (got-want).abs().max()<.04   # theirs rounds to bytes at every step
    assert want.flatten()[got.argmax()]>.97

@pytest.mark.parametrize('name', [n for n in IMAGES if n+'.floats' in STORED])
def test_the_released_code_reads_floats_as_bytes(name):
    x,want = stored(name)
    mean,std = (torch.tensor(v).view(1,3,1,1)/255 for v in ([125.3,123.0,113.9],[63.0,62.1,66.7]))
    z = _grey((x-mean)/std)
    theirs = torch.tensor(STORED[name+'.floats']).float()
    mine   = _centre_surround(torch.tensor(z.numpy().view('uint8')[:,:,:x.shape[-1]]).float(), z)[0]
    assert ranks(mine, theirs)>.95 and abs(ranks(theirs, want))<.15

def test_fine_grained_against_loops():
    x = torch.rand(2,1,30,27)
    g = _grey(x)
    on,off = torch.zeros_like(g),torch.zeros_like(g)
    for r,i,j in itertools.product((12,24,48,28,56,112), range(30), range(27)):
        box  = g[:,max(i-r+1,0):i+r+1,max(j-r+1,0):j+r+1]
        diff = g[:,i,j]-(box.sum((1,2))-g[:,i,j])/(box[0].numel()-1)
        on[:,i,j]  += diff.clamp_min(0)
        off[:,i,j] -= diff.clamp_max(0)
    want = on/on.amax((1,2), keepdim=True)+off/off.amax((1,2), keepdim=True)
    assert torch.allclose(fine_grained(x), want/want.amax((1,2), keepdim=True), atol=1e-4)

@pytest.mark.parametrize('shape', [(2,3,1,1),(2,1,1,9),(1,5,2,3),(3,3,8,8),(1,3,224,40)])
def test_fine_grained_of_any_size_and_of_nothing(shape):
    s = fine_grained(torch.rand(shape))
    assert s.shape==(shape[0],*shape[2:]) and s.isfinite().all() and s.min()>=0 and s.max()<=1
    assert torch.equal(fine_grained(torch.full(shape, .7)), torch.zeros(s.shape))
    assert fine_grained(torch.rand(shape).half()).dtype==torch.float32

def test_saliencymix_centres_on_the_first_peak_of_the_batch_image():
    def one(x):
        s = torch.zeros(len(x), *x.shape[-2:])
        s[:,20,9] = s[:,25,3] = 1
        return s
    for per_sample in (False,True):
        m = SaliencyMix(per_sample=per_sample, saliency=one)(torch.rand(5,3,40,24))
        half = torch.stack([40*(1-m.lam[:,0]).sqrt(), 24*(1-m.lam[:,0]).sqrt()], 1).long()//2
        for i in range(5):
            rows,cols = (m.mask[i,0]==0).nonzero().T
            want = (max(20-half[i,0],0),min(20+half[i,0],40),max(9-half[i,1],0),min(9+half[i,1],24))
            if len(rows): assert (rows.min(),rows.max()+1,cols.min(),cols.max()+1)==want

def test_saliencymix_area_follows_the_formula_in_the_middle():
    mid = lambda x: F.pad(torch.ones(len(x),1,1), (16,15,16,15))
    for _ in range(50):
        m = SaliencyMix(saliency=mid)(torch.zeros(1,1,32,32))
        assert abs(m.w[0,0].item()-(1-(2*(int(32*(1-m.lam[0,0]).sqrt())//2)/32)**2))<1e-6

def test_attentivemix_keeps_the_strongest_cells():
    s = torch.rand(6,7,7)
    m = AttentiveMix(attention=lambda x: s)(torch.rand(6,3,56,56))
    for i in range(6):
        kept = m.mask[i,0,::8,::8].bool()
        assert kept.sum()==6 and s[i][kept].min()>=s[i][~kept].max()
    shares = torch.stack([AttentiveMix(alpha=1., attention=lambda x: s[:1])(torch.rand(1,1,56,56)).w[0,0] for _ in range(300)])*49
    assert (shares-shares.round()).abs().max()<1e-3 and shares.min()>=1-1e-3 and abs(shares.mean()/49-.5)<.06
    with pytest.raises(ValueError, match='k=0'): AttentiveMix(k=0)

# ---------------------------------------------------------------- SnapMix
class Functional(nn.Module):
    "Pools in a function, as DenseNet and MobileNet do"
    def __init__(self, c=8):
        super().__init__()
        self.conv,self.head = nn.Conv2d(3,c,3,2,1),nn.Linear(c,5)
    def forward(self, x): return self.head(F.relu(self.conv(x)).mean((2,3)))   # no module gives the map that was averaged

class Inplace(Functional):
    def forward(self, x): return self.head(F.adaptive_avg_pool2d(F.relu(self.conv(x), inplace=True), 1).flatten(1))

@pytest.mark.parametrize('arch,size', [('convnet',16),('preact_resnet18',16),('resnet18',16),('swin_t',32)])
def test_class_map_averages_to_the_logit(arch, size):
    net = get_model(arch, 5, c_in=3, size=size).eval()
    x,y = torch.rand(2,3,size,size),torch.tensor([1,3])
    s   = class_map(net, x, y)
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad(): logit = net(x)[[0,1],y]-head.bias[y]
    if arch!='swin_t': assert torch.allclose(s.mean((1,2)), logit, atol=1e-4)   # Swin's are not rectified: the published ReLU matters
    m = SnapMix()(x, y, net)
    assert m.w.isfinite().all() and (m.w>=0).all() and (m.w<=1).all()

def test_class_map_on_fastai_heads_and_others():
    from fastai.vision.learner import create_head
    body = nn.Sequential(nn.Conv2d(3,16,3,2,1), nn.BatchNorm2d(16), nn.ReLU())
    x,y  = torch.rand(2,3,16,16),torch.tensor([1,3])
    ok   = nn.Sequential(body, create_head(16, 5, concat_pool=False, lin_ftrs=[], first_bn=False))
    assert class_map(ok, x, y).shape==(2,8,8) and class_map(Inplace(), x, y).shape==(2,8,8)
    flat,conv = nn.Sequential(body, nn.Flatten(), nn.Linear(16*64,5)),nn.Sequential(body, nn.Conv2d(16,5,8), nn.Flatten())
    for bad in (nn.Sequential(body, create_head(16, 5)), Functional(), flat, conv):
        for _ in range(2):
            with pytest.raises(ValueError, match=r'SnapMix needs a linear layer.*give SnapMix\(cam=\.\.\.\)'): SnapMix()(x, y, bad)
        assert sum(len(m._forward_hooks) for m in bad.modules())==0

def test_whether_there_is_a_class_map_is_not_asked_in_trusted_batches():
    "Whether the linear layer is given the mean of the map takes a look at numbers; a training loop asks in its first batch"
    net,x,y = get_model('convnet', 5, c_in=3, size=16),torch.rand(2,3,16,16),torch.tensor([1,3])
    assert reads(class_map, net, x, y)!=[]
    check_no_reads(SnapMix(cam=net), x, y)
    other = nn.Sequential(net[0], *net[1][:-1], nn.Hardtanh(0, 1e-3), net[1][-1])   # the same head after something else
    with pytest.raises(ValueError, match='SnapMix needs'): SnapMix()(x, y, other)

def test_snap_weights_and_pixels():
    x,s = torch.rand(3,2,20,12),torch.rand(3,20,12)
    s   = s/s.sum((1,2), keepdim=True)
    p   = torch.tensor([1,2,0])
    out,w = snap(x, p, s, (2,10,1,5), (4,20,3,11))
    for i in range(3):
        want = x[i].clone()
        want[:,2:10,1:5] = F.interpolate(x[p[i]][None,:,4:20,3:11], (8,4), mode='bilinear', align_corners=True)[0]
        assert torch.allclose(out[i], want, atol=1e-6)
        assert torch.allclose(w[i], torch.stack([1-s[i,2:10,1:5].sum(), s[p[i],4:20,3:11].sum()]), atol=1e-6)

def test_snapmix_released_counts_equal_labels_double_and_areas_follow_the_beta():
    cam = lambda x,y: torch.ones(len(x),4,4)
    x,y = torch.rand(8,3,32,32),torch.zeros(8).long()
    for _ in range(5):
        torch.manual_seed(_)
        a = SnapMix(cam=cam)(x, y)
        torch.manual_seed(_)
        b = SnapMix(cam=cam, released=True)(x, y)
        assert torch.allclose(b.w, a.w.sum(1, keepdim=True).expand(8,2)) and torch.equal(a.x, b.x)
    ws   = torch.stack([SnapMix(cam=cam)(x[:1], y[:1]).w[0] for _ in range(1500)])
    box  = CutMix.rand_box(torch.distributions.Beta(5.,5.).sample((4000,)), 32, 32)
    area = ((box[:,1]-box[:,0])*(box[:,3]-box[:,2])/1024).float()
    assert abs((1-ws[:,0]).mean()-area.mean())<.015 and abs(ws[:,1].mean()-area.mean())<.015
    with pytest.raises(ValueError, match='class numbers'): SnapMix(cam=cam)(x)
    torch.manual_seed(0)
    empty = SnapMix(beta=5., cam=cam)(torch.rand(2,1,2,2), y[:2])   # boxes of half a pixel
    assert torch.equal(empty.w, torch.tensor([[1.,0.]]*2))

def test_a_frozen_network_that_wants_larger_images():
    net = get_model('resnet18', 4, c_in=3, size=64, small_stem=False)
    flags,x,y = [m.training for m in net.modules()],torch.rand(2,3,16,16),torch.tensor([1,3])
    assert stage_map(net, x, size=64).shape==(2,2,2)
    m = AttentiveMix(attention=net, size=64)
    assert not m.needs_model and not SnapMix(cam=net).needs_model
    big = F.interpolate(x, (64,64), mode='bilinear')
    pairs = [(m, AttentiveMix(attention=lambda x: stage_map(net, big))),
             (SnapMix(cam=net, size=64), SnapMix(cam=lambda x,y: class_map(net, big, y)))]
    for mixer,by_hand in pairs:
        torch.manual_seed(0)
        got = mixer(x, y)
        torch.manual_seed(0)
        want = by_hand(x, y)
        assert torch.equal(got.x, want.x) and torch.equal(got.w, want.w)
    assert [m.training for m in net.modules()]==flags
