"The long runs: their driver works from training to one file, and what a page says is what its file holds"
import json, subprocess, sys
from pathlib import Path
import numpy as np, pytest

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
    said = call('train,collect', 'all.json', '--arms', 'pgd,aom_stop', *settings)
    assert 'aom_stop-1' in said and 'pgd-1' not in said   # what is there is not made again
    found = json.loads((folder/'all.json').read_text())
    assert {t['arm'] for t in found['trained']}=={'pgd','aom_stop'} and [t['amp'] for t in found['trained']]==['no','bf16']
    assert [len(r['stands']) for r in found['judged']]==[12,6,6]
    assert all(r['seed']==1 and r['accuracy']==r['stands'].count('1')/len(r['stands']) for r in found['judged'])
    seg = found['segments'][0]
    assert len(seg['clean'])==11 and np.isclose(np.mean(seg['clean']), np.mean(seg['clean_pairs']), atol=2e-3)
    assert np.mean(seg['attacked'])>=np.mean(seg['clean'])
    assert len(found['sanity'][0]['rows'])>10

def test_every_arm_has_its_callbacks():
    sys.path.insert(0, str(EXPERIMENTS))
    try: import adversarial
    finally: sys.path.pop(0)
    arms,more = adversarial.arms(5),adversarial.recipes(5)
    assert not arms.keys()&more.keys()
    for name,make in (arms|more).items(): assert type(make()).__name__.endswith('Callback'), name

ROWS = dict(pgd='PGD, ten steps', pgd_fast='PGD, one step', aom_fixed='AOM, ten steps', aom_fast='AOM, one step')

@pytest.mark.parametrize('arm', ROWS)
def test_the_table_of_the_front_page_is_what_was_measured(arm):
    rows = [r for r in json.loads((EXPERIMENTS/'results'/'floor.json').read_text())['judged'] if r['arm']==arm]
    said = [l for l in (EXPERIMENTS.parents[1]/'README.md').read_text().splitlines() if l.startswith(f'| {ROWS[arm]} ')]
    cells = []
    for name in ('clean', 'autoattack (apgd-ce, apgd-t only)'):
        v = [100*r['accuracy'] for r in rows if r['name']==name]
        assert len(v)==3
        cells.append(f'{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}')
    assert len(said)==1 and [c.strip() for c in said[0].split('|')][3:5]==cells
