"Two gloo processes, started once for all checks: equal companions, exactly averaged gradients, and nobody waits for one that failed"
import json, os, signal, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
import two_ranks
from advmix.data import split_tensors
from advmix.files import get_dls
from advmix.folder import Run

HERE = Path(__file__).resolve().parent

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What both processes found, and how the start ended"
    out = tmp_path_factory.mktemp('two')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', str(HERE/'two_ranks.py'), str(out)]
    env = os.environ|dict(PYTHONPATH=f'{HERE.parent}:{HERE}', OMP_NUM_THREADS='1')
    r = subprocess.run(cmd, capture_output=True, text=True, cwd=HERE.parent, env=env, timeout=300)
    files = [out/f'rank{i}.pt' for i in (0,1)]
    assert all(f.exists() for f in files), r.stderr[-4000:]
    return [torch.load(f) for f in files],r

@pytest.mark.parametrize('name', ['mix', 'game'])
def test_networks_and_companions_are_equal_and_ratios_are_not(ranks, name):
    a,b = (r['trained'][name] for r in ranks[0])
    for k in ('w', 'companion', 'gen'): assert torch.equal(a[k], b[k]), k
    assert a['lams']!=b['lams']

@pytest.fixture(scope='module')
def whole(): return two_ranks.first_gradients([0,1], lambda learn: nullcontext())

@pytest.mark.parametrize('name', ['mixup', 'pgd', 'aom', 'iat', 'adautomix'])
def test_gradients_of_two_halves_are_those_of_the_whole_batch(ranks, whole, name):
    for r in ranks[0]:
        got,want = r['grads'][name],whole[name]
        assert len(got)==len(want) and all(torch.allclose(a, b, atol=1e-6) for a,b in zip(got, want))
    assert max(g.abs().max() for g in whole[name])>1e-3

def test_one_rank_failing_ends_the_other(ranks): assert ranks[1].returncode!=0 and 'rank one fails here' in ranks[1].stderr

# --- whole runs ---

def torchrun(*args, **kw):
    "A process that starts two"
    env = os.environ|dict(PYTHONPATH=f'{HERE.parent}:{HERE}', OMP_NUM_THREADS='1', MPLBACKEND='agg')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', *map(str, args)]
    return subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, **kw)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder with runs of two processes, and how each ended in both"
    out = tmp_path_factory.mktemp('runs')
    says = torchrun(HERE/'two_runs.py', out).communicate(timeout=300)
    files = [out/f'rank{i}.json' for i in (0,1)]
    assert all(f.exists() for f in files), says[1][-4000:]
    return out,*[json.loads(f.read_text()) for f in files]

def test_the_first_process_returns_and_the_other_ends(runs):
    _,first,second = runs
    for k in ('whole','resumed','opened'): assert (first[k],second[k])==('returned','SystemExit: 0')

def test_mistakes_are_said_once(runs):
    _,first,second = runs
    for k,says in dict(there='unfinished run', batch='bs=255 cannot be divided among 2 processes', diverged='lower the learning').items():
        assert says in first[k] and second[k]=='SystemExit: 0', k
    assert first['stopped'].startswith('KeyboardInterrupt: go on from the last epoch') and second['stopped']=='SystemExit: 130'
    assert 'without torchrun' in first['compare']

def test_a_run_of_two_processes_is_one_run(runs):
    "One folder with the files of a run, all images judged, and nothing of the second process"
    r = Run(runs[0]/'whole')
    assert {p.name for p in r.folder.iterdir()}=={'config.json','history.csv','history.png','model.safetensors','model_ema.safetensors',
                                                  'report.json','report.png'}
    rows = {o['name']:o for o in r.report.rows}
    assert all(rows[k]['n']==33 for k in ('clean','pgd20','clean_ema','worst case')) and r.config.bs==256 and not r.report.missing
    x,y = split_tensors(get_dls(), n=33)
    for ema,name in ((False,'clean'),(True,'clean_ema')):
        stands = ''.join('01'[int(o)] for o in r.model(ema)(x).argmax(1)==y)
        assert rows[name]['stands']==stands   # each image in its place
    assert not (runs[0]/'odd').exists() and not (runs[0]/'wild').exists()

def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(runs):
    a,b = (Run(runs[0]/k) for k in ('whole','stopped'))
    assert a.history.drop(columns='time').equals(b.history.drop(columns='time'))
    for ema in (False, True):
        for k,v in a.model(ema).state_dict().items(): assert torch.equal(v, b.model(ema).state_dict()[k])
    assert [o['stands'] for o in a.report.rows]==[o['stands'] for o in b.report.rows]

def test_two_processes_cannot_go_on_where_one_stopped(runs, tmp_path):
    cb = Run(runs[0]/'whole').checkpoint()
    cb.folder,cb.learn = tmp_path,SimpleNamespace(dls=SimpleNamespace(vocab=['a']))
    torch.save(dict(vocab=['a'], rng=[{},{}]), cb.path)
    with pytest.raises(ValueError, match='written by 2 processes'): cb.read()

def test_ctrl_c_ends_all_processes(tmp_path):
    code = tmp_path/'train.py'
    code.write_text('import torch; torch.set_num_threads(1)\nfrom advmix.cli import train\ntrain()\n')
    p = torchrun(code, '--method', 'vanilla', '--epochs', 9999, '--device', 'cpu', '--out', tmp_path/'r', cwd=tmp_path)
    try:
        for line in p.stdout:
            if line.split()[:1]==['1']: break   # the second epoch's row
        os.kill(p.pid, signal.SIGINT)
        p.communicate(timeout=120)
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode!=0 and Run(tmp_path/'r').unfinished
    with Run(tmp_path/'r').at_work(): pass   # nobody is at work there
