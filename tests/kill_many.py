"""Kill runs at any moment, go on, and compare with a run that was left alone, bit for bit.

    python tests/kill_many.py                  # every method: five random kills; one method: every moment of writing
    python tests/kill_many.py --methods pgd,automix --random 20 --moments pgd

Each run is a fork of one process that has imported everything and nothing else, and takes a second or two."""
import argparse, json, multiprocessing, os, random, signal, sys, tempfile, time
from functools import cache
from pathlib import Path
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
paths = [str(Path(__file__).resolve().parents[i]) for i in (0,1)]
sys.path[:0] = paths
os.environ['PYTHONPATH'] = os.pathsep.join([*paths, os.environ.get('PYTHONPATH', '')])   # the process that forks reads only this
import torch
from advmix import experiment as E
from advmix.config import Config
from advmix.data import digits_dls, split_tensors, tensor_dls
from advmix.methods import METHODS
from safetensors.torch import load_file

torch.set_num_threads(1)
VARIANTS = {**{m: dict(method=m) for m in METHODS}, 'mixup+ema': dict(method='mixup', ema=True), 'aom+kl': dict(method='aom', ratio='kl'),
            'adautomix+released': dict(method='adautomix', objective='released')}

def config(variant='pgd', **kw):
    return Config(**dict(epochs=3, steps=1, bs=32, n_eval=4, suite='clean,fgsm') | VARIANTS[variant] | kw)

@cache
def hundred():
    "A hundred digits in place of all of them"
    dls = digits_dls()
    return [t for w,n in (('train',100),('valid',20),('test',20)) for t in split_tensors(dls, w, n=n)]

