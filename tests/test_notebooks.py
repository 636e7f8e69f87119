"Every notebook runs from top to bottom, one test each"
from pathlib import Path
import os, subprocess, sys
import pytest

pytest.importorskip('nbdev', reason='notebooks need the development pins: pip install -e .[dev]')
root = Path(__file__).resolve().parents[1]
nbs  = sorted(p for p in (root/'nbs').rglob('[!_.]*.ipynb') if not (p.parent/'.notest').exists() and '.ipynb_checkpoints' not in p.parts)

@pytest.mark.parametrize('nb', nbs, ids=lambda p: p.relative_to(root/'nbs').with_suffix('').as_posix())
def test_notebook(nb):
    "In a process of its own: generators, patches and figures of one notebook must not reach the next"
    env = os.environ|dict(IN_TEST='1', PYTHONPATH=str(root))
    code = ('import sys; from pathlib import Path; from nbdev.test import test_nb; '
            "sys.exit(not test_nb(Path(sys.argv[1]), skip_flags=['slow', 'cuda'])[0])")
    r = subprocess.run([sys.executable, '-c', code, nb], cwd=root, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-6000:]
