"The commands as a shell sees them: what they print, where, and how they exit"
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image

root = Path(__file__).resolve().parents[1]

def code(cmd): return f'import sys; from advmix.cli import {cmd}; sys.argv[0]="advmix_{cmd}"; {cmd}()'
env = os.environ|dict(PYTHONPATH=str(root), MPLBACKEND='agg')

def sh(cmd, *args, cwd, **kw):
    return subprocess.run([sys.executable, '-c', code(cmd), *map(str, args)], cwd=cwd, capture_output=True, text=True, env=env, **kw)

small = ['--epochs', 1, '--steps', 1, '--n-eval', 16, '--suite', 'clean,fgsm,pgd20', '--bs', 256]

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with one finished run"
    p = tmp_path_factory.mktemp('home')
    r = sh('train', *small, cwd=p)
    assert r.returncode==0, r.stderr
    assert 'pgd20' in r.stdout and 'runs/digits-aom-0/report.json' in r.stdout
    return p

@pytest.mark.parametrize('cmd', ['train','compare'])
def test_help_explains_every_argument(cmd, tmp_path):
    r = sh(cmd, '--help', cwd=tmp_path)
    assert r.returncode==0 and 'usage' in r.stdout
    if cmd=='train':
        for a in 'method data arch epochs bs lr eps steps seed ema out device amp resume force'.split(): assert f'--{a}' in r.stdout
        assert 'in pixel units' in ' '.join(r.stdout.split())   # argparse wraps at the width of the terminal

def test_help_comes_at_once():
    "Nothing heavy is imported before it is needed"
    r = subprocess.run([sys.executable, '-c',
        f'import sys\ntry: {code("train")[12:]}\nfinally: assert not {{"torch","fastai","pandas","matplotlib"}}&sys.modules.keys()',
            '--help'],
                       capture_output=True, text=True, env=env)
    assert r.returncode==0 and not r.stderr, r.stderr

def test_nothing_is_said_above_our_output(home):
    r = sh('train', *small, cwd=home)
    assert r.returncode==0 and r.stderr=='' and r.stdout.startswith('aom on digits')   # a finished run is opened

def test_a_different_run_is_not_overwritten(home):
    r = sh('train', *small, '--lr', .001, cwd=home)
    assert r.returncode==2 and 'different run' in r.stderr and '--force' in r.stderr and '--lr 0.01 there' in r.stderr

@pytest.mark.parametrize('args,says', [(['--method','best'], 'choose one of vanilla'), (['--eps','2','--arch','lenet','--data','mnist'],
    'resnet18'),
                                       (['--epochs','half'], 'invalid int value')])
def test_mistakes_get_one_sentence(args, says, tmp_path):
    r = sh('train', *args, cwd=tmp_path)
    assert r.returncode==2 and says in r.stderr and 'Traceback' not in r.stderr and len(r.stderr.strip().splitlines())==1
    assert not (tmp_path/'runs').exists()

