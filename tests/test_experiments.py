"The long runs: their driver works from training to one file, and what a page says is what its file holds"
import ast, importlib, json, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from advmix.callbacks import MixCallback
from advmix.experiment import compare_runs
from advmix.intervals import bootstrap

EXPERIMENTS = Path(__file__).resolve().parent.parent/'nbs'/'experiments'

@pytest.fixture(scope='module')
def run(tmp_path_factory, tiles):
    "The driver on 48 pieces of photographs in ten classes that mean nothing; what it prints"
    folder = tmp_path_factory.mktemp('driver')
    x,y = (tiles*255).byte().numpy(),np.arange(48)%10
    np.savez(folder/'d.npz', x_train=np.concatenate([x,x]), y_train=np.concatenate([y,y]), x_test=x[:12], y_test=y[:12])
    def call(do, *more, ok=True):
        cmd = [sys.executable, '-W', 'ignore', EXPERIMENTS/'adversarial.py', do, 'd.npz', 'out', *more]
        r = subprocess.run(list(map(str, cmd)), cwd=folder, capture_output=True, text=True)
        assert (r.returncode==0)==ok, r.stderr
        return r.stdout
    return folder,call

def test_the_driver_from_training_to_one_file(run):
    folder,call = run
    settings = '--epochs 1 --steps 1 --bs 32 --n_attack 6 --nets average_last --seeds 1'.split()
    said = call('train,judge,segment,sanity', '--arms', 'pgd', '--amp', 'bf16', *settings)
    assert said.count("'epoch': 0")==1
    call('judge', '--arms', 'pgd', '--split', 'valid', *settings)
    said = call('train,collect', 'all.json', '--arms', 'pgd,aom_stop', *settings)
    assert 'aom_stop-1' in said and 'pgd-1' not in said   # what is there is not made again
    found = json.loads((folder/'all.json').read_text())
    assert {t['arm'] for t in found['trained']}=={'pgd','aom_stop'} and [t['amp'] for t in found['trained']]==['no','bf16']
    assert [len(r['stands']) for r in found['judged']]==[12,6,6]
    assert [len(r['stands']) for r in found['valid']]==[10,6,6]   # held-out training images, by which one chooses
    assert all(r['seed']==1 and r['accuracy']==r['stands'].count('1')/len(r['stands']) for r in found['judged'])
    seg = found['segments'][0]
    assert len(seg['clean'])==11 and np.isclose(np.mean(seg['clean']), np.mean(seg['clean_pairs']), atol=2e-3)
    assert np.mean(seg['attacked'])>=np.mean(seg['clean'])
    assert len(found['sanity'][0]['rows'])>10

def import_driver(name='adversarial'):
    sys.path.insert(0, str(EXPERIMENTS))
    try: return importlib.import_module(name)
    finally: sys.path.pop(0)

def test_every_arm_is_a_mix():
    driver = import_driver()
    arms,more = driver.arms(5),driver.recipes(5)
    assert not arms.keys()&more.keys()
    for name,make in (arms|more).items(): assert isinstance(make(), MixCallback), name

def said_by(cell, seen):
    "The Markdown that a cell of the front page ends with"
    *body,last = ast.parse(cell).body
    exec(compile(ast.Module(body, []), 'index', 'exec'), seen)
    return eval(compile(ast.Expression(last.value), 'index', 'eval'), seen).data

def test_the_tables_of_the_front_page_are_what_was_measured(monkeypatch):
    "Made again from the files of the long runs, they are in README word for word"
    pytest.importorskip('IPython', reason='the front page is a notebook')
    monkeypatch.chdir(EXPERIMENTS.parent)
    cells = [''.join(c['source']) for c in json.loads(Path('index.ipynb').read_text())['cells'] if c['cell_type']=='code']
    seen,page = {},(EXPERIMENTS.parents[1]/'README.md').read_text()
    exec(next(c for c in cells if 'def markdown' in c), seen)
    tables = [said_by(c, seen) for c in cells if 'experiments/results' in c]
    assert len(tables)==2 and all(t in page and len(t.splitlines())>8 for t in tables)

def test_smoothing_has_the_entropy_of_mixed_labels():
    "Half a nat, the mean entropy of a uniform ratio, for nine pairs in ten"
    s = import_driver().matched_smoothing()
    p = np.array([1-s+s/10]+[s/10]*9)
    lam = np.linspace(1e-6, 1-1e-6, 100001)
    assert 0<s<.9 and np.isclose(-(p*np.log(p)).sum(), .9*np.mean(-lam*np.log(lam)-(1-lam)*np.log(1-lam)), atol=1e-4)

@pytest.mark.parametrize('file,a,b', [('floor','pgd_fast','pgd'), ('floor','aom_fast','aom_fixed'),
    ('cifar_aom','aom','aom_fixed'), ('cifar_aom','aom','aom_random'),
    ('aom_recipe','pgd','aom'), ('robust_overfitting','pgd average_last','pgd average_best'),
    ('robust_overfitting','cutmix_pgd average_last','pgd average_last'),
    ('robust_overfitting','augmented average_last','pgd average_last'),
    ('cifar_learned','automix:stage=-1','vanilla'), ('cifar_learned','adautomix:stage=-1','vanilla'),
    ('cifar_learned','adautomix:stage=-1','cutmix:epochs=160'), ('cifar_learned','vanilla:epochs=160','vanilla')])
