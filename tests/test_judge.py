"The judge as a shell sees it: any network, classes by name, resumed, divided, joined; and what it says about itself"
import json, os, pickle, sys
import numpy as np, pytest, torch
from pathlib import Path
from PIL import Image
from torch import nn
from advmix import judge, report as R
from advmix.config import Config
from advmix.data import digits_dls, split_tensors
from advmix.evaluate import clean
from advmix.experiment import run
from advmix.files import folder_dls
from advmix.folder import save_model
from advmix.models import get_model
from advmix.report import Report
from advmix.weights import cifar_sheet, from_pretrained

@pytest.fixture
def sh(monkeypatch, capsys, tmp_path):
    "Exit code, stdout and stderr of `advmix_eval` with these arguments, in a folder of the test's own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    def call(*args):
        capsys.readouterr()
        monkeypatch.setattr('sys.argv', ['advmix_eval', *map(str, args)])
        try: code = judge.evaluate() or 0
        except SystemExit as e: code = e.code
        o = capsys.readouterr()
        return code,o.out,o.err
    yield call
    for name in ('colours','broken','needy'): sys.modules.pop(name, None)

def rows(path): return {r['name']: r for r in json.loads(Path(path).read_text())['rows']}

# Images of one colour each, and a network that knows colours, in any order: right or wrong by construction

NAMES = [f'n{i:02}' for i in range(37)]
COLOURS = dict(zip(NAMES, [(a,b,c) for a in (20,90,160,230) for b in (20,90,160,230) for c in (40,120,200)]))

def images(path, names, n=4, colours=COLOURS, spread=0):
    "Images of one colour each with a little noise, `spread` more red in each of four"
    for name in names:
        (path/name).mkdir(parents=True)
        for i in range(n):
            noise = np.random.RandomState(i).randint(-9, 10, (8,8,3))
            colour = np.array(colours[name])+[spread*(i%4),0,0]
            Image.fromarray((colour+noise).astype('uint8')).save(path/name/f'{i}.png')
    return path

MODULE = f'''
import torch
from torch import nn
COLOURS = {COLOURS}
class Net(nn.Module):
    stop,calls = None,0
    def __init__(self, names, mean=0., std=1.):
        super().__init__()
        self.c,self.mean,self.std = nn.Parameter(torch.tensor([COLOURS[n] for n in names])/255),mean,std
    def forward(self, x):
        Net.calls += 1
        if Net.calls==Net.stop: raise KeyboardInterrupt
        m = (x*self.std+self.mean).mean((2,3))
        return 40*(m@self.c.T-(self.c**2).sum(1)/2)
def all():    return Net(list(COLOURS)[:37])
def five():   return Net(['n07','n30','n02','n19','n11'])
def five_(): return Net(['n07','n30','n02','n19','n11'], .5, .25)
def two():    return Net(['n02','n30'])
ready = two()
'''
FIVE = ['n07','n30','n02','n19','n11']

@pytest.fixture
def colours(tmp_path):
    (tmp_path/'colours.py').write_text(MODULE)
    return tmp_path

def test_two_classes(sh, colours):
    images(colours/'d', ['n02','n30'], 8)
    code,out,err = sh('--model', 'colours:two', '--data', 'd', '--suite', 'clean,autoattack', '--eps', .2, '--out', 'r.json')
    assert code==0, err
    r = rows('r.json')
    assert r['clean']['accuracy']==1 and 'autoattack (apgd-ce, fab-t, square only)' in r
    assert '2 classes: apgd-t left out' in out and not Path('r.json.autoattack').exists()

def test_thirty_seven_classes(sh, colours):
    images(colours/'d', NAMES, 2)
    code,out,err = sh('--model', 'colours:all', '--data', 'd/', '--suite', 'clean,fgsm', '--out', 'r.json')
    assert code==0 and rows('r.json')['clean']['accuracy']==1, err
    assert 'classes  37 (n00, n01, n02, n03, n04, n05, ...), numbered as in the data' in out

