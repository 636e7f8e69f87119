"What test_distributed.py starts by torchrun in two processes: runs that are finished, stopped, resumed and refused"
import json, sys
from pathlib import Path
import torch
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib
from advmix.config import Config
from advmix.experiment import compare_runs, run
from advmix.methods import METHODS

small = dict(epochs=3, steps=1, bs=256, n_eval=33, suite='clean,fgsm,pgd20', ema=True)

class Stop(Callback):
    "Ctrl-C in the second epoch"
    run_valid = False
    def after_batch(self):
        if (self.epoch,self.iter)==(1,1): raise KeyboardInterrupt

def outcome(f):
    "How it ended, in one line"
    try: f()
    except BaseException as e: return f'{type(e).__name__}: {e}'
    return 'returned'

if __name__=='__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    def make(name, resume=False, **kw): return run(Config(**small|kw), out/name, 'cpu', resume=resume, progress=False)
    said = dict(whole=outcome(lambda: make('whole')))
    aom = METHODS['aom']
    METHODS['aom'] = lambda c: [*aom(c), Stop()]
    said['stopped'] = outcome(lambda: make('stopped'))
    METHODS['aom'] = aom
    said['there']    = outcome(lambda: make('stopped'))
    said['resumed']  = outcome(lambda: make('stopped', resume=True))
    said['opened']   = outcome(lambda: make('whole'))
    said['batch']    = outcome(lambda: make('odd', bs=255))
    said['diverged'] = outcome(lambda: make('wild', lr=1e6, method='vanilla'))
    said['compare']  = outcome(lambda: compare_runs(['vanilla'], out=out/'c'))
    (out/f'rank{rank_distrib()}.json').write_text(json.dumps(said))
