"Half precision, memory format and compilation: the same training up to rounding, and nothing of it left behind"
import copy, random, shutil
import pytest, torch
from torch import nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, accuracy, set_seed
from advmix.callbacks import *
from advmix.config import Config
from advmix.experiment import run
from learners import *

@pytest.fixture(scope='module')
def dls(): return tensors()

class Seen(Callback):
    "How the passes of the network run"
    order,run_valid = 80,False
    def __init__(self): self.dtypes,self.formats,self.losses,self.grad = set(),set(),[],None
    def before_step(self):
        if self.grad is None: self.grad = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()])
    def before_fit(self):
        conv = next(m for m in self.learn.model.modules() if isinstance(m, nn.Conv2d) and m.in_channels>1)
        def look(m, i, o):
            self.dtypes.add(o.dtype)
            self.formats.add(o.is_contiguous(memory_format=torch.channels_last))
        self.hook = conv.register_forward_hook(look)
    def after_loss(self): self.losses.append((self.loss.item(), self.pred.dtype, torch.is_autocast_enabled('cpu')))
    def after_fit(self): self.hook.remove()

def trained(dls, cb, epochs=2, **kw):
    "On the batches of the same beginning, whatever `dls` has given before"
    set_seed(0)
    dls.train.rng = random.Random(0)
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[*([cb] if cb else []), Seen()]).pace(**kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn

CASES = dict(vanilla=lambda: None, pgd=lambda: PGDCallback(.1, steps=2), aom=lambda: AOMCallback(.1, steps=2),
             game=lambda: AdAutoMixCallback(), ema=lambda: EMACallback())

@pytest.mark.parametrize('name', CASES)
def test_bfloat16_is_the_same_up_to_rounding(dls, name):
    "First loss within 2 %, first gradient within 25 degrees (an attack takes signs); losses, weights and averages stay float32"
    a,b = trained(dls, CASES[name](), 1),trained(dls, CASES[name](), 1, amp='bf16')
    assert abs(a.seen.losses[0][0]-b.seen.losses[0][0])<.02*a.seen.losses[0][0]
    assert torch.cosine_similarity(a.seen.grad, b.seen.grad, dim=0)>.9
    assert torch.bfloat16 in b.seen.dtypes and all(d==torch.float32 and not cast for _,d,cast in b.seen.losses)
    assert torch.bfloat16 not in {t.dtype for t in b.model.state_dict().values()}

@pytest.mark.parametrize('name', CASES)
def test_channels_last_is_the_same_up_to_rounding(dls, name):
    "Losses of all batches within a thousandth; afterwards the weights lie as before"
    a,b = trained(dls, CASES[name]()),trained(dls, CASES[name](), channels_last=True)
    assert all(abs(x-y)<1e-3*x for (x,*_),(y,*_) in zip(a.seen.losses, b.seen.losses))
    assert True in b.seen.formats and all(p.is_contiguous() for p in b.model.parameters())

def test_attacks_run_in_bfloat16_too(dls):
    assert trained(dls, PGDCallback(.1, steps=3), amp='bf16').seen.dtypes=={torch.bfloat16}

def test_no_autocast_is_left_by_a_failure(dls):
    class Fail(Callback):
        order = 6
        def before_batch(self): raise ValueError('enough')
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=Fail()).pace('bf16')
    with pytest.raises(ValueError), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert not torch.is_autocast_enabled('cpu')

class Counts:
    "A backend for torch.compile that compiles nothing and counts what it is given"
    def __init__(self): self.n = 0
    def __call__(self, gm, inputs):
        self.n += 1
        return gm.forward

@pytest.mark.parametrize('name', ['pgd', 'game', 'ema'])
def test_compiled_passes_are_the_same(dls, name, monkeypatch):
    "Graphs are taken from the network's passes in training only, an attack's included; the losses don't change"
    torch._dynamo.reset()
    count,compile = Counts(),torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, *a, **k: compile(f, backend=count))
    a,b = trained(dls, CASES[name]()),trained(dls, CASES[name](), compile=True)
    for (x,*_),(y,*_) in zip(a.seen.losses, b.seen.losses): assert abs(x-y)<1e-3*max(1, x)
    assert count.n>=1 and b.model._compiled_call_impl is None
    copy.deepcopy(b.model)
    with b.no_bar(), b.no_logging():
        b.fit(1, 1e-3)
        n = count.n
        b.validate()
    assert count.n==n
    torch._dynamo.reset()

@pytest.mark.parametrize('kw,says', [(dict(amp='half'),'choose no, fp16 or bf16'), (dict(amp='fp16'),'needs a CUDA GPU')])
def test_refused(dls, kw, says):
    with pytest.raises(ValueError, match=says): Learner(dls, net()).pace(**kw)

def test_refused_when_training_begins(dls, monkeypatch):
    for mixer in ('manifold', ['mixup','manifold']):
        with pytest.raises(ValueError, match='inside the network'): trained(dls, MixCallback(mixer), compile=True)
    monkeypatch.setattr(shutil, 'which', lambda c: None)
    with pytest.raises(ValueError, match='compiler'): trained(dls, None, compile=True)

def test_pace_is_of_a_learner_and_can_be_changed(dls):
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat())
    n = len(learn.cbs)
    assert learn.pace() is learn and len(learn.cbs)==n
    assert len(learn.pace('bf16', compile=True).cbs)==n+1 and len(learn.pace(channels_last=True).cbs)==n+1 and len(learn.pace().cbs)==n

def test_settings_of_a_run(tmp_path):
    c = Config('pgd', epochs=1, steps=1, n_eval=32, suite='clean', amp='bf16', channels_last=True)
    r = run(c, tmp_path/'r', 'cpu', progress=False)
    assert Config.from_json((r.folder/'config.json').read_text())==c and '--amp bf16 --channels-last' in c.command()
    assert {p.dtype for p in r.model().parameters()}=={torch.float32}
