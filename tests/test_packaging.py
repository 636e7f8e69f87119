"What a notebook can't say about itself: exports, ids, README, imports, commands, measures of the house, and what a wheel contains"
import ast, json, os, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
nbs  = sorted((root/'nbs').rglob('[!_.]*.ipynb'))
library = [p for p in nbs if re.match(r'\d\d_', p.name)]
number  = {p.stem[3:]: int(p.stem[:2]) for p in library}

def exported(nb):
    "The source of its cells that are exported"
    cells = [''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code']
    return [s for s in cells if re.search(r'^#\|\s*export', s, re.M)]

leave_out = shutil.ignore_patterns('.git', '.venv', '*.egg-info', 'runs', '__pycache__', 'build')

def run(*args, **kw): return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kw)

@pytest.mark.parametrize('nb', library, ids=lambda p: p.stem)
def test_a_module_imports_only_lower_numbers(nb):
    "Also inside functions: a lazy import upwards is an import upwards"
    tree = ast.parse((root/'advmix'/f'{nb.stem[3:]}.py').read_text())
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('advmix')):
            name = (n.module or '').removeprefix('advmix').strip('.')
            for m in [name] if name else [a.name for a in n.names]:
                assert number.get(m.split('.')[0], -1)<number[nb.stem[3:]], f'{nb.stem} imports {m}'

def test_every_module_has_a_notebook():
    assert {p.stem for p in (root/'advmix').glob('[!_]*.py')}==set(number)

# ---------------------------------------------------------------- measures of the house

def test_every_notebook_has_a_test_file():
    assert not set(number)-{p.stem.removeprefix('test_') for p in (root/'tests').glob('test_*.py')}

def test_exported_lines_can_be_read():
    "None beyond 140 columns, and less than one in a hundred beyond 120"
    lines = [(len(l), nb.stem, l) for nb in library for s in exported(nb) for l in s.splitlines() if l.strip()]
    assert not [o for o in lines if o[0]>140]
    wide = sorted((o for o in lines if o[0]>120), reverse=True)
    assert len(wide)<.01*len(lines), wide

def test_test_lines_can_be_read():
    wide = [f'{p.name}:{i}' for p in (root/'tests').glob('*.py') for i,l in enumerate(p.read_text().splitlines(), 1) if len(l)>140]
    assert not wide

def public_names(nb):
    "Functions and classes at the top of exported cells, methods added by `patch` not counted"
    for s in exported(nb):
        for n in ast.parse(s).body:
            if not isinstance(n, (ast.FunctionDef,ast.ClassDef)) or n.name.startswith('_'): continue
            if not any(getattr(getattr(d, 'func', d), 'id', '')=='patch' for d in n.decorator_list): yield n.name

def test_there_are_not_too_many_names():
    count = {nb.stem: len(list(public_names(nb))) for nb in library}
    assert sum(count.values())<=130, count

def test_every_public_name_has_a_docstring():
    bare = [f'{nb.stem}.{n.name}' for nb in library for s in exported(nb) for n in ast.parse(s).body
            if isinstance(n, (ast.FunctionDef,ast.ClassDef)) and not n.name.startswith('_') and not ast.get_docstring(n)]
    assert not bare

SIGNATURES = '''
import inspect, json
from public import public
long = {}
for mod,name,o in public():
    if name=='Config' or o.__module__!=mod.__name__: continue   # Config is what a command takes
    own = lambda k: k=='__init__' or not k.startswith('_')
    fs = [f for k,f in vars(o).items() if own(k)] if inspect.isclass(o) else [inspect.unwrap(o)]
    for f in fs:
        f = getattr(f, '__func__', f)
        if not inspect.isfunction(f): continue
        n = [p for p in inspect.signature(f, follow_wrapped=False).parameters.values() if p.name not in ('self','cls')]
        if len(n)>12 and not hasattr(f, '__delwrap__'): long[f'{mod.__name__}.{name}.{f.__name__}'] = len(n)
print(json.dumps(long))
'''

def test_no_signature_is_too_long():
    "At most twelve parameters; what is passed on to somebody else is delegated"
    r = run('-c', SIGNATURES, cwd=root, env=os.environ|dict(PYTHONPATH=os.pathsep.join([str(root), str(root/'tests')])))
    assert r.returncode==0, r.stderr[-3000:]
    assert json.loads(r.stdout.splitlines()[-1])=={}

@pytest.mark.parametrize('nb', library, ids=lambda p: p.stem)
def test_no_private_imports_between_modules(nb):
    tree = ast.parse((root/'advmix'/f'{nb.stem[3:]}.py').read_text())
    private = [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level for a in n.names if a.name.startswith('_')]
    assert not private

# ---------------------------------------------------------------- notebooks

@pytest.mark.parametrize('nb', nbs, ids=lambda p: p.stem)
def test_notebooks_are_clean(nb):
    d = json.loads(nb.read_text())
    assert d['nbformat_minor']>=5 and len({c['id'] for c in d['cells']})==len(d['cells'])
    assert all(c.get('execution_count') is None for c in d['cells'])
    assert nb.stat().st_size<2**20
    outputs = json.dumps([c.get('outputs') for c in d['cells']])
    assert not re.search(r'/home/|/root/|/work/|/tmp/|site-packages', outputs), 'a local path in the outputs'

@pytest.mark.parametrize('nb', nbs, ids=lambda p: p.stem)
def test_notebooks_show_their_outputs(nb):
    d = json.loads(nb.read_text())
    assert any(c.get('outputs') for c in d['cells']) and not any('skip_exec' in ''.join(c['source']) for c in d['cells'])

