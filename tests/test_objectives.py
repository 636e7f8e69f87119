"The published recipes as settings: all of them arrive, and one optimiser for both players equals two with the same settings"
import copy
import pytest, torch, torch.nn.functional as F
from advmix.models import *
from advmix.generator import *
from advmix.minmax import *
from advmix.objectives import *

def net_and_data():
    torch.manual_seed(0)
    return get_model('convnet_s', 10, c_in=1, size=8),torch.rand(8,1,8,8),torch.randint(10, (8,))

def test_adautomix_as_published():
    net,x,_ = net_and_data()
    g = MinMax.for_model(net, x, n_steps=100_000, **PUBLISHED['adautomix'])
    gen,avg,opt = g.generator,g.teacher,g.gen_opt
    assert type(gen) is AdAutoMixGenerator and (g.objective,g.beta,gen.n_mix,gen.alpha,gen.lam_margin)==('released',.3,(3,),1.,.03)
    assert gen.attention.relu and gen.attention.q.in_channels==32 and not gen.per_sample and gen.up=='bilinear'
    assert (avg.momentum(0),avg.momentum(9999),avg.hold)==(.999,.999,.1) and abs(avg.momentum(100_000)-.999999)<1e-12
    assert isinstance(opt, torch.optim.SGD) and [opt.defaults[k] for k in ('lr','momentum','weight_decay')]==[.1,.9,1e-4]
    assert g.weights(3)==dict(amce=1., mce=.5, ace=.5, amce_teacher=-.3, cosine=.7)

def test_automix_as_published():
    net,x,_ = net_and_data()
    g = MinMax.for_model(net, x, **PUBLISHED['automix'])
    gen = g.generator
    assert type(gen) is AutoMixGenerator and (g.objective,gen.n_mix,gen.alpha,gen.up,gen.lam_margin)==('automix',(2,),2.,'nearest',.08)
    assert isinstance(g.gen_opt, torch.optim.SGD) and g.teacher.decay==.999

@pytest.mark.parametrize('name', PUBLISHED)
def test_presets_are_settings_only(name):
    "Two games from one preset share nothing, and the preset stays as it was"
    before = copy.copy(PUBLISHED[name])
    net,x,y = net_and_data()
    a,b = (MinMax.for_model(net, x, opt=torch.optim.SGD(net.parameters(), .1), **PUBLISHED[name]) for _ in range(2))
    a.step(x, y)
    assert PUBLISHED[name]==before and a.gen_opt is not b.gen_opt and b.k==0
    for k,v in dict(beta=.4, hold=.25).items(): assert {**PUBLISHED['adautomix'], k:v}[k]==v

def test_two_optimisers_are_the_published_one():
    "The published code has one SGD over both networks; SGD treats every weight by itself, so two with equal settings are the same"
    net,x,y = net_and_data()
    sgd = PUBLISHED['adautomix']['gen_opt']
    two = MinMax.for_model(net, x, opt=sgd(net.parameters()), **PUBLISHED['adautomix'])
    one = copy.deepcopy(two)
    both = sgd([*one.student.parameters(), *one.generator.parameters()])
    for k in range(4):
        torch.manual_seed(k)
        two.step(x, y)
        torch.manual_seed(k)
        both.zero_grad()
        one.loss(one.student(one.mix(x, y).x), y)['total'].backward()
        both.step()
        one.after_step()
    for p,q in ((two.student,one.student), (two.generator,one.generator), (two.teacher,one.teacher)):
        for s,t in zip(p.state_dict().values(), q.state_dict().values()): torch.testing.assert_close(s, t, atol=1e-6, rtol=0)

@pytest.mark.parametrize('widths', ((16,32,32), (32,64,64)))
def test_default_rate(widths):
    x = torch.rand(4,1,8,8)
    net = convnet(10, 1, 8, widths)
    pairs,many = MinMax.for_model(net, x, objective='automix'),MinMax.for_model(net, x)
    assert pairs.gen_opt.defaults['lr']==2/widths[1] and many.gen_opt.defaults['lr']==.01
    assert all(isinstance(g.gen_opt, torch.optim.Adam) for g in (pairs,many))