class Moments:
    "Counts what happens to files below `folder`, and ends the process at the moment that is asked for"
    def __init__(self, folder, at=None, log=None): self.folder,self.at,self.log,self.seen = str(folder),at,log,[]

    def here(self, what, path, torn=None):
        for when in ('before','torn','after') if torn else ('before','after'):
            if when=='after': yield
            name = f'{when} {what} {os.path.relpath(path, self.folder)}'
            key  = f'{name} #{sum(s.startswith(name+" #") for s in self.seen)+1}'
            self.seen.append(key)
            if self.log: self.log.write(key+'\n'); self.log.flush()
            if key==self.at:
                if when=='torn': torn()
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, name, path_of, torn=lambda *a: None):
        real = getattr(os, name)
        def hooked(*args, **kw):
            path = path_of(*args)
            if not path or not path.startswith(self.folder) or name=='unlink' and not os.path.lexists(path): return real(*args, **kw)
            moments = self.here(name, path, torn(*args))
            next(moments)
            res = real(*args, **kw)
            for _ in moments: pass
            return res
        setattr(os, name, hooked)

    def install(self):
        on_fd = lambda fd: os.readlink(f'/proc/self/fd/{fd}')
        half  = lambda fd: None if os.path.isdir(on_fd(fd)) else (lambda: os.truncate(on_fd(fd), os.path.getsize(on_fd(fd))//2))
        self.wrap('fsync', on_fd, half)
        self.wrap('replace', lambda a, b: str(b))
        self.wrap('unlink', lambda p, **k: str(p))
        self.wrap('mkdir', lambda p, *a: str(p))

def make(settings, out, at, log):
    "A run, in a process of its own"
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in (1,) if os.environ.get('KILL_MANY_LOUD') else (1,2): os.dup2(null, fd)
    torch.set_num_threads(1)
    E.get_dls = lambda data, bs, seed, size: tensor_dls(*hundred(), bs=bs, seed=seed)
    Moments(out, at, log and open(log, 'w')).install()
    E.run(Config(**settings), out, device='cpu', resume=True)

def start(f, *args):
    "Call `f` in a fork of a process that has imported this file"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['kill_many'])
    p = ctx.Process(target=f, args=args)
    p.start()
    return p

@cache
def warm(): "The first fork waits for the imports"; wait(start(hundred))

def child(c, out, at=None, log=None): return start(make, vars(c), out, at, log)

def wait(p):
    p.join()
    return p.exitcode

def contents(folder):
    "All that must be equal: weights to the last bit, history and report without the clock, and which files there are"
    report = json.loads((folder/'report.json').read_text())
    drop   = lambda o: {k: drop(v) for k,v in o.items() if k!='seconds'} if isinstance(o, dict) else [drop(v) for v in o] if isinstance(o,
        list) else o
    hist   = [l.rsplit(',', 1)[0] for l in (folder/'history.csv').read_text().splitlines()]
    assert (folder/'history.csv').read_text().split('\n')[0].endswith(',time')
    nets   = {p.name: {k: v.numpy().tobytes() for k,v in load_file(p).items()} for p in folder.glob('*.safetensors')}
    return dict(report=drop(report), history=hist, nets=nets, files=sorted(p.name for p in folder.iterdir()),
        config=(folder/'config.json').read_text())

def differences(a, b): return [k for k in a if a[k]!=b[k]]

class Case:
    "A config, and what comes out when nobody disturbs"
    def __init__(self, name, tmp, **kw):
        self.name,self.tmp,self.c,self.n = name,Path(tmp),config(name, **kw),0
        whole,log = self.tmp/f'{name}-whole',self.tmp/f'{name}.log'
        warm()
        t = time.perf_counter()
        assert wait(child(self.c, whole, log=log))==0, f'{name} fails undisturbed: KILL_MANY_LOUD=1 says why'
        self.seconds,self.want,self.moments = time.perf_counter()-t,contents(whole),log.read_text().splitlines()

    def verdict(self, out, died):
        "Go on where it stopped: what differs then"
        if wait(child(self.c, out))!=0: return died,['it does not go on']
        return died,differences(self.want, contents(out))

    def at_moment(self, at):
        self.n += 1
        out = self.tmp/f'{self.name}-{self.n}'
        return self.verdict(out, wait(child(self.c, out, at=at))==-signal.SIGKILL)

    def at_random(self, rng, times=1):
        "Killed as often as that, at random"
        self.n += 1
        out,died = self.tmp/f'{self.name}-{self.n}',False
        for _ in range(times):
            p = child(self.c, out)
            time.sleep(rng.uniform(0, self.seconds))
            p.kill()
            died = wait(p)==-signal.SIGKILL or died
        return self.verdict(out, died)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--methods', default=','.join(VARIANTS))
    p.add_argument('--random', type=int, default=5, help='random kills per method')
    p.add_argument('--moments', default='adautomix', help='methods to be killed at every moment of writing')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    rng,bad = random.Random(a.seed),0
    print(f'{"method":20} {"seconds":>7} {"killed":>6} {"equal":>6}')
    with tempfile.TemporaryDirectory() as tmp:
        for m in filter(None, a.methods.split(',')):
            case = Case(m, tmp)
            res  = []
            while sum(k for k,_ in res)<a.random and len(res)<4*a.random:   # some come too late
                res.append(case.at_random(rng, 1+len(res)%2))
            bad += sum(bool(d) for _,d in res)
            print(f'{m:20} {case.seconds:7.1f} {sum(k for k,_ in res):6} {sum(not d for _,d in res):3}/{len(res)}',
                *[d for _,d in res if d], flush=True)
        for m in filter(None, a.moments.split(',')):
            case = Case(m, tmp, suite='clean,autoattack', epochs=2)
            print(f'\n{m}: {len(case.moments)} moments of writing, AutoAttack included\n{"moment":60} died equal')
            for at in case.moments:
                died,diff = case.at_moment(at)
                bad += bool(diff) or not died
                print(f'{at:60} {"yes" if died else "NO":4} {"yes" if not diff else diff}', flush=True)
    print(f'\n{bad} failures')
    return bad>0

if __name__=='__main__':
    from kill_many import main   # so that processes find it by its name
    sys.exit(main())
