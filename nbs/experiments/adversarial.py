"""Adversarial training on few colour images: every arm with the same average, at its best epoch and at its last

    python adversarial.py train DATA OUT --arms pgd,aom --seeds 0,1    # weights and curves into OUT/ARM-SEED/
    python adversarial.py judge DATA OUT --arms pgd,aom --seeds 0,1    # test images: clean, PGD-20, APGD-CE and APGD-T
    python adversarial.py segment DATA OUT --arms pgd,aom --seeds 0,1  # labels and predictions between two test images
    python adversarial.py sanity DATA OUT --arms pgd,aom --seeds 0     # is the robustness real?
    python adversarial.py collect DATA OUT results/cifar_aom.json      # one file of all that was found

DATA is an `.npz` with `x_train`, `y_train`, `x_test`, `y_test` (uint8, NCHW) and the names of the classes in
CIFAR-10's order, or "cifar10", which fastai downloads. What is there already is not made again. `--amp bf16` trains in
half precision, in half the time where the processor knows it; the test images are judged in single precision."""
import argparse, json, platform, time
from pathlib import Path
import numpy as np, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle
from fastai.learner import Learner
from fastai.torch_core import set_seed
from scipy.optimize import brentq
from scipy.stats import entropy
from torch import nn
from advmix.aom import AOM
from advmix.attack import PGD, Threat
from advmix.autoattack import autoattack
from advmix.callbacks import AOMCallback, EMACallback, IATCallback, MixCallback, PGDCallback
from advmix.data import data_stats, split_tensors, tensor_dls
from advmix.evaluate import attacked, clean
from advmix.files import get_dls
from advmix.folder import Run, save_model
from advmix.generator import AdAutoMixGenerator
from advmix.interp import segment_loss
from advmix.mix import CutMix
from advmix.models import get_model
from advmix.sanity import sanity
from advmix.weights import from_pretrained

VOCAB = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
NETS  = ['student_last', 'student_best', 'average_last', 'average_best']
EPS   = 8/255

def matched_smoothing(nats=.45, n=10):
    "Label smoothing with the mean entropy of MixUp's labels: half a nat for the nine pairs of ten that differ in class"
    return brentq(lambda s: entropy([1-s+s/n]+[s/n]*(n-1))-nats, 0, .9)

class Learned:
    "Pairs under the masks that AdAutoMix learned on all of CIFAR-10's training images, with the features of its network"
    def __init__(self, name='adautomix-cifar10'):
        self.net = from_pretrained(name).requires_grad_(False)
        self.gen = AdAutoMixGenerator.from_pretrained(name, n_mix=2, per_sample=True)
    def __call__(self, x, y, model=None):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False): return self.gen(x, y, self.net)

def arms(steps):
    "Name -> the callbacks that make it"
    at  = dict(eps=EPS, step=EPS/4, steps=steps)
    one = dict(eps=EPS, step=EPS, steps=1, random_start=2., confine=False)   # N-FGSM (de Jorge et al., 2022)
    cut = CutMix(per_sample=True)
    return dict(
        pgd        = lambda: PGDCallback(**at),
        pgd_wide   = lambda: PGDCallback(eps=10/255, steps=steps),   # less clean accuracy for more robustness
        pgd_random = lambda: PGDCallback(direction='random', **at),  # steps of the same length to random sides
        pgd_ls     = lambda: PGDCallback(**at),                      # label smoothing instead of mixing
        pgd_fast   = lambda: PGDCallback(**one),
        mix_pgd    = lambda: AOMCallback(where='mix', **at),
        cutmix_pgd = lambda: AOMCallback(where='mix', mixer=cut, **at),
        learned_pgd = lambda: AOMCallback(where='mix', mixer=Learned(), **at),
        iat        = lambda: IATCallback(**at),
        aom        = lambda: AOMCallback(ratio='kl', **at),
        aom_fixed  = lambda: AOMCallback(ratio='fixed', **at),       # the ratio stays, the endpoints move
        aom_random = lambda: AOMCallback(ratio='random', **at),      # the ratio moves as far, to a random side
        aom_shared = lambda: AOMCallback(where='shared', **at),
        aom_fast   = lambda: AOMCallback(ratio='fixed', **one))

