"What a step costs: counted floors, seconds by turns, memory, peers, and hours for somebody's own Learner"
import pytest, torch
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy
from advmix.cost import *
from advmix.cost import _by_turns, _flops, _peak
from advmix.data import digits_dls
from advmix.methods import METHODS
from advmix.models import get_model

small = dict(arch='convnet', size=8, bs=4, rounds=1)

def test_floors_are_counted():
    "A step is three passes; K attack steps add 2K of them, half of the batch once more for IAT; the first layer has no input gradient"
    t = time_steps(['mixup','cutmix','pgd:steps=1','pgd:steps=5','aom','mix_pgd'], arch='convnet', size=16, bs=4, rounds=1, steps=2)
    floor = t.floor.to_dict()
    assert floor['vanilla']==floor['mixup']==floor['cutmix']==1
    per_step = (floor['pgd:steps=5']-floor['pgd:steps=1'])/4
    assert .66<per_step<.68 and abs(floor['aom']-1-2*per_step)<.01 and abs(floor['mix_pgd']-floor['aom'])<.01

def test_table():
    t = time_steps(['pgd'], **small)
    assert list(t.index)==['vanilla','pgd'] and t.steps['vanilla']==1 and (t.q1<=t.seconds).all() and (t.seconds<=t.q3).all()
    assert (t.MiB>0).all() and abs(t.images_s['pgd']*t.seconds['pgd']-4)<1e-6

def test_every_method_can_be_timed_and_counted():
    "None takes less arithmetic than an ordinary step"
    t = time_steps([m for m in METHODS if m!='vanilla'], **small, steps=1)
    assert (t.floor>=.999).all() and (t.seconds>0).all() and len(t)==len(METHODS)

def test_settings_of_one_method():
    "Image side and batch may differ by row; arithmetic grows with them"
    t = time_steps(['vanilla:bs=8','vanilla:size=16'], **small)
    assert abs(t.floor['vanilla:bs=8']-2)<1e-6 and t.floor['vanilla:size=16']>1.9

@pytest.mark.parametrize('bad,says', [(['aoom'],'choose one of'), (['pgd:setps=1'],'setps'), (['pgd:steps=0'],'steps')])
def test_bad_methods(bad, says):
    with pytest.raises(ValueError, match=says): time_steps(bad, **small)

@pytest.mark.parametrize('kw', [dict(amp='bf16'), dict(channels_last=True)])
def test_switches(kw): assert (time_steps(['pgd'], **small, **kw).seconds>0).all()

def test_peak_is_what_is_held_at_once():
    def f():
        a = torch.zeros(2**18)
        for _ in range(5): a = a+1   # two at once
    assert abs(_peak(f, 'cpu')-2*2**20)<1000

def test_flops(): assert _flops(lambda: torch.rand(3,4)@torch.rand(4,5))==2*3*4*5

def test_turns():
    order,fs = [],{}
    for k in 'abc': fs[k] = lambda k=k: order.append(k) or float(len(order))
    t = _by_turns(fs, 7)
    assert order[:3]==list('abc') and all(sorted(order[3*i:3*i+3])==list('abc') for i in range(8)) and list(t.index)==list('abc')

def test_peers():
    t = time_peers('convnet', 8, 2, steps=1, rounds=1)
    assert {('PGD','advmix'),('PGD','naive loop'),('MixUp','torchvision'),('CutMix','torchvision')}<=set(t.index)
    assert all(t.ratio[w,'advmix']==1 for w in ('PGD','MixUp','CutMix'))

def test_hours_for_a_learner_that_stays_as_it_is():
    dls = digits_dls()
    learn = Learner(dls, get_model('convnet', 10, c_in=1, size=8), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    rng,order = torch.get_rng_state(),dls.train.rng.getstate()
    one = predict_hours(learn, 'pgd:steps=2', epochs=1, rounds=1)
    ten = predict_hours(learn, 'pgd:steps=2', epochs=100, rounds=1)
    assert 0<one<ten and len(learn.cbs)==len(Learner(dls, nn.Identity(), metrics=accuracy).cbs)
    assert torch.equal(torch.get_rng_state(), rng) and dls.train.rng.getstate()==order
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.model.training
    with pytest.raises(ValueError, match='choose one of'): predict_hours(learn, 'best')
