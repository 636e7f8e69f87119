"False defences around one network, none of which changes a weight of it; each maker returns a module that looks robust to PGD"
import io
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from torch import nn

class Around(nn.Module):
    "A network with something in front, and something behind"
    def __init__(self, net): super().__init__(); self.net = net
    def before(self, x): return x
    def after(self, logits): return logits
    def forward(self, x): return self.after(self.net(self.before(x)))

# --- the cross entropy saturates ---

class ConstantScale(Around):
    "Logits times ten thousand: the cross entropy of a right image is exactly zero"
    def after(self, logits): return 1e4*logits

class Saturated(Around):
    "The distance of each logit to the largest, through a tanh that is flat nearly everywhere; no answer changes"
    def after(self, logits): return 10*torch.tanh(3*(logits-logits.amax(1, keepdim=True))+2)

# --- no gradient, or none that is of use ---

class Rounding(Around):
    "Twenty-one grey levels"
    def before(self, x): return (x*20).round()/20

class Detached(Around):
    def before(self, x): return x.detach()

class ThroughNumpy(Around):
    "As a preprocessing written for inference: stops at an image that wants a gradient"
    def before(self, x): return torch.from_numpy(np.sqrt(np.square(x.numpy())))

class ThroughPIL(Around):
    def before(self, x):
        ims = [Image.fromarray(im, 'L') for im in (x.detach().cpu().clamp(0,1)[:,0]*255).round().byte().numpy()]
        return torch.stack([torch.from_numpy(np.array(im)) for im in ims])[:,None].to(x)/255

class ThroughJPEG(Around):
    "Real files, quality 80"
    def one(self, im):
        f = io.BytesIO()
        Image.fromarray(im, 'L').save(f, 'JPEG', quality=80)
        return torch.from_numpy(np.array(Image.open(f)))
    def before(self, x):
        ims = (x.detach().cpu().clamp(0,1)[:,0]*255).round().byte().numpy()
        return torch.stack([self.one(im) for im in ims])[:,None].to(x)/255

class DeadZone(Around):
    "Flat round each of the seventeen grey values that occur, steeper in between: no gradient at the images, and steps get stuck"
    def before(self, x):
        q = (x*16).round()/16
        return q+F.softshrink(x-q, .012)*(1/32)/(1/32-.012)

class Thermometer(nn.Module):
    "Each pixel as twenty flags, 'is it above' (Buckman et al. 2018); the first layer's weights are spread over them"
    def __init__(self, net, levels=20):
        super().__init__()
        conv = net[0]
        self.levels,self.rest = levels,net[1:]
        self.conv = nn.Conv2d(conv.in_channels*levels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        with torch.no_grad():
            self.conv.weight.copy_(conv.weight.repeat_interleave(levels, 1)/levels)
            self.conv.bias.copy_(conv.bias)
    def forward(self, x):
        at = (torch.arange(self.levels, device=x.device)+.5)/self.levels
        return self.rest(self.conv((x[:,:,None]>at.view(-1,1,1)).to(x).flatten(1,2)))

# --- wrong gradients ---

class _Random(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g.norm()*torch.randn_like(g)/g.numel()**.5

class _Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return -g

class _Broken(torch.autograd.Function):
    "Nobody wrote its backward pass"
    @staticmethod
    def forward(ctx, x): return x.clone()

class RandomBackward(Around):
    def before(self, x): return _Random.apply(x)

class FlippedGradient(Around):
    def before(self, x): return _Flipped.apply(x)

class NoBackward(Around):
    def before(self, x): return _Broken.apply(x)

class HighFrequency(Around):
    "A ripple too small to matter, and so steep that the gradient sees nothing else"
    def before(self, x): return x+.005*torch.sin(1600*x)

# --- random, or dependent on what else there is ---

class Noise(Around):
    def before(self, x): return x+.1*torch.randn_like(x)

class TestTimeDropout(Around):
    def forward(self, x): return self.net[-1](F.dropout(self.net[:-1](x), .3, training=True))

class SeededNoise(Around):
    "Noise that is the same for the same image, so that two passes agree"
    def before(self, x):
        def one(im): return torch.randn(im.shape, generator=torch.Generator().manual_seed(hash(im.detach().numpy().tobytes())%2**31))
        return x+.1*torch.stack([one(im) for im in x])

class BatchStatistics(Around):
    "Normalises by the batch it happens to get"
    def before(self, x): return (x-x.mean(0))/x.std(0, unbiased=False).clamp(min=.1)*.35+.3

DEFENCES = dict(scale=ConstantScale, saturated=Saturated, rounding=Rounding, detach=Detached, numpy=ThroughNumpy, pil=ThroughPIL,
                jpeg=ThroughJPEG, dead_zone=DeadZone, thermometer=Thermometer, random_backward=RandomBackward, flipped=FlippedGradient,
                no_backward=NoBackward, high_frequency=HighFrequency, noise=Noise, dropout=TestTimeDropout, seeded_noise=SeededNoise,
                batch_statistics=BatchStatistics)
