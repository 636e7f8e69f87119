"""What a GPU makes of it: PGD-10 training of ResNet-18 on CIFAR-10, seconds an epoch and share of the measured matrix peak; steps of every method

    python nbs/experiments/gpu_bench.py --out nbs/experiments/results/gpu_bench.json
    python nbs/experiments/gpu_bench.py --data random --arch convnet --bs 64 --n 256 --steps 1 --peak 256 --device cpu   # a try anywhere

`--data random` takes noise of CIFAR-10's size where that is not at hand; time is the same. Results are written as they come."""
import json
from pathlib import Path
from time import perf_counter
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import default_device
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from advmix.callbacks import AdAutoMixCallback, PGDCallback
from advmix.cost import time_steps
from advmix.data import tensor_dls
from advmix.files import get_dls
from advmix.models import get_model

def now(device):
    if device.type=='cuda': torch.cuda.synchronize(device)
    return perf_counter()

def matrix_peak(device, dtype, n):
    "Floating-point operations a second of a large matrix product, the best of ten"
    a,best = torch.randn(n, n, device=device, dtype=dtype),float('inf')
    for _ in range(10):
        t = now(device)
        a@a
        best = min(best, now(device)-t)
    return 2*n**3/best

def images(data, bs, n, device):
    "Loaders with `n` training images, kept on the device"
    if data!='random': return get_dls(data, bs=bs, n_train=n, in_memory='device').to(device)
    x,y = torch.rand(n, 3, 32, 32),torch.arange(n)%10
    return tensor_dls(x, y, x[:bs], y[:bs], x[:bs], y[:bs], bs=bs, vocab=range(10), in_memory='device', augment=True).to(device)

class Clock(Callback):
    "Seconds of the training part of each epoch"
    run_valid = False
    def before_fit(self): self.seconds = []
    def before_train(self): self.t = now(self.dls.device)
    def after_train(self): self.seconds.append(now(self.dls.device)-self.t)

def epoch(learn, cb, n):
    "Median seconds of the training part of `n` epochs after the first"
    with learn.no_bar(), learn.no_logging(): learn.fit(n+1, 1e-3, cbs=cb)
    return sorted(learn.clock.seconds[1:])[n//2]

def forward_flops(net, x):
    with FlopCounterMode(display=False) as count, torch.no_grad(): net.eval()(x)
    return count.get_total_flops()

def short(pace): return '+'.join(k if v is True else v for k,v in pace.items()) or 'float32'

@call_parse
def main(
    data:str='cifar10',     # cifar10, digits or random
    arch:str='resnet18',    # Architecture
    bs:int=512,             # Batch size
    steps:int=10,           # Attack steps
    n:int=50000,            # Images of an epoch
    epochs:int=3,           # Epochs measured, after one that isn't
    methods:str='mixup,cutmix,pgd,aom,iat,automix,adautomix,adautomix:n_mix=2', # Of the table
    rounds:int=10,          # Steps measured for each method in the table
    peak:int=8192,          # Side of the matrices whose product measures the peak
    device:str=None,        # cuda if there is one
    out:str=None,           # Write to this .json
):
    "Seconds an epoch and share of the measured peak, for every switch; then a table of all methods"
    device = torch.device(device or default_device())
    cuda,dls = device.type=='cuda',images(data, bs, n, device)
    _,c_in,size,_ = dls.one_batch()[0].shape
    seen = len(dls.train)*bs   # of `n`; some are held out, and the last batch is dropped
    res = dict(device=torch.cuda.get_device_name(device) if cuda else 'cpu', torch=torch.__version__,
               settings=dict(data=data, arch=arch, size=size, bs=bs, steps=steps, n=n), epochs=[],
               peak={k: matrix_peak(device, getattr(torch, k), peak) for k in ('float32','bfloat16')})
    def write(*more):
        print(*more, flush=True)
        if out: Path(out).write_text(json.dumps(res, indent=1))
    write(res['device'], {k:f'{v/1e12:.2f} TFLOP/s' for k,v in res['peak'].items()})
    make  = lambda: get_model(arch, len(dls.vocab), c_in, size).to(device)
    one   = forward_flops(make(), torch.rand(1, c_in, size, size, device=device))
    work  = dict(vanilla=3, pgd=2*steps+3, adautomix=12)   # in forward passes
    cbs   = dict(vanilla=list, pgd=lambda: PGDCallback(8/255, steps=steps), adautomix=AdAutoMixCallback)
    paces = [dict(), dict(amp='bf16'), dict(amp='bf16', channels_last=True)]
    if cuda: paces.append(dict(amp='bf16', channels_last=True, compile=True))
    for pace in paces:
        for name,cb in cbs.items():
            learn = Learner(dls, make(), loss_func=CrossEntropyLossFlat(), cbs=Clock()).pace(**pace)
            sec   = epoch(learn, cb(), epochs)*n/seen
            rate  = work[name]*one*n/sec
            share = rate/res['peak']['bfloat16' if 'amp' in pace else 'float32']
            res['epochs'].append(dict(method=name, **pace, seconds=sec, flops=rate, share_of_peak=share))
            write(f'{name:10} {short(pace):30} {sec:8.2f} s an epoch, {rate/1e12:7.3f} TFLOP/s, {share:.0%} of the peak')
    table = time_steps(methods.split(','), rounds, device, arch=arch, size=size, bs=min(bs, 128), steps=steps)
    res['steps'] = table.reset_index().to_dict('records')
    write(table.round(3).to_string())
