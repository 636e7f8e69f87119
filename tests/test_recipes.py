"Recipes: each is complete, becomes the optimiser, schedule and game it says, and trains two steps on images of its shape"
import json, sys
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from advmix import cli, experiment as E
from advmix.config import Config
from advmix.data import tensor_dls
from advmix.experiment import run
from advmix.folder import Run, save_model
from advmix.weights import from_pretrained
from advmix.jobs import JOBS
from advmix.methods import METHODS

RECIPES = Config.recipes()
def here(d): return {} if d['data'] in ('cifar10','cifar100') else dict(data='.')   # any folder will do to read it

@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_complete(name):
    "It says where it is from, what it expects and what of it is ours, and is a config that goes to JSON and back"
    d = RECIPES[name]
    assert all(isinstance(d[k], str) and d[k] for k in ('source','data','notes')) and 'ours' in d['notes'].lower()
    assert d['data'] in ('cifar10','cifar100') or 'train/CLASS' in d['data'] and 'test/CLASS' in d['data']
    assert {'method','arch','size','epochs','bs','lr','sched'}<=d.keys() and name.startswith(d['method'])
    c = Config.recipe(name, **here(d))
    assert Config.from_json(c.to_json())==c and c.data==here(d).get('data', d['data'])
    assert all(getattr(c, k)==v for k,v in d.items() if k not in ('source','data','notes'))
    assert c.suite=='standard' or set(c.suite.split(','))<=set(JOBS)

SIDE = {32: 8, 64: 8, 224: 66}   # stems differ up to 64 pixels and above, and these networks take any side

def small(c, n=3):
    "Loaders of noise in the shape of `c`, two batches of `n`, too few to hold any out"
    x,y = torch.rand(2*n, 3, c.size, c.size),torch.arange(2*n)%4
    return tensor_dls(x, y, x[:n], y[:n], x[:n], y[:n], bs=n, vocab=range(4), augment=True)

class Stop(Callback):
    "Two steps are enough; the average needs none of the validation"
    order,run_valid = 90,False
    def before_fit(self): self.losses = []
    def after_batch(self):
        self.losses.append(self.loss.item())
        if len(self.losses)==2: raise CancelFitException

@pytest.mark.parametrize('name', RECIPES)
def test_two_steps(name, tmp_path, monkeypatch):
    "Its own network, callbacks, optimiser and schedule; a rate that six images can bear, and no download"
    d  = RECIPES[name]
    kw = dict(lr=1e-3, lr_end=0., bs=3, size=SIDE[d['size']], pretrained=False) | ({'steps': 1} if 'steps' in d else {})
    c  = Config.recipe(name, **kw | here(d))
    monkeypatch.setattr(E, 'get_dls', lambda *a, **k: small(c))
    learn,_ = E._learner(c, Run(tmp_path, c), 'cpu')
    was = {k: v.clone() for k,v in learn.model.named_parameters()}
    learn.add_cb(Stop())
    with learn.no_bar(), learn.no_logging(): E._fit(learn, c)
    assert len(learn.stop.losses)==2 and torch.isfinite(torch.tensor(learn.stop.losses)).all()
    now = dict(learn.model.named_parameters())
    assert all(torch.isfinite(p).all() for p in now.values()) and any((was[k]!=p).any() for k,p in now.items())

@pytest.mark.parametrize('name', [n for n in RECIPES if n.startswith('adautomix')])
def test_the_game_is_the_published_one(name):
    d,c = RECIPES[name],Config.recipe(name, **here(RECIPES[name]))
    cb  = METHODS['adautomix'](c)[0]
    assert cb.n_mix==(d['n_mix'],) and cb.for_game['beta']==d.get('beta', .3) and cb.for_game['objective']=='released'
    game = cb.start_game(torch.nn.Linear(2,2), cb.generator(8, **cb.for_generator))
    linear = .5 if d['n_mix']>2 else 0.
    assert game.weights(d['n_mix'])==dict(amce=1., mce=linear, ace=1-linear, amce_teacher=-game.beta, cosine=1-game.beta)
    if 'published' not in d: assert cb.gen_lr==d['gen_lr']
    else:
        assert isinstance(game.gen_opt, torch.optim.SGD) and game.gen_opt.defaults['lr']==.1
        assert cb.for_generator['lam_plane']==(d['published']=='large')
        assert cb.for_teacher['final']==(.99999 if d['published']=='large' else .999999)
    assert METHODS['automix'](Config.recipe(name, method='automix', **here(d)))   # its baselines
    assert METHODS['mixup'](Config.recipe(name, method='mixup', lr_end=0., **here(d)))

