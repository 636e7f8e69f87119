"The documentation can be made, every link leads somewhere, and every notebook is in the table of contents"
import json, os, re, subprocess, sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path
import pytest, yaml

root = Path(__file__).resolve().parents[1]
nbs  = sorted(p for p in (root/'nbs').rglob('[!_.]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
nbdev_needed = pytest.mark.skipif(find_spec('nbdev') is None, reason='needs the development pins: pip install -e .[dev]')

# ---------------------------------------------------------------- links

def prose(path):
    "The text of a page without code"
    if path.suffix!='.ipynb': text = path.read_text(encoding='utf-8')
    else:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        text  = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')
    text = re.sub(r'^```.*?^```', '', text, flags=re.M|re.S)
    return re.sub(r'^ {4}.*$|`[^`\n]*`', '', text, flags=re.M)

def anchors(path):
    "What its headings are called in a link, as GitHub and Quarto do"
    heads = re.findall(r'^#+ (.+)$', prose(path), flags=re.M)
    return {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in heads}

def links(path): return re.findall(r'\]\(([^)\s]+)\)', prose(path))

pages = [*nbs, *(root/f for f in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'tests/README.md'))]

@pytest.mark.parametrize('page', pages, ids=lambda p: p.relative_to(root).as_posix())
def test_every_link_leads_somewhere(page):
    "To a file of the repository, and to a heading that is there; addresses in the net must be whole"
    for link in links(page):
        if re.match(r'https?://', link):
            assert re.match(r'https://[\w.-]+\.\w+(/|$)', link), link
            continue
        assert not link.startswith('/'), f'{link} leads out of the repository'
        file,_,anchor = link.partition('#')
        to = (page.parent/file).resolve() if file else page
        assert to.exists() and root in to.parents, f'{page.name}: {link} leads nowhere'
        if anchor: assert anchor in anchors(to), f'{page.name}: {link}: no such heading among {sorted(anchors(to))}'

def test_the_checker_sees_what_is_wrong(tmp_path):
    page = tmp_path/'a.md'
    page.write_text('# One idea: `x`\n[a](b.md) `[c](d.md)`\n\n    [e](f.md)\n\n```\n[g](h.md)\n```\n[i](#one-idea)')
    assert links(page)==['b.md','#one-idea'] and anchors(page)=={'one-idea'}

def test_our_address_is_one():
    "Links to the project itself carry the address of `settings.ini`"
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini')
    url = ini['DEFAULT']['git_url']
    ours = {m for p in pages for m in re.findall(r'https://github\.com/advmix/\w+', p.read_text(encoding='utf-8'))}
    assert ours<={url}

def test_the_blocks_of_the_readme_run(tmp_path):
    "In order, in an empty folder, with what is said between them: a short fit, a report"
    blocks = re.findall(r'^```python\n(.*?)^```', (root/'README.md').read_text(encoding='utf-8'), flags=re.M|re.S)
    after  = """
import advmix.report
assert mixed.x.shape==x.shape==x_adv.shape
with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
assert learn.robust_report(eps=.15, suite=['clean'], n=50, progress=False).rows[0]['accuracy']>.1
"""
    env = os.environ|dict(PYTHONPATH=str(root), MPLBACKEND='agg')
    r = subprocess.run([sys.executable, '-c', '\n'.join(blocks)+after], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert len(blocks)>=3 and r.returncode==0, r.stderr[-3000:]
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------- table of contents

def listed(): return {(root/'nbs'/l).resolve() for l in links(root/'nbs/index.ipynb') if l.endswith('.ipynb')}

def test_every_notebook_is_in_the_table_of_contents(): assert {p for p in nbs if p.name!='index.ipynb'}==listed()

def test_the_sidebar_has_every_notebook_once():
    side  = yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    files = [f for o in side for f in ([o] if isinstance(o, str) else o['contents'])]
    assert len(files)==len(set(files)) and {root/'nbs'/f for f in files}==set(nbs)

# ---------------------------------------------------------------- what nbdev makes of it

def run(code, *args):
    "What `code` prints last, as JSON; in a process of its own, in the repository, which it leaves as it is"
    env = os.environ|dict(PYTHONPATH=os.pathsep.join([str(root), str(root/'tests')]), IN_TEST='1')
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

@nbdev_needed
def test_notebooks_can_be_prepared():
    "Cells that import are executed for `show_doc`, so imports stand in cells of their own"
    before = sorted(p.name for p in (root/'nbs').iterdir())
    bad = run(PREPARE, *nbs)
    assert not bad, '\n\n'.join(f'{k}: {v}' for k,v in bad.items())
    assert sorted(p.name for p in (root/'nbs').iterdir())==before

SHOW = '''
import json
from nbdev.showdoc import show_doc
from public import public
bad = {}
for mod,name,o in public():
    try: assert name in str(show_doc(o)._repr_markdown_())
    except Exception as e: bad[f'{mod.__name__}.{name}'] = repr(e)[:200]
print(json.dumps(bad))
'''

@nbdev_needed
def test_every_public_name_can_be_shown():
    bad = run(SHOW)
    assert not bad, '\n'.join(f'{k}: {v}' for k,v in bad.items())
