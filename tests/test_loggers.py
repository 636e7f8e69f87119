"fastai's loggers beside a mix: TensorBoard and Weights & Biases where they are installed, and one that only remembers"
import math
from pathlib import Path
from fastai.callback.core import Callback
from fastai.learner import Recorder
from learners import *

class Remember(Callback):
    "What a logger reads: losses after each batch, names and values of metrics after each epoch"
    order = Recorder.order+1
    def before_fit(self): self.losses,self.rows = [],[]
    def after_batch(self):
        if self.training: self.losses.append(float(self.learn.smooth_loss))
    def after_epoch(self): self.rows.append(dict(zip(self.recorder.metric_names[2:-1], self.recorder.log[2:-1])))

@pytest.mark.parametrize('cb', ['cutmix','aom','iat','ema','adautomix'])
def test_a_logger_sees_losses_and_metrics(cb):
    log = Remember()
    quiet(learner(tensors(), CBS[cb](), log), 2)
    assert len(log.losses)==2*(len(tensors().train)) and all(map(math.isfinite, log.losses))
    assert [{'valid_loss','accuracy'}<=r.keys() for r in log.rows]==[True,True]
    if cb in ('ema','adautomix'): assert any(k.endswith('_ema') for k in log.rows[0])

def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    quiet(learner(tensors(), CBS['adautomix'](), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)), 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {'train_loss','valid_loss','accuracy','accuracy_ema'}<=set(events.Tags()['scalars'])
    assert len(events.Scalars('accuracy'))==2

def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    import wandb
    from fastai.callback.wandb import WandbCallback
    for k,v in dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path),
                    WANDB_CACHE_DIR=str(tmp_path), WANDB_DATA_DIR=str(tmp_path), HOME=str(tmp_path)).items(): monkeypatch.setenv(k, v)
    monkeypatch.chdir(tmp_path)
    with wandb.init(project='pieces') as run:
        quiet(learner(tensors(), CBS['cutmix'](), WandbCallback(log=None, log_preds=False)), 2)
        assert {'train_loss','valid_loss','accuracy'}<=set(dict(run.summary))
    assert list(tmp_path.rglob('run-*.wandb'))

@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_the_library_needs_no_logger(name):
    "Nothing of ours imports one"
    root = Path(__file__).resolve().parents[1]
    assert not [p.name for p in (root/'advmix').glob('*.py') if name in p.read_text()]