@pytest.mark.parametrize('name', [n for n in RECIPES if 'pgd' in n or 'aom' in n])
def test_attacks_are_those_of_cifar(name):
    threat = METHODS[RECIPES[name]['method']](Config.recipe(name))[0].mixer.threat
    assert (threat.eps, threat.step, threat.steps)==(8/255, 2/255, 10)

# what is typed

def test_unknown_keys_are_refused(monkeypatch):
    for name,d in RECIPES.items():
        monkeypatch.setattr(Config, 'recipes', classmethod(lambda cls: {name: d | dict(warp=9)}))
        with pytest.raises(ValueError, match=f"recipe {name}: 'warp' is not a setting"): Config.recipe(name, **here(d))

def test_data_that_are_not_there(tmp_path):
    for kw in (dict(), dict(data=str(tmp_path/'nothing')), dict(data='cifar')):
        with pytest.raises(ValueError, match='train/CLASS.*200 classes'): Config.recipe('adautomix_tiny_r18', **kw)
    assert Config.recipe('adautomix_tiny_r18', data='digits').size==64   # to try it out
    with pytest.raises(ValueError, match='choose one of adautomix_'): Config.recipe('adautomix_tiny')

def says(monkeypatch, capsys, *argv, f=cli.train):
    monkeypatch.setattr(sys, 'argv', [f'advmix_{f.__name__}', *map(str, argv)])
    code = 0
    try: f()
    except SystemExit as e: code = e.code
    return code,*capsys.readouterr()

def test_the_command(monkeypatch, capsys, tmp_path):
    code,out,_ = says(monkeypatch, capsys, '--recipe', 'list')
    assert code==0 and [l.split()[0] for l in out.splitlines()]==['recipe',*RECIPES]
    assert says(monkeypatch, capsys, '--recipe', 'list', f=cli.compare)[1]==out
    code,_,err = says(monkeypatch, capsys, '--recipe', 'adautomix_cub_r50')
    assert code==2 and err.count('\n')==1 and '--recipe adautomix_cub_r50' in err and '--data FOLDER' in err and '200 classes' in err
    assert says(monkeypatch, capsys, '--recipe', 'best')[0]==2

def test_options_win_over_a_file_and_a_file_over_a_recipe(monkeypatch, capsys, tmp_path):
    seen,file = [],tmp_path/'c.yaml'
    file.write_text('epochs: 7\nlr: .05\n')
    monkeypatch.setattr('advmix.experiment.run', lambda c, *a: seen.append(c) or 1/0)
    monkeypatch.setattr(sys, 'argv', ['advmix_train','--recipe','pgd_cifar10_r18','--config',str(file),'--lr','.2','--method','aom'])
    with pytest.raises(ZeroDivisionError): cli.train()
    c, = seen
    assert (c.method,c.epochs,c.lr,c.opt,c.sched,c.wd)==('aom',7,.2,'sgd','step',5e-4)
    args = ['--recipe','pgd_cifar10_r18','--methods','pgd,aom:steps=3','--seeds',2,'--data','digits','--list']
    lines = says(monkeypatch, capsys, *args, f=cli.compare)[1].splitlines()
    assert len(lines)==4 and all('--sched step' in l and '--data digits' in l for l in lines) and '--steps 3' in lines[2]

# optimisers and schedules

def test_weight_decay_momentum_and_schedule_reach_the_optimiser(tmp_path):
    seen = []
    class See(Callback):
        order,run_valid = 80,False
        def after_batch(self): seen.append((round(self.pct_train, 3), *[float(self.opt.hypers[-1][k]) for k in ('lr','mom','wd')]))
    def fit(**kw):
        seen.clear()
        c = Config('vanilla', bs=256, **kw)
        learn,_ = E._learner(c, Run(tmp_path, c), 'cpu')
        with learn.no_bar(), learn.no_logging(), learn.added_cbs(See()): E._fit(learn, c)
        return learn
    learn = fit(opt='sgd', sched='step', lr=.1, wd=1e-3, mom=.8, epochs=4)   # four batches an epoch
    assert [lr for _,lr,_,_ in seen]==pytest.approx([.1]*8+[.01]*4+[.001]*4) and {s[2:] for s in seen}=={(.8,1e-3)}
    assert all(s.get('do_wd', True) for _,_,s,_ in learn.opt.all_params())   # all parameters, as in PyTorch
    (tmp_path/'checkpoint.pth').unlink()
    fit(sched='cosine', lr=.1, lr_end=.05, warmup=1, epochs=2)
    assert seen[0][1]==0 and max(s[1] for s in seen)==pytest.approx(.1) and .05<seen[-1][1]<.06 and {s[2:] for s in seen}=={(.9,.01)}

