"The documentation can be made: nbdev's own preparation of every notebook, and show_doc of every public name"
import json, os, subprocess, sys
from pathlib import Path
import pytest

pytest.importorskip('nbdev', reason='documentation needs the development pins: pip install -e .[dev]')
root = Path(__file__).resolve().parents[1]

def run(code, *args):
    "What `code` prints last, as JSON; in a process of its own, in the repository, which it leaves as it is"
    env = os.environ|dict(PYTHONPATH=str(root), IN_TEST='1')
    r = subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=root, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])

PREPARE = '''
import io, json, sys, warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
bad = {}
for p in sys.argv[1:]:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.filterwarnings('error', message='Found cells containing imports')   # such a cell is run when it should only be shown
        try: FilterDefaults()(read_nb(p))
        except Exception as e: bad[Path(p).name] = f'{e} {e.__cause__ or ""}'[-400:]
print(json.dumps(bad))
'''

def test_notebooks_can_be_prepared():
    "Cells that import are executed for `show_doc`, so imports stand in cells of their own"
    nbs = sorted(p for p in (root/'nbs').rglob('[!_.]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    before = sorted(p.name for p in (root/'nbs').iterdir())
    bad = run(PREPARE, *nbs)
    assert not bad, '\n\n'.join(f'{k}: {v}' for k,v in bad.items())
    assert sorted(p.name for p in (root/'nbs').iterdir())==before

SHOW = '''
import importlib, json, pkgutil, advmix
from nbdev.showdoc import show_doc
bad = {}
for m in pkgutil.iter_modules(advmix.__path__):
    if m.name.startswith('_'): continue
    mod = importlib.import_module('advmix.'+m.name)
    for name in mod.__all__:
        o = getattr(mod, name)
        if not callable(o): continue
        try: assert name in str(show_doc(o)._repr_markdown_())
        except Exception as e: bad[f'{m.name}.{name}'] = repr(e)[:200]
print(json.dumps(bad))
'''

def test_every_public_name_can_be_shown():
    bad = run(SHOW)
    assert not bad, '\n'.join(f'{k}: {v}' for k,v in bad.items())