@pytest.mark.parametrize('how', ['vocab','file','safetensors'])
def test_classes_are_matched_by_name(how, sh, colours):
    "The folder lacks two of the network's five classes, and numbers the others in another order"
    images(colours/'d', ['n02','n19','n30'])
    (colours/'names.txt').write_text('\n'.join(FIVE)+'\n')
    args = ['--model', 'colours:five', '--vocab', ','.join(FIVE) if how=='vocab' else 'names.txt']
    if how=='safetensors':
        net = get_model('convnet', 5, 3, 8)
        save_model(net, colours/'w.safetensors', vocab=FIVE, arch='convnet', n_classes=5, c_in=3, size=8)
        args = ['w.safetensors']
    code,out,err = sh(*args, '--data', 'd', '--suite', 'clean,fgsm', '--out', 'r.json')
    assert code==0 and '3 of them in the images' in out and 'numbered' not in out, err
    want = 1.
    if how=='safetensors':
        x,y = split_tensors(folder_dls('d', vocab=FIVE))
        want = (net.eval()(x).argmax(1)==y).double().mean().item()
    r = rows('r.json')
    assert r['clean']['accuracy']==want
    assert set(r['clean']['classes'])<={'n02','n19','n30'} and json.loads(Path('r.json').read_text())['config']['vocab']==FIVE

@pytest.mark.parametrize('there', [['n02','n30','new'], ['n02','n30','n19','n07','n11','n12'], ['n02','n30']])
def test_renamed_additional_and_uncounted_classes_are_refused(there, sh, colours):
    images(colours/'d', there, colours=COLOURS|dict(new=(20,20,120)))
    code,_,err = sh('--model', 'colours:five', '--data', 'd', '--suite', 'clean')
    assert code==2 and f'5 outputs and the data have {len(there)} classes' in err and '--vocab' in err
    code,out,err = sh('--model', 'colours:five', '--vocab', ','.join(FIVE), '--data', 'd', '--suite', 'clean')
    if len(there)==2: assert code==0 and '100.0%' in out
    else: assert code==2 and repr([set(there)-set(FIVE)][0].pop()) in err

def test_a_learners_pickle_knows_its_classes_and_its_normalisation(sh, tmp_path):
    from fastai.vision.all import CrossEntropyLossFlat, Learner, Normalize
    images(tmp_path/'train', FIVE, 12)
    images(tmp_path/'fewer', ['n02','n19'], 8)
    images(tmp_path/'other', ['n02','n03'], 8)
    dls = folder_dls(tmp_path/'train', bs=16, augment=False)
    dls.add_tfms([Normalize.from_stats([.4]*3, [.3]*3, cuda=False)], 'after_batch')
    torch.manual_seed(0)
    learn = Learner(dls, get_model('convnet', 5, 3, 8).net, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 1e-2)
    learn.export('m.pkl')
    x,y = split_tensors(folder_dls('fewer', vocab=list(dls.vocab)))
    want = (learn.model.eval()((x-.4)/.3).argmax(1)==y).double().mean().item()
    code,_,err = sh('m.pkl', '--data', 'fewer', '--suite', 'clean', '--out', 'r.json', '--trust-pickle')
    assert code==0 and rows('r.json')['clean']['accuracy']==want, err
    assert want==1
    code,_,err = sh('m.pkl', '--data', 'other', '--suite', 'clean', '--trust-pickle')
    assert code==2 and "classes ['n03']" in err
    code,_,err = sh('m.pkl', '--data', 'fewer', '--mean', .4, '--std', .3, '--trust-pickle')
    assert code==2 and 'has its own normalisation: leave --mean and --std out' in err

def test_a_pickle_needs_trust(sh, tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'pwned'),)
    (tmp_path/'m.pkl').write_bytes(pickle.dumps(Evil()))
    code,_,err = sh('m.pkl', '--data', 'digits')
    assert code==2 and '--trust-pickle' in err and 'code' in err and not (tmp_path/'pwned').exists()
    (tmp_path/'m.pth').write_bytes(pickle.dumps(Evil()))
    code,_,err = sh('m.pth', '--data', 'digits', '--arch', 'convnet')
    assert code==2 and 'cannot be read as weights' in err and not (tmp_path/'pwned').exists()