def test_the_default_is_what_it_was(tmp_path):
    "fastai's Adam and one cycle, as nothing else had been said: the same weights to the last bit"
    from fastai.callback.schedule import fit_one_cycle
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.torch_core import set_seed
    from advmix.data import data_stats
    from advmix.files import get_dls
    from advmix.models import get_model
    c = Config('mixup', epochs=2, bs=256)
    learn,_ = E._learner(c, Run(tmp_path, c), 'cpu')
    with learn.no_bar(), learn.no_logging(): E._fit(learn, c)
    set_seed(0, reproducible=True)
    dls = get_dls('digits', bs=256, seed=0, size=8)
    m,s = data_stats(dls, 2000)
    old = Learner(dls, get_model('convnet_s', n_classes=10, c_in=1, size=8, mean=m, std=s), CrossEntropyLossFlat(), cbs=METHODS['mixup'](c))
    with old.no_bar(), old.no_logging(): old.fit_one_cycle(2, 1e-2)
    assert all(torch.equal(a, b) for a,b in zip(learn.model.parameters(), old.model.parameters()))

def test_a_config_of_yesterday_still_loads():
    new  = 'opt','wd','mom','sched','lr_end','warmup','pretrained','published','gen_lr','stage'
    d    = json.loads(Config('adautomix', seed=3).to_json())
    assert set(new)<=d.keys()
    assert Config.from_json(json.dumps({k: v for k,v in d.items() if k not in new}))==Config('adautomix', seed=3)

@pytest.mark.parametrize('method', ['vanilla','adautomix'])
def test_sgd_interrupted_and_resumed_ends_with_the_same_weights(method, tmp_path, monkeypatch):
    c = Config(method, opt='sgd', sched='step', lr=.05, mom=.9, epochs=4, bs=256, n_eval=16, suite='clean', published='small')
    whole = run(c, tmp_path/'whole', 'cpu', progress=False)
    class Cut(Callback):
        run_valid = False
        def after_batch(self):
            if (self.epoch,self.iter)==(2,1): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setitem(METHODS, method, lambda c, f=METHODS[method]: [*f(c), Cut()])
        with pytest.raises(KeyboardInterrupt): run(c, tmp_path/'parts', 'cpu', progress=False)
    parts = run(c, tmp_path/'parts', 'cpu', resume=True, progress=False)
    assert all(torch.equal(a, b) for a,b in zip(whole.model().parameters(), parts.model().parameters()))
    assert (whole.history.drop(columns='time')==parts.history.drop(columns='time')).all().all()

def test_published_weights_are_kept_with_their_normalisation(tmp_path, monkeypatch):
    "Downloaded once, with the normalisation they were trained with; the run's file needs no download"
    made,real = [],E.get_model
    def offline(pretrained=False, **spec):
        made.append(pretrained)
        net = real(**spec | (dict(small_stem=False) if pretrained else {}))
        if pretrained: net.norm.mean[:],net.norm.std[:] = .4,.2
        return net
    monkeypatch.setattr(E, 'get_model', offline)
    c = Config('vanilla', '.', 'resnet18', size=32, pretrained=True, bs=3)
    monkeypatch.setattr(E, 'get_dls', lambda *a, **k: small(c))
    learn,spec = E._learner(c, Run(tmp_path, c), 'cpu')
    assert made==[True] and 'pretrained' not in spec
    save_model(learn.model, tmp_path/'m.safetensors', range(4), **spec)
    net = from_pretrained(tmp_path/'m.safetensors')
    x = torch.rand(2,3,32,32)
    assert torch.equal(net(x), learn.model.eval().cpu()(x)) and (net.norm.mean==.4).all() and net.net.conv1.kernel_size==(7,7)
