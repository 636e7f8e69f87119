"Two gloo processes, started once for all checks: equal companions, exactly averaged gradients, and nobody waits for one that failed"
import os, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
import two_ranks

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