class Then:
    "One mixer until `share` of the training is done, another from there on"
    def __init__(self, first, second, share=.75): self.first,self.second,self.share = first,second,share
    def __call__(self, *args, **kwargs): return self.first(*args, **kwargs)
    def at(self, progress): return self.first if progress<self.share else self.second

def recipes(steps):
    "What could mend a mixture: a near ratio, steeper draws, the last quarter without"
    at   = dict(eps=EPS, step=EPS/4, steps=steps)
    pgd  = PGD(**at)
    aom  = lambda **kw: AOM(**dict(ratio='kl') | kw, **at)
    cut  = lambda: AOM(where='mix', mixer=CutMix(per_sample=True), **at)
    return dict(
        aom_near        = lambda: MixCallback(aom(radius=.1)),
        aom_stop        = lambda: MixCallback(Then(aom(), pgd)),
        fixed_steep     = lambda: MixCallback(aom(ratio='fixed', alpha=.3)),
        fixed_stop      = lambda: MixCallback(Then(aom(ratio='fixed'), pgd)),
        cutmix_pgd_stop = lambda: MixCallback(Then(cut(), pgd)))

class Curves(Callback):
    "Student and average on held-out images after every epoch; the best of each is kept, and the last"
    order = 60
    def __init__(self, x, y, folder, spec, half):
        self.x,self.y,self.rows = x,y,[]
        self.folder,self.spec,self.half = folder,spec,half
    def before_fit(self): self.best,self.t = {},time.perf_counter()
    def after_epoch(self):
        row = dict(epoch=self.epoch, seconds=round(time.perf_counter()-self.t, 1))
        for name,net in dict(student=self.learn.model, average=self.learn.ema.average.net).items():
            with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.half):   # these images only choose
                r   = attacked(net, self.x, self.y, Threat(EPS, steps=10), bs=400).accuracy
                row = row | {f'{name}_clean': clean(net, self.x, self.y).accuracy, f'{name}_pgd10': r}
            save_model(net, self.folder/f'{name}_last.safetensors', VOCAB, **self.spec)
            if r>self.best.get(name, -1):
                self.best[name] = r
                save_model(net, self.folder/f'{name}_best.safetensors', VOCAB, **self.spec)
        self.rows.append(row)
        print(self.folder.name, row, flush=True)

def loaders(a, seed):
    kw = dict(bs=a.bs, seed=seed, augment=a.augment!='no', n_train=a.n_train or None)
    if a.data=='cifar10': return get_dls(a.data, **kw)
    d = np.load(a.data)
    return tensor_dls(d['x_train'], d['y_train'], x_test=d['x_test'], y_test=d['y_test'], vocab=VOCAB, **kw)

def write(file, d): Run.write_file(file, json.dumps(d))   # whole or not at all

def train(arm, seed, a):
    folder = Path(a.out)/f'{arm}-{seed}'
    if (folder/'train.json').exists(): return
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(seed, reproducible=True)
    dls   = loaders(a, seed)
    m,s   = data_stats(dls)
    spec  = dict(arch=a.arch, n_classes=10, c_in=3, size=32, mean=m, std=s)
    x,y   = split_tensors(dls, 'valid', 400)
    seen  = Curves(x, y, folder, spec, half=a.amp!='no')
    loss  = nn.CrossEntropyLoss(label_smoothing=matched_smoothing() if arm=='pgd_ls' else 0.)
    cbs   = [(arms(a.steps)|recipes(a.steps))[arm](), EMACallback(), seen]
    learn = Learner(dls, get_model(**spec), loss_func=loss, cbs=cbs).pace(amp=a.amp, channels_last=True)
    t     = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, a.lr)
    write(folder/'train.json', dict(arm=arm, seed=seed, data=Path(a.data).name, n_train=len(dls.train_ds),
        epochs=a.epochs, bs=a.bs, lr=a.lr, steps=a.steps, eps=EPS, amp=a.amp, augment=a.augment, spec=spec,
        seconds=round(time.perf_counter()-t), curves=seen.rows, torch=torch.__version__,
        python=platform.python_version(), threads=torch.get_num_threads()))