def test_the_differences_of_the_front_page_are_what_was_measured(file, a, b):
    "Mean over seeds and its interval over images, those of `cifar_aom` with the held-out ones"
    read  = lambda name: json.loads((EXPERIMENTS/'results'/f'{name}.json').read_text())
    found = read(file)
    if file=='robust_overfitting': found['judged'] += [r|dict(arm='augmented') for r in read('robust_augmented')['judged']]
    if file=='cifar_learned': rows = [(r['spec'], r['seed'], r['average']['stands']) for r in found]
    else:
        more = found['valid'] if file=='cifar_aom' else []
        name = lambda r: f'{r["arm"]} {r["net"]}' if ' ' in a else r['arm']
        rows = [(name(r), r['seed'], r['stands']) for r in found['judged']+more if 'only' in r['name']]
    kept = {}
    for arm,seed,stands in rows: kept.setdefault(arm, {}).setdefault(seed, []).extend(c=='1' for c in stands)
    p,q = ([np.array(kept[arm][s], float) for s in sorted(kept[a].keys()&kept[b].keys())] for arm in (a,b))
    mean,low,high = 100*np.array(bootstrap(np.mean([v-w for v,w in zip(p, q, strict=True)], 0), ends=None))
    text = lambda v: f'{v:.1f}'.replace('0.', '.').replace('-', '−')
    page = (EXPERIMENTS.parents[1]/'README.md').read_text()
    ends = '|'.join(re.escape(f'{text(v)} to {text(w)}') for v,w in ((low,high), (-high,-low)))   # or as a loss, turned round
    told = [m[1] for m in re.finditer(rf'([^(]*)\((?:{ends})[),]', page)]
    assert any(f' {text(abs(mean))} ' in t[-80:] for t in told), told

NUMBER = r'(?<![\w.])[−-]?\d*\.?\d+'
def value(v): return abs(float(v.replace('−', '-')))

def shown(nb):
    "The numbers, without signs, of every line that a notebook prints and of every row of its tables"
    for o in (o for c in nb['cells'] for o in c.get('outputs', [])):
        text = o.get('data', o)
        text = ''.join(next(text[k] for k in ('text/html','text/plain','text') if k in text))
        for row in re.findall('<tr.*?</tr>', text, re.S) or text.splitlines():
            yield {value(v) for v in re.findall(NUMBER, re.sub('<[^>]*>', ' ', row).replace(',', ''))}

ELSEWHERE = dict(cifar_aom={48.7,84.2}, cifar_learned={.85}, digits_learned={.95})   # published, or of a flat mask

@pytest.mark.parametrize('page', sorted(EXPERIMENTS.glob('*.ipynb')), ids=lambda p: p.stem)
def test_a_conclusion_says_what_its_page_shows(page):
    "Every number with a decimal stands in an output, and both ends of an interval in the same row"
    nb   = json.loads(page.read_text())
    rows = list(shown(nb))
    text = [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='markdown'][-1]
    text = re.sub(r'`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|^    .*$', '', text, flags=re.M)
    told = {value(v) for v in re.findall(NUMBER, text) if '.' in v}-ELSEWHERE.get(page.stem, set())
    assert told<=set().union(*rows), told-set().union(*rows)
    for ends in re.findall(rf'({NUMBER}) to ({NUMBER})', text):
        assert any({value(v) for v in ends}<=r for r in rows), ends

def test_what_a_sweep_left_is_measured_further_and_kept(tmp_path):
    "One run: student and average, the quarter radius and the occlusion curve; what was measured is not measured again"
    learned = import_driver('learned')
    c = dict(epochs=1, bs=256, ema=True, suite='clean,fgsm,corruption,calibration', arch='convnet_s')
    compare_runs(['mixup:alpha=.5'], out=tmp_path, progress=False, **c)
    folder, = (f for f in tmp_path.iterdir() if f.is_dir())
    got = learned.of_run(folder, 16)
    assert (got['spec'],got['seed'],got['settings']['alpha'])==('mixup:alpha=.5',0,.5)
    for net in ('student','average'):
        r = got[net]
        assert r['clean']==np.mean([b=='1' for b in r['stands']]) and 0<=r['fgsm']<=1 and r['ece']>=0
        assert np.isclose(np.mean([int(v) for v in r['corrupted'].split()])/r['of'], r['corruption'])
    assert got['student']['stands']!=got['average']['stands']
    assert 1>=got['further']['fgsm']>=got['further']['pgd20']-2/16 and len(got['further']['occlusion'])==5
    (folder/'further.json').write_text('{"kept": 1}')
    assert learned.of_run(folder, 16)['further']=={'kept': 1}
