"""The small weights that ship with the package, made again: `from_pretrained` reads what this leaves

    python pretrained.py train OUT              # every run, or --names pgd,...: 30 minutes of one core; resumes
    python pretrained.py collect OUT WEIGHTS    # judged on exact test images, and written to the package's folder

`train` is `advmix_train` with the settings in `RUNS`, but for the judging; learned mixtures tap the last stage and keep
their generator.
`collect --exact FILE` takes an `.npz` with `x_test` and `y_test`, uint8; without it the test images are fastai's."""
import argparse
from advmix.config import Config

SAME = dict(data='cifar10', arch='convnet_s', bs=128, lr=1e-2, ema=True, amp='bf16', channels_last=True)
HARD = dict(epochs=5, steps=3, step=4/255)
MAP  = dict(stage=-1)   # masks from a map of 8 places a side, as published for CIFAR; of 16 they cost three times the step
RUNS = dict(
    vanilla    = dict(epochs=8),
    adautomix  = dict(epochs=6),
    pgd        = HARD,
    cutmix_pgd = HARD,
    aom        = HARD)

def train(out, name):
    "One run: `student`, `average` and, where a mixture is learned, `generator`"
    import math, time, torch
    from fastai.callback.schedule import fit_one_cycle
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.torch_core import set_seed
    from safetensors.torch import save_file
    from advmix.callbacks import AdAutoMixCallback, EMACallback
    from advmix.data import data_stats
    from advmix.files import get_dls
    from advmix.folder import Run, save_model
    from advmix.game import GameCallback
    from advmix.methods import METHODS
    from advmix.models import get_model
    c = Config(name, **SAME, **RUNS[name])
    if (out/name/'average.safetensors').exists(): return
    run = Run.find(c, out/name, resume=True)
    with run.at_work():
        set_seed(c.seed, reproducible=True)
        dls  = get_dls(c.data, bs=c.bs, seed=c.seed, size=c.size)
        m,s  = data_stats(dls, 2000)
        spec = dict(arch=c.arch, n_classes=len(dls.vocab), c_in=len(m), size=c.size, mean=m, std=s)
        cbs  = [AdAutoMixCallback(**MAP)] if name=='adautomix' else METHODS[name](c)
        game = next((cb for cb in cbs if isinstance(cb, GameCallback)), None)
        if game is None: cbs.append(EMACallback())
        cbs.append(run.checkpoint(100*math.log(len(dls.vocab))))
        learn = Learner(dls, get_model(**spec), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
        with learn.no_bar(): learn.pace(c.amp, c.channels_last).fit_one_cycle(c.epochs, c.lr)
        print(name, f'{time.process_time():.0f} s of processor time', flush=True)
        if game: save_file(game.game.generator.state_dict(), run.folder/'generator.safetensors')
        save_model(learn.model, run.folder/'student.safetensors', dls.vocab, **spec)
        save_model(game.teacher if game else learn.ema.average.net, run.folder/'average.safetensors', dls.vocab, **spec)

def images(exact, n=None):
    "Test images and labels: those of an `.npz`, else of CIFAR-10 as fastai has it"
    import numpy as np, torch
    if exact is not None:
        with np.load(exact) as f: x,y = (torch.from_numpy(f[k]) for k in ('x_test','y_test'))
        return (x.float()/255)[:n],y.long()[:n]
    from advmix.data import split_tensors
    from advmix.files import get_dls
    return split_tensors(get_dls('cifar10'), 'test', n=n)

def judge(out, name, exact, n_robust=300):
    "What is known of a trained network: its settings, and what was measured"
    import torch
    from advmix.autoattack import autoattack
    from advmix.evaluate import clean
    from advmix.weights import from_pretrained
    from advmix.folder import Run
    net = from_pretrained(out/name/'average.safetensors')
    x,y = images(exact)
    right = lambda v, **kw: dict(accuracy=round(v.accuracy, 4), n=len(v.stands), **kw)
    robust = autoattack(net, x[:n_robust], y[:n_robust], eps=8/255, attacks=('apgd-ce','apgd-t'), progress=False)
    return dict(command=f'python nbs/experiments/pretrained.py train runs --names {name}', settings=SAME | RUNS[name],
                seed=0, weights='average', clean=right(clean(net, x, y)),
                robust=right(robust, attack='APGD-CE, then APGD-T', eps='8/255'), torch=torch.__version__.split('+')[0])

def sheet(exact, path):
    "The first ten test images of each class, a row for each, as one lossless picture"
    import torch
    from PIL import Image
    x,y = images(exact)
    x = torch.stack([x[y==k][:10] for k in range(10)])
    Image.fromarray((x*255).round().byte().permute(0,3,1,4,2).reshape(320, 320, 3).numpy()).save(path, optimize=True)

def collect(out, to, exact, note):
    "Write every finished run and what was measured of it into the folder `to`; what is in its JSON stays"
    import json
    from safetensors import safe_open
    from safetensors.torch import load_file
    from advmix.folder import save_model
    from advmix.weights import from_pretrained
    about = to/'pretrained.json'
    if not (to/'cifar10_sheet.png').exists(): sheet(exact, to/'cifar10_sheet.png')
    known = json.loads(about.read_text()) if about.exists() else {}
    for name in RUNS:
        path = out/name/'average.safetensors'
        if not path.exists() or f'{name}-cifar10' in known: continue
        net = from_pretrained(path)
        with safe_open(path, 'pt') as f: spec = json.loads(f.metadata()['spec'])
        game = (out/name/'generator.safetensors').exists()
        beside = {k: load_file(out/name/f'{k}.safetensors') for k in ('student','generator')} if game else None
        known[f'{name}-cifar10'] = judge(out, name, exact) | json.loads(note) | (dict(generator=MAP) if game else {})
        save_model(net, to/f'{name}-cifar10.safetensors', net.vocab, beside, **spec)
        print(name, {k: known[f'{name}-cifar10'][k]['accuracy'] for k in ('clean','robust')}, flush=True)
        about.write_text(json.dumps(known, indent=1)+'\n')

if __name__=='__main__':
    from pathlib import Path
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['train','collect'])
    p.add_argument('out', type=Path)
    p.add_argument('to', type=Path, nargs='?', default=Path('../../advmix/pretrained'))
    p.add_argument('--names', default=','.join(RUNS), help='which runs to train')
    p.add_argument('--exact', type=Path, help='an .npz with x_test and y_test to judge by')
    p.add_argument('--note', default='{}', help='JSON to keep with the numbers: data, hardware')
    a = p.parse_args()
    if a.what=='collect': collect(a.out, a.to, a.exact, a.note)
    else:
        for name in a.names.split(','): train(a.out, name)