def test_export_changes_nothing(tmp_path):
    pytest.importorskip('nbdev')
    copy = shutil.copytree(root, tmp_path/'repo', ignore=leave_out)
    r = run('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    assert r.returncode==0, r.stderr
    for p in (root/'advmix').glob('*.py'):
        assert (copy/'advmix'/p.name).read_text()==p.read_text(), f'{p.name} differs from its notebook: run nbdev_export'

def test_readme_is_the_index():
    pytest.importorskip('execnb')
    sys.path.insert(0, str(root/'tests'))
    from make_readme import gallery, read_nb, render
    text,pics = render(read_nb(root/'nbs/index.ipynb'))
    assert text==(root/'README.md').read_text(encoding='utf-8'), 'README.md is stale: python tests/make_readme.py'
    for name,png in dict(pics, **{'gallery.png': gallery()}).items(): assert (root/'nbs/images'/name).read_bytes()==png

def test_import_has_no_side_effects():
    code = '''
import random, socket, sys, warnings, numpy as np, torch
import fastai.vision.all
from fastai.vision.all import Learner
def fail(*a, **k): raise AssertionError('network at import')
socket.socket.connect = fail
state = lambda: (torch.random.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].sum(),
                 list(warnings.filters), torch.get_num_threads(), torch.get_default_dtype())
before = state()
import importlib, pkgutil, advmix
for m in pkgutil.iter_modules(advmix.__path__):
    if not m.name.startswith('_'): importlib.import_module('advmix.'+m.name)
assert state()==before
'''
    r = run('-c', code, cwd=root)
    assert r.returncode==0, r.stderr[-3000:]

def test_import_costs_little():
    "Everything advmix exports, on top of `fastai.vision.all`, brings two small packages"
    code = '''
import sys, fastai.vision.all
before = {m.partition(".")[0] for m in sys.modules}
import importlib, pkgutil, advmix
for m in pkgutil.iter_modules(advmix.__path__):
    if not m.name.startswith('_'): importlib.import_module('advmix.'+m.name)
print(*{m.partition(".")[0] for m in sys.modules}-before)
'''
    r = run('-c', code, cwd=root)
    assert r.returncode==0, r.stderr[-3000:]
    assert 'advmix' in r.stdout.split() and set(r.stdout.split())<={'advmix','pyautoattack','safetensors','joblib'}

def commands():
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini')
    return dict(l.split('=') for l in ini['DEFAULT']['console_scripts'].split())

@pytest.mark.parametrize('name', commands())
def test_console_scripts_start(name):
    ep = {e.name: e for e in entry_points(group='console_scripts')}
    if name not in ep: pytest.fail(f'{name} is not installed: pip install -e .')
    code = f'''
import sys
from importlib.metadata import entry_points
sys.argv = ["{name}","--help"]
next(iter(entry_points(group="console_scripts", name="{name}"))).load()()
'''
    r = run('-c', code)
    assert r.returncode==0 and 'usage' in r.stdout, r.stdout+r.stderr

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "A folder with wheel and sdist, built from a copy of the repository"
    pytest.importorskip('setuptools')
    tmp  = tmp_path_factory.mktemp('dist')
    copy = shutil.copytree(root, tmp/'repo', ignore=leave_out)
    for kind in ('sdist', 'bdist_wheel'):
        r = run('setup.py', '-q', kind, '--dist-dir', str(tmp/'dist'), cwd=copy)
        assert r.returncode==0, r.stderr[-2000:]
    return tmp/'dist'

def test_wheel_and_sdist_are_complete(dist):
    wheel = zipfile.ZipFile(next(dist.glob('*.whl'))).namelist()
    sdist = tarfile.open(next(dist.glob('*.tar.gz'))).getnames()
    parts = [p.relative_to(root).as_posix() for p in (root/'advmix').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    assert 'advmix/py.typed' in parts
    for f in parts: assert f in wheel and any(n.endswith('/'+f) for n in sdist), f
    for f in ('settings.ini', 'README.md', 'LICENSE', 'setup.py'): assert any(n.endswith('/'+f) for n in sdist), f
    assert not any(n.startswith(('tests', 'nbs')) for n in wheel)

def test_the_wheel_works_without_the_repository(dist, tmp_path):
    "Installed somewhere else, it imports from there, has its commands, and trains"
    pytest.importorskip('pip')
    site = tmp_path/'site'
    r = run('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(site), str(next(dist.glob('*.whl'))), cwd=tmp_path)
    assert r.returncode==0, r.stderr[-2000:]
    assert {p.name for p in (site/'bin').iterdir()}>=set(commands())
    code = '''
import sys, advmix
from public import public
assert {mod.__file__.startswith(sys.argv[1]) for mod,*_ in public()}=={True}
from advmix.cli import train
sys.argv = 'advmix_train --method pgd --epochs 1 --steps 1 --n-eval 16 --suite clean,pgd20 --out run'.split()
train()
'''
    (tmp_path/'public.py').write_text((root/'tests/public.py').read_text())
    r = run('-c', code, str(site), cwd=tmp_path, env=os.environ|dict(PYTHONPATH=os.pathsep.join([str(site), str(tmp_path)])))
    assert r.returncode==0, r.stderr[-2000:]
    assert (tmp_path/'run/report.json').exists() and 'worst case' in r.stdout
