"The command that times steps: what it prints, what it writes, what it refuses"
import json, os, subprocess, sys
from pathlib import Path
import pytest
from advmix.bench import bench

small = dict(methods='pgd,aom', arch='convnet', size=8, bs=4, steps=1, rounds=1)

def test_it_prints_and_writes(tmp_path, capsys):
    bench(**small, peers=True, out=str(tmp_path/'b.json'))
    text = capsys.readouterr().out
    for s in ('arch convnet','threads','load','vanilla','over_floor','an AOM step costs','torchvision'): assert s in text, s
    d = json.loads((tmp_path/'b.json').read_text())
    assert [r['method'] for r in d['steps']]==['vanilla','pgd','aom'] and d['settings']['bs']==4 and d['peers'][0]['what']=='PGD'
    assert (tmp_path/'b.png').stat().st_size>1000

@pytest.mark.parametrize('bad,says', [(dict(rounds=0),'rounds=0'), (dict(bs=0),'bs=0'), (dict(amp='half'),'choose no, fp16 or bf16'),
    (dict(out='nowhere/b.json'),'no such folder'), (dict(methods='best'),'choose one of')])
def test_it_refuses(bad, says):
    with pytest.raises(ValueError, match=says): bench(**small|bad)

def test_help_is_light():
    "Answering --help needs neither torch nor fastai"
    code = """
import sys
from advmix.bench import bench
sys.argv = ['advmix_bench','--help']
try: bench()
except SystemExit: print('torch' in sys.modules)
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout.splitlines()[-1]=='False' and '--channels' in r.stdout, r.stdout+r.stderr

def test_the_script_for_gpus_runs_anywhere(tmp_path):
    root,out = Path(__file__).resolve().parents[1],tmp_path/'g.json'
    small = '--data random --arch convnet_s --bs 16 --n 32 --steps 1 --epochs 1 --methods pgd --rounds 1 --peak 64'
    small = [*small.split(), '--device', 'cpu', '--out']
    r = subprocess.run([sys.executable, root/'nbs/experiments/gpu_bench.py', *small, out], capture_output=True, text=True, cwd=tmp_path,
                       env=os.environ|dict(PYTHONPATH=str(root)))
    assert r.returncode==0, r.stderr
    d = json.loads(out.read_text())
    assert {(o['method'],o.get('amp'),o.get('channels_last')) for o in d['epochs']}>={('pgd',None,None),('adautomix','bf16',True)}
    assert all(o['seconds']>0 and o['share_of_peak']>0 for o in d['epochs']) and d['steps'][0]['method']=='vanilla'