def judge(arm, seed, a):
    folder = Path(a.out)/f'{arm}-{seed}'
    if not (folder/'train.json').exists(): return print(folder, 'is not trained yet')
    dls   = loaders(a, seed)
    x,y   = split_tensors(dls, a.split)
    xs,ys = split_tensors(dls, a.split, a.n_attack)
    for name in a.nets.split(','):
        file = folder/f'{"judged" if a.split=="test" else a.split}_{name}{"_full" if a.full else ""}.json'
        if file.exists(): continue
        net = from_pretrained(folder/f'{name}.safetensors').to(memory_format=torch.channels_last)
        if a.full: vs = [autoattack(net, xs, ys, EPS, bs=250, progress=False)]
        else: vs = [clean(net, x, y), attacked(net, xs, ys, Threat(EPS, steps=20), name='pgd20', bs=500),
                    autoattack(net, xs, ys, EPS, attacks=('apgd-ce','apgd-t'), bs=500, progress=False)]
        stands = lambda v: ''.join('01'[int(b)] for b in v.stands)
        of     = dict(arm=arm, seed=seed, net=name)   # the seed of the training, not the attack's
        write(file, [v.row() | of | dict(stands=stands(v)) for v in vs])
        print(folder.name, name, {v.name: round(100*v.accuracy, 1) for v in vs}, flush=True)

def each_net(kind):
    "`kind(net, x, y)` on the first test images, once per network, beside the weights"
    def work(arm, seed, a):
        folder = Path(a.out)/f'{arm}-{seed}'
        x,y    = split_tensors(loaders(a, seed), 'test', a.n_attack)
        for name in a.nets.split(','):
            file = folder/f'{kind.__name__}_{name}.json'
            if file.exists() or not (folder/'train.json').exists(): continue
            net = from_pretrained(folder/f'{name}.safetensors').to(memory_format=torch.channels_last)
            write(file, dict(arm=arm, seed=seed, net=name) | kind(net, x, y))
            print(folder.name, name, kind.__name__, flush=True)
    return work

def segments(net, x, y):
    "KL from the mixed label to the prediction on the way from each image to the next of another class, in nats"
    two  = y!=y.roll(1)
    ends = x[two],y[two],x.roll(1, 0)[two],y.roll(1)[two]
    t    = torch.linspace(0, 1, 11)
    seen = dict(t=short(t))
    for k,threat in dict(clean=None, attacked=Threat(EPS, steps=10)).items():
        kl = segment_loss(net, *ends, t=t, threat=threat)
        seen |= {k: short(kl.mean(1)), f'{k}_pairs': short(kl.mean(0))}   # along the way, and pair by pair
    return seen

def short(t): return [round(v, 3) for v in t.tolist()]

def battery(net, x, y): return dict(rows=sanity(net, x[:100], y[:100], EPS).rows)

def collect(a):
    of    = lambda glob: [json.loads(f.read_text()) for f in sorted(Path(a.out).glob(glob))]
    flat  = lambda glob: [r for rs in of(glob) for r in rs]
    found = dict(trained=of('*/train.json'), judged=flat('*/judged_*.json'), valid=flat('*/valid_*.json'),
                 segments=of('*/segments_*.json'), sanity=of('*/battery_*.json'))
    write(Path(a.to), {k: v for k,v in found.items() if v})
    print(', '.join(f'{len(v)} {k}' for k,v in found.items()), 'in', a.to)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = dict(do='train, judge, segment, sanity, collect, or some of them with commas between',
                data='an .npz, or cifar10', out='folder of the runs')
    for o,h in told.items(): p.add_argument(o, help=h)
    p.add_argument('to', nargs='?', help='collect: the file to write')
    given = dict(arms='pgd,aom', seeds='0', epochs=20, lr=.015, bs=128, arch='convnet_s', steps=5, n_attack=500,
                 nets=','.join(NETS), amp='no', n_train=0, augment='yes')
    for o,v in given.items():
        p.add_argument(f'--{o}', default=v, type=type(v), help=f'{v} if not given')
    p.add_argument('--split', default='test', choices=['test','valid'], help='judge: valid, to choose by')
    p.add_argument('--full', action='store_true', help='judge: all four attacks of AutoAttack')
    a = p.parse_args()
    torch.set_num_threads(1)
    jobs = dict(train=train, judge=judge, segment=each_net(segments), sanity=each_net(battery))
    for do in a.do.split(','):
        if do=='collect': collect(a)
        else:
            for seed in a.seeds.split(','):
                for arm in a.arms.split(','): jobs[do](arm, int(seed), a)