def folder(p, classes, n=12, value=None):
    for c in classes:
        (p/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(np.random.RandomState(i).randint(0, 255, (16,16,3), dtype='uint8')).save(p/c/f'{i}.png')
    return p

@pytest.mark.parametrize('classes,says', [([], 'no images'), (['cat'], 'class')])
def test_unusable_folders_get_one_sentence(classes, says, tmp_path):
    (tmp_path/'d').mkdir()
    folder(tmp_path/'d', classes)
    r = sh('train', '--data', tmp_path/'d', cwd=tmp_path)
    assert r.returncode==2 and says in r.stderr and 'Traceback' not in r.stderr

def test_a_folder_of_images_trains_and_is_judged(tmp_path):
    folder(tmp_path/'d', ['cat','dog','emu','fox'], 20)
    r = sh('train', '--data', 'd', '--arch', 'convnet', '--size', 16, *small[:-2], '--bs', 16, '--method', 'mixup', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert json.loads((tmp_path/'runs/d-mixup-0/report.json').read_text())['config']['data']=='d'

def test_compare_prints_a_table(tmp_path):
    r = sh('compare', '--methods', 'vanilla,pgd', '--seeds', 2, *small, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert '±' in r.stdout and (tmp_path/'runs/compare/compare.png').exists()
    assert sh('compare', '--methods', 'vanilla,best', cwd=tmp_path).returncode==2

def test_list_and_collect(tmp_path):
    r = sh('compare', '--methods', 'vanilla,pgd:steps=2', '--list', *small, cwd=tmp_path)
    lines = r.stdout.splitlines()
    assert r.returncode==0 and len(lines)==2 and lines[1].startswith('advmix_train --method pgd') and not any(tmp_path.iterdir())
    for l in lines: assert sh('train', *l.split()[1:], cwd=tmp_path).returncode==0
    r = sh('compare', '--collect', 'runs/compare', cwd=tmp_path)
    assert r.returncode==0 and 'vanilla' in r.stdout and 'pgd:steps=2' in r.stdout and (tmp_path/'runs/compare/compare.json').exists()

def test_a_diverged_run_is_no_result(tmp_path):
    r = sh('train', '--method', 'vanilla', '--lr', 1e4, *small, cwd=tmp_path)
    assert r.returncode==2 and 'diverged' in r.stderr and '--lr' in r.stderr and not (tmp_path/'runs').exists()

def test_ctrl_c_says_how_to_resume(tmp_path):
    "The run itself says when: it interrupts itself at a batch of the second epoch, as the terminal would"
    stop = """
import os, signal
from fastai.callback.core import Callback
from advmix import methods
class Stop(Callback):
    run_valid = False
    def after_batch(self):
        if (self.epoch,self.iter)==(1,1): os.kill(os.getpid(), signal.SIGINT)
methods.METHODS['vanilla'] = lambda c: [Stop()]
signal.signal(signal.SIGINT, signal.default_int_handler)   # whoever runs this in the background has it ignored
"""
    args = ['--method', 'vanilla', '--epochs', '3', '--n_eval', '16', '--suite', 'clean']
    run  = lambda before, *more: subprocess.run([sys.executable, '-c', before+code('train'), *args, *more], cwd=tmp_path,
        capture_output=True, text=True, env=env)
    r = run(stop)
    assert r.returncode==130 and 'Traceback' not in r.stderr
    assert r.stderr.strip().endswith('interrupted: go on from the last epoch with --resume')
    assert (tmp_path/'runs/digits-vanilla-0/history.csv').read_text().count('\n')==2
    assert run('').returncode==2 and run('', '--resume').returncode==0

def test_a_path_by_its_place_and_several_files(capsys):
    "Whatever the order; an option that wants one value gets no list"
    from advmix.cli import _parse
    def f(
        path:str=None,   # A file
        merge:list=None, # Files
        eps:float=.1,    # A number
    ): "Nothing"
    for argv,want in [(['a'], ('a',None,.1)), (['--eps','.2','a'], ('a',None,.2)), (['a','--eps=.2'], ('a',None,.2)), ([], (None,None,.1)),
                      (['--merge','a','b'], (None,['a','b'],.1)), (['--merge','a','b','--eps','.2'], (None,['a','b'],.2))]:
        assert tuple(_parse(f, argv).values())==want
    for argv in (['a','b'], ['--merge'], ['--eps'], ['--path','a']):
        with pytest.raises(SystemExit) as e: _parse(f, argv)
        assert e.value.code==2
    assert capsys.readouterr().err.count('--help lists what there is')==4

def test_every_command_refuses_devices_that_are_not_there():
    from advmix.cli import command
    @command
    def f(device:str=None): return 'ran'
    assert f(device='cpu')=='ran'
    with pytest.raises(ValueError, match="device='gpu' is not available"): f(device='gpu')
    with pytest.raises(ValueError, match="'cuda:99'"): f(device='cpu,cuda:99')
