"""The small weights that ship with the package, made again: `from_pretrained` reads what this leaves

    python pretrained.py train OUT              # every run, or --names pgd,...: about an hour of one core; resumes
    python pretrained.py collect OUT WEIGHTS    # judged on exact test images, and written to the package's folder

`train` is `advmix_train` with the settings in `RUNS`, but for the judging, and keeps the generator of a learned mixture.
`collect --exact FILE` takes an `.npz` with `x_test` and `y_test`, uint8; without it the test images of `--data` are used."""
import argparse
from advmix.config import Config

SAME = dict(data='cifar10', arch='convnet_s', bs=128, lr=1e-2, ema=True, amp='bf16', channels_last=True)
HARD = dict(epochs=6, steps=3, step=4/255)
RUNS = dict(
    vanilla    = dict(epochs=8),
    adautomix  = dict(epochs=8),
    pgd        = HARD,
    automix    = dict(epochs=6),
    cutmix_pgd = HARD)

def train(out, name):
    "One run: `student`, `average` and, where a mixture is learned, `generator`"
    import math, time, torch
    from fastai.callback.schedule import fit_one_cycle
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.torch_core import set_seed
    from safetensors.torch import save_file
    from advmix.callbacks import EMACallback
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
        cbs  = METHODS[name](c)
        game = next((cb for cb in cbs if isinstance(cb, GameCallback)), None)
        if game is None: cbs.append(EMACallback())
        cbs.append(run.checkpoint(100*math.log(len(dls.vocab))))
        learn = Learner(dls, get_model(**spec), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
        t = time.process_time()
        with learn.no_bar(): learn.pace(c.amp, c.channels_last).fit_one_cycle(c.epochs, c.lr)
        print(name, f'{time.process_time()-t:.0f} s of CPU in this process', flush=True)
        if game: save_file(game.game.generator.state_dict(), run.folder/'generator.safetensors')
        save_model(learn.model, run.folder/'student.safetensors', dls.vocab, **spec)
        save_model(game.teacher if game else learn.ema.average.net, run.folder/'average.safetensors', dls.vocab, **spec)

if __name__=='__main__':
    from pathlib import Path
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['train','collect'])
    p.add_argument('out', type=Path)
    p.add_argument('--names', default=','.join(RUNS))
    a = p.parse_args()
    for name in a.names.split(','): train(a.out, name)