def test_a_file_of_learn_save(sh, tmp_path):
    "After `fit_one_cycle`, with `Normalize` in the loaders: the numbers must be given, and without them it is said"
    from fastai.vision.all import CrossEntropyLossFlat, Learner, Normalize, accuracy
    dls = digits_dls()
    dls.add_tfms([Normalize.from_stats([-2.], [.2], cuda=False)], 'after_batch')
    torch.manual_seed(0)
    learn = Learner(dls, get_model('convnet', 10, 1, 8).net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    w = learn.save('w')
    want = learn.validate(ds_idx=2)[1]
    args = [w, '--arch', 'convnet', '--data', 'digits', '--suite', 'clean,fgsm', '--eps', .1]
    code,_,err = sh(*args, '--mean=-2', '--std=.2', '--out', 'r.json')
    assert code==0 and rows('r.json')['clean']['accuracy']==pytest.approx(want, abs=1e-6), err
    assert want>.6 and rows('r.json')['clean']['flags']==[]
    code,out,err = sh(*args)
    assert code==0 and '! if the network was trained on normalised images, give their mean and std' in out, (out, err)

@pytest.mark.parametrize('arch', ['mobilenet_v3_small','timm:resnet10t'])
def test_weights_of_torchvision_and_timm(arch, sh, tmp_path):
    import torchvision
    images(tmp_path/'d', FIVE, 6)
    torch.manual_seed(0)
    if arch[:5]=='timm:': net = pytest.importorskip('timm').create_model(arch[5:], num_classes=5)
    else: net = torchvision.models.get_model(arch, num_classes=5)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    x,y = split_tensors(folder_dls('d', size=32))
    want = (net.eval()((x-.45)/.22).argmax(1)==y).double().mean().item()
    code,out,err = sh('w.pth', '--arch', arch, '--data', 'd', '--size', 32, '--mean', '.45', '--std', '.22,.22,.22',
                      '--suite', 'clean,fgsm', '--out', 'r.json')
    assert code==0 and rows('r.json')['clean']['accuracy']==want, err
    assert f'network  w.pth as {arch}, ' in out
    code,_,err = sh('w.pth', '--arch', 'resnet18', '--data', 'd', '--suite', 'clean')
    assert code==2 and 'do not fit resnet18' in err
    code,_,err = sh('w.pth', '--data', 'd', '--suite', 'clean')
    assert code==2 and 'does not say what network it is for: give --arch' in err

def test_normalisation_outside_is_normalisation_inside(sh, colours):
    images(colours/'d', FIVE)
    args = ['--data', 'd', '--vocab', ','.join(FIVE), '--suite', 'clean,pgd20', '--eps', .1]
    for k,more in dict(five=[], five_=['--mean', '.5', '--std', '.25,.25,.25']).items():
        code,_,err = sh('--model', f'colours:{k}', *args, *more, '--out', f'{k}.json')
        assert code==0, err
    a,b = rows('five.json'),rows('five_.json')
    assert a['clean']['accuracy']==1 and [a[k]['stands'] for k in a]==[b[k]['stands'] for k in b]
    code,out,_ = sh('--model', 'colours:five_', *args)   # pixels where it wants normalised ones
    assert code==0 and '! if the network was trained on normalised images' in out
    code,out,_ = sh('--model', 'colours:five_', '--mean=.1', '--std=1', *args)
    assert code==0 and '! if' not in out   # whoever gives numbers has been told

@pytest.mark.parametrize('args,says', [
    (['nowhere:f'], 'there is no module nowhere'), (['colours:six'], 'the module colours has no six'),
    (['colours'], 'package.module:function'),
    (['colours:COLOURS'], 'a dict is no function'), (['colours:Net'], 'it needs names'), (['needy:f'], 'needs the module surely_not_there'),
    (['broken:f'], 'SyntaxError'), (['nowhere.at.all:f'], 'there is no module nowhere'), (['../x:f'], 'model'),
    (['colours:two', '--arch', 'resnet18'], 'leave it out'), (['colours:two', 'x'], 'two networks'),
    (['colours:two', '--mean', '.5'], 'go together'), (['colours:two', '--mean', 'x', '--std', '1'], 'one per channel'),
    (['colours:two', '--mean', '0', '--std', '0'], "--std '0'"), (['colours:two', '--mean', '0,0', '--std', '1,1'], 'images of 3 channels'),
    (['colours:two', '--vocab', 'n02'], 'at least two names'), (['colours:two', '--vocab', 'n02,n02'], 'each once'),
    (['colours:two', '--vocab', 'n02,n30,n31'], '2 outputs and --vocab has 3'), (['colours:two', '--part', '3'], '2/4'),
    (['colours:two', '--part', '0/4'], '2/4'), (['colours:two', '--part', '5/4'], '2/4'),
    (['colours:two', '--part', '1/900'], 'not enough'),
    (['colours:two', '--bs', '0'], 'at least 1'), (['colours:two', '--norm', 'l2'], 'radius with --eps'),
    (['colours:two', '--eps', '8'], '(0,1]'),
    (['colours:two', '--norm', 'l7', '--eps', '.5'], 'known norms are'), (['colours:two', '--suite', 'clean,best'], "'best'"),
    (['colours:two', '--data', 'nothing'], 'unknown'), (['colours:two', '--data', 'digits'], 'does not take images of 1 channels'),
    (['colours:two', '--n-eval', '0'], 'at least 1')])
def test_mistakes_get_one_sentence(args, says, sh, colours):
    (colours/'needy.py').write_text('import surely_not_there')
    (colours/'broken.py').write_text('def f(:')
    if not (colours/'d').exists(): images(colours/'d', ['n02','n30'])
    code,_,err = sh('--data', 'd', '--suite', 'clean', '--model', *args)
    assert code==2 and says in err and len(err.strip().splitlines())==1, err

@pytest.mark.parametrize('body,says', [('return 3', 'returns a int'), ('raise KeyError("x")', "KeyError in broken.py, line 2: 'x'"),
                                       ('import sys; sys.exit()', 'SystemExit')])
def test_functions_that_give_no_network(body, says, sh, tmp_path):
    (tmp_path/'broken.py').write_text(f'def f():\n    {body}\n')
    code,_,err = sh('--model', 'broken:f', '--data', 'digits')
    assert code==2 and says in err

def test_a_module_that_is_there_already(sh, colours):
    images(colours/'d', ['n02','n30'])
    code,out,err = sh('--model', 'colours:ready', '--data', 'd', '--suite', 'clean')
    assert code==0 and '100.0%' in out, err

def test_what_is_said_at_the_beginning(sh, colours):
    images(colours/'d', ['n02','n30'], 8)
    code,out,_ = sh('--model', 'colours:two', '--data', 'd', '--suite', 'clean,pgd20', '--eps', 4/255, '--device', 'cpu')
    head = dict(l.split(None, 1) for l in out.split('\n\n')[0].splitlines())
    assert code==0 and list(head)==['network','images','classes','threat','attacks','time']
    assert head['network']=='colours:two, 6 parameters, on cpu' and head['threat']=='linf, eps 0.01569 = 4/255'
    n = len(folder_dls('d').loaders[2].dataset)
    assert head['images']==f'{n} from d, 3×8×8, in batches of {n}'
    assert head['attacks']=='clean, pgd20' and head['time'].startswith('about ')

def test_lines_in_a_pipe(monkeypatch, capsys):
    "One every half minute, with a bound that falls"
    now = [0.]
    monkeypatch.setattr(R.time, 'monotonic', lambda: now[0])
    lines = R._Lines()
    lines.cost,lines.since,lines.last = dict(pgd20=100., curve=50.),0.,0.
    lines.at('pgd20', 0.)
    for now[0],share in [(10,.1), (29,.25), (31,.25), (40,.5), (62,.5), (90,1.)]: lines.at('pgd20', share)
    now[0] = 95
    lines.at('curve', 0.)
    now[0] = 125
    lines.at('curve', .9)
    lines.end()
    assert capsys.readouterr().out.splitlines()==['pgd20 25%, about 2 min left', 'pgd20 50%, about 2 min left',
                                                  'curve 0%, about 50 s left', 'curve 90%, about 3.3 s left']

def test_one_line_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    lines = R._Lines()
    lines.cost,lines.since,lines.last = dict(pgd20=1.),0.,0.
    lines.at('pgd20', .5)
    lines.end()
    out = capsys.readouterr().out
    assert out.startswith('\rpgd20 50%') and out.endswith('\r') and '\n' not in out

def test_every_job_moves_the_line(colours, monkeypatch):
    "Shares rise to the end of each job, and nothing is said by the library unless asked"
    monkeypatch.syspath_prepend(str(colours))
    import colours as C
    from advmix.report import robust_report
    seen = []
    class Ear:
        def begin(self, s, jobs): seen.append(jobs)
        def at(self, job, share): seen.append((job, share))
    images(colours/'d', ['n02','n30'], 6)
    robust_report(C.two(), split_tensors(folder_dls(colours/'d')), suite=['clean','pgd20','autoattack'], eps=.1, progress=Ear())
    sys.modules.pop('colours')
    assert seen[0]==['clean','pgd20','autoattack']
    for job in seen[0]:
        share = [s for j,s in seen[1:] if j==job]
        assert share[0]==0 and share==sorted(share) and share[-1]>.9

# out, page, fail-under

@pytest.fixture
def two(sh, colours):
    images(colours/'d', ['n02','n30'], 20, spread=20)
    return lambda *args: sh(*[] if args[0]=='--merge' else ['--model', 'colours:two', '--data', 'd', '--eps', .27], *args)

def passes():
    return sys.modules['colours'].Net

def test_a_finished_report_is_shown_again_and_no_other_written_over_it(two):
    args = ['--suite', 'clean,pgd20', '--out', 'r.json']
    code,first,_ = two(*args)
    was = Path('r.json').read_text()
    calls,passes().calls = passes().calls,0
    code,again,err = two(*args)
    assert code==0 and passes().calls<12 and 'all was measured before' in again, err
    assert again.split('\n\n')[1]==first.split('\n\n')[1] and Path('r.json').read_text()==was
    for more in (['--eps', .3], ['--seed', 1], ['--suite', 'clean']):
        code,_,err = two(*args, *more)
        assert code==2 and 'holds another report' in err and Path('r.json').read_text()==was
    Path('r.json').write_text('{}')
    code,_,err = two(*args)
    assert code==2 and 'is not a report' in err and Path('r.json').read_text()=='{}'

def test_ctrl_c_in_autoattack_and_on_again(two):
    "Rows and AutoAttack's state are kept; the same command ends with the numbers of one that was never stopped"
    args = ['--suite', 'clean,autoattack,curve', '--bs', 2, '--n-eval', 4]
    assert two(*args, '--out', 'whole.json')[0]==0
    total = passes().calls
    passes().calls,passes().stop = 0,int(.7*total)
    code,out,err = two(*args, '--out', 'r.json')
    assert code==130 and err.strip().endswith('interrupted: autoattack, curve not measured; the same command goes on'), err
    assert Path('r.json.autoattack').exists() and list(rows('r.json'))[0]=='clean' and 'missing: autoattack: interrupted' in out
    passes().calls,passes().stop = 0,None
    code,_,err = two(*args, '--out', 'r.json')
    assert code==0 and passes().calls<.75*total and not Path('r.json.autoattack').exists(), err
    a,b = (Report.from_json(f) for f in ('whole.json','r.json'))
    same = lambda r: {k:v for k,v in r.items() if k not in ('seconds','stages')}
    assert [same(r) for r in a.rows]==[same(r) for r in b.rows] and a.curve==b.curve and b.missing=={}
    passes().calls,passes().stop = 0,total//2
    code,_,err = two(*args)
    assert code==130 and 'with --out the same command would go on' in err
    passes().stop = None

def test_a_stale_state_is_not_believed(two):
    "What lies there without a report belongs to nothing"
    Path('r.json.autoattack').write_text('old')
    assert two('--suite', 'clean,autoattack', '--n-eval', 4, '--out', 'r.json')[0]==0 and not Path('r.json.autoattack').exists()

def test_parts_are_the_whole(two):
    args = ['--suite', 'clean,fgsm,autoattack,curve,calibration', '--bs', 2, '--n-eval', 4, '--eps', .3]
    assert two(*args, '--out', 'whole.json')[0]==0
    for k in (2,1):
        code,out,err = two(*args, '--part', f'{k}/2', '--out', f'part{k}.json')
        assert code==0 and f'part {k} of 2 of 4, from d' in out, err
    code,out,err = two('--merge', 'part2.json', 'part1.json', '--out', 'joined.json')
    assert code==0, err
    a,b = (Report.from_json(f) for f in ('whole.json','joined.json'))
    assert [r['name'] for r in a.rows]==[r['name'] for r in b.rows] and a.config['images']==b.config['images']
    for r,s in zip(a.rows, b.rows):
        assert r['accuracy']==pytest.approx(s['accuracy']) and r.get('stands')==s.get('stands') and r.get('by')==s.get('by')
        assert r.get('classes')==s.get('classes')
    assert 0<b.rows[-1]['accuracy']<1 and b.table().split('\n')[1] in out   # there was something to disagree about
    code,_,err = two('--merge', 'part2.json', '--out', 'less.json')
    assert code==2 and 'part 1 of 2 (not among the reports)' in err
    code,_,err = two('--merge', 'part1.json', 'part1.json')
    assert code==2 and 'twice' in err
    code,_,err = two('--merge', 'part1.json', 'part9.json')
    assert code==2 and 'part9.json does not exist' in err
    code,_,err = two('--merge', 'part1.json', 'part2.json', '--out', 'whole.json')
    assert code==2 and 'holds another report' in err
    code,_,err = two('--merge', 'part1.json', 'part2.json', '--eps', .1)
    assert code==2 and 'leave eps out' in err

def test_a_report_says_what_it_is_about(two):
    two('--suite', 'clean', '--n-eval', 3, '--out', 'r.json')
    c = json.loads(Path('r.json').read_text())['config']
    n = len(folder_dls('d').loaders[2].dataset)
    assert (c['path'],c['data'],c['vocab'],c['positions'])==('colours:two','d',['n02','n30'],[i*n//3 for i in range(3)])

def test_corrupted_images_from_elsewhere(two):
    code,_,err = two('--suite', 'corruption', '--source', 'nowhere')
    assert code==2 and 'not measured: corruption' in err and 'nowhere' in err

@pytest.mark.parametrize('out,says', [('.', 'is not a report'), ('d', 'is not a report'), ('colours.py', 'is not a report'),
                                      ('x'*300, 'too long'), ('colours.py/r.json', 'Not a directory')])
def test_out_is_not_for_anything_else(out, says, two, tmp_path):
    code,_,err = two('--suite', 'clean', '--out', out)
    assert code==2 and says in err and len(err.strip().splitlines())==1, err
    assert (tmp_path/'colours.py').read_text()==MODULE

def test_a_long_list_of_names_is_no_file(colours):
    assert judge._listed(','.join(NAMES*1+[f'{n}x'*20 for n in NAMES]))[:37]==NAMES

def test_small_parts_take_smaller_batches(two):
    code,out,_ = two('--suite', 'clean', '--part', '2/3', '--out', 'r.json')
    c = Report.from_json('r.json').config
    assert code==0 and c['total']>=3 and c['bs']==c['total']//3 and c['part']==[2,3]

def test_page_classes_and_what_fell_first(two):
    code,out,err = two('--suite', 'clean,fgsm,pgd20', '--page', 'worst.png', '--out', 'r.json')
    assert code==0 and 'worst.png' in out and Image.open('worst.png').size[0]>100, err
    r = rows('r.json')
    assert sum(n for _,n in r['pgd20']['classes'].values())==r['pgd20']['n'] and set(r['pgd20']['classes'])=={'n02','n30'}
    fell = r['worst case']['by']
    assert fell and sum(map(len, fell.values()))==r['worst case']['stands'].count('0')
    code,_,err = two('--suite', 'clean,fgsm,pgd20', '--page', 'again.png', '--out', 'r.json')
    assert code==0 and 'again.png was not written' in err and not Path('again.png').exists()

def test_fail_under(two):
    args = ['--suite', 'clean,fgsm']
    assert two(*args, '--fail-under', 'clean=1')[0]==0
    code,_,err = two(*args, '--fail_under', 'worst case=1.1,clean=.5')
    assert code==1 and 'worst case is' in err and 'under 1.1' in err
    code,_,err = two(*args, '--fail-under', 'robust=.4')
    assert code==2 and 'was not measured' in err

# runs of ours

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with one finished run"
    p = tmp_path_factory.mktemp('home')
    run(Config(epochs=1, steps=1, n_eval=16, suite='clean,fgsm,pgd20', bs=256), p/'run', progress=False)
    return p

def test_a_run_is_judged_as_it_judged_itself(home, sh):
    code,out,err = sh(home/'run', '--suite', 'clean,fgsm,pgd20', '--n-eval', 16, '--fail-under', 'clean=0', '--out', 'e.json')
    assert code==0 and 'threat   linf, eps 0.15' in out and 'digits' in out, err
    a,b = (json.loads(p.read_text()) for p in (Path('e.json'), home/'run/report.json'))
    assert [(o['name'],o['accuracy']) for o in a['rows']]==[(o['name'],o['accuracy']) for o in b['rows']]
    assert a['config']['vocab']==b['config']['vocab']==[str(i) for i in range(10)]
    code,out,err = sh(home/'run/model.safetensors', '--data', 'digits', '--eps', .15, '--suite', 'clean,fgsm,pgd20', '--n-eval', 16,
                      '--out', 'f.json')
    assert code==0 and rows('f.json')['pgd20']['stands']==rows('e.json')['pgd20']['stands'], err

@pytest.mark.parametrize('args,says', [(['none'], 'does not exist'), (['.'], 'not a run folder'), (['run','--eps','9'], '(0,1]'),
    (['run/model.safetensors'], '--data'), (['run','--mean','.5','--std','.5'], 'has its own normalisation'),
    (['run','--vocab','a,b'], 'names its classes itself'), ([], 'there is no network to judge'), (['run','--data',''], 'give --data')])
def test_mistakes_with_runs(args, says, home, sh, monkeypatch):
    monkeypatch.chdir(home)
    code,_,err = sh(*args, '--suite', 'clean')
    assert code==2 and says in err and len(err.strip().splitlines())==1

def test_help_comes_at_once_and_explains_every_argument():
    "Nothing heavy is imported before it is needed"
    import subprocess
    code = '''
import sys; sys.argv = ['advmix_eval', '--help']
try: from advmix.judge import evaluate; evaluate()
finally: assert not {"torch","fastai","pandas","matplotlib"}&sys.modules.keys()'''
    root = str(Path(__file__).resolve().parents[1])
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|dict(PYTHONPATH=root))
    assert r.returncode==0 and not r.stderr, r.stderr
    for a in 'merge out page fail model arch mean std vocab trust data size part bs eps norm suite seed device'.split():
        assert f'--{a}' in r.stdout

def test_a_network_that_ships_is_judged_by_its_name(sh):
    x,y,names = cifar_sheet()
    x,y = (x*255).round().byte().numpy(),y.numpy()
    flip = np.arange(10)[::-1].copy()   # the classes of these images in another order than the network's
    np.savez('sheet.npz', x_train=x, y_train=flip[y], x_test=x, y_test=flip[y], vocab=names[::-1])
    code,_,_ = sh('vanilla-cifar10', '--data', 'sheet.npz', '--suite', 'clean', '--out', 'r.json')
    net = from_pretrained('vanilla-cifar10')
    assert code==0 and rows('r.json')['clean']['accuracy']==clean(net, *cifar_sheet()[:2]).accuracy>.5
    for more in (['--arch','resnet18'], ['--mean','.5','--std','.5']):
        code,_,err = sh('vanilla-cifar10', '--data', 'sheet.npz', *more)
        assert code==2 and 'leave' in err
    code,_,err = sh('vanilla-cifar11', '--data', 'sheet.npz')
    assert code==2 and 'one that ships' in err
