"The sheet of a mix: what is written, and what is said where it can't be"
import subprocess, sys
import matplotlib.pyplot as plt, numpy as np, pytest
from PIL import Image
from advmix.show import show
from advmix.zoo import MIXES

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

@pytest.fixture
def pictures(tmp_path):
    "Twenty small pictures of different shapes in one folder"
    folder,rng = tmp_path/'mine',np.random.RandomState(0)
    folder.mkdir()
    for i in range(20): Image.fromarray(rng.randint(0, 255, (20+i,40,3), dtype=np.uint8)).save(folder/f'im{i:02}.png')
    return folder

def sheet(*args, n, **kw):
    "The axes of a sheet; the command itself returns nothing, since that would be an exit code"
    assert show(*args, n=n, **kw) is None
    return np.array(plt.gcf().axes).reshape(-1, n)

def rows(axs): return [ax.get_ylabel().replace('\n', ' ') for ax in axs[:,0]]

@pytest.mark.parametrize('method', [m for m in MIXES if m!='manifold'])
def test_every_mix_has_a_sheet(pictures, tmp_path, method, capsys):
    out = tmp_path/'sheet.png'
    axs = sheet(str(pictures), method, n=3, size=32, out=str(out))
    attacks = method in ('pgd','iat','aom')
    assert out.read_bytes()[1:4]==b'PNG' and axs.shape[1]==3
    assert rows(axs)[0]=='image' and rows(axs)[-1]=='mixture' and any('perturbation' in r for r in rows(axs))==attacks
    assert ('nobody has trained' in capsys.readouterr().out)==(attacks or method in ('attentivemix','snapmix','puzzlemix'))

def test_pictures_without_classes_are_called_by_their_files(pictures, tmp_path):
    axs = sheet(str(pictures), n=16, size=32, out=str(tmp_path/'a.png'))
    assert axs.shape[1]==16 and axs[0,0].get_title()=='im00' and axs[0,15].get_title()=='im18'   # evenly spaced

def test_folders_are_classes(pictures, tmp_path):
    for i in range(2):
        (tmp_path/'all'/f'c{i}').mkdir(parents=True)
        for p in sorted(pictures.iterdir())[i*3:i*3+3]: (tmp_path/'all'/f'c{i}'/p.name).write_bytes(p.read_bytes())
    axs = sheet(str(tmp_path/'all'), 'mixup', n=6, size=32, out=str(tmp_path/'a.png'))
    assert [ax.get_title() for ax in axs[0]]==['c0']*3+['c1']*3

def test_one_seed_one_sheet(pictures, tmp_path):
    def pixels(seed):
        axs = sheet(str(pictures), 'fmix', n=3, size=32, seed=seed, out=str(tmp_path/'a.png'), force=True)
        return axs[-1,0].images[0].get_array()
    assert (pixels(1)==pixels(1)).all() and (pixels(1)!=pixels(2)).any()

@pytest.mark.parametrize('method', ['mixup','cutmix'])
def test_a_sheet_shows_two_pictures_in_most_columns(pictures, tmp_path, method):
    for seed in range(2):
        axs = sheet(str(pictures), method, n=6, size=32, seed=seed, out=str(tmp_path/'a.png'), force=True)
        assert sum('\n' in ax.get_xlabel() for ax in axs[-1])>=3

def test_digits_need_no_folder(tmp_path): assert sheet(n=2, out=str(tmp_path/'a.svg')).shape[1]==2

wrong = [(['--method','nothing'], 'choose one of mixup'), (['--method','manifold'], 'inside the network'),
         (['--method','automix'], 'learned while training'), (['--n','0'], '1..2048'), (['--size','-3'], '1..2048'),
         (['--eps','8','--method','aom'], '(0,1]'), (['--out','a.gif'], 'must end in .png'), (['--out','no/a.png'], 'no such folder'),
         (['--data','nowhere'], 'unknown: use digits'), (['--colour'], '--help lists'), (['--data','empty'], 'two are needed'),
         (['--data','broken'], 'cannot be read as an image')]

def test_mistakes_end_in_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path/'empty').mkdir()
    (tmp_path/'broken').mkdir()
    for i in range(2): (tmp_path/'broken'/f'{i}.png').write_bytes(b'nothing')
    monkeypatch.chdir(tmp_path)
    for args,says in wrong:
        monkeypatch.setattr(sys, 'argv', ['advmix_show', *args])
        with pytest.raises(SystemExit) as e: show()
        err = capsys.readouterr().err
        assert e.value.code==2 and says in err and err.count('\n')==1, (args, err)
    assert not list(tmp_path.glob('*.png'))

def test_a_file_that_is_there_stays(pictures, tmp_path):
    (tmp_path/'a.png').write_bytes(b'mine')
    with pytest.raises(ValueError, match='is there already'): show(str(pictures), out=str(tmp_path/'a.png'))
    assert (tmp_path/'a.png').read_bytes()==b'mine'

def test_help_comes_without_torch(tmp_path):
    code = '''
import sys
sys.argv = ["advmix_show", "--help"]
from advmix.show import show
try: show()
finally: assert "torch" not in sys.modules
'''
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode==0 and 'What to show' in r.stdout, r.stderr
