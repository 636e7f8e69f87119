"Figures: what is drawn, not how it looks"
from types import SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from advmix.viz import *
from advmix.viz import _label_bars as label_bars
from advmix.viz import _mix_title as mix_title

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def test_images_share_one_scale():
    axs = show_images([torch.rand(1,8,8)*.1, torch.rand(3,8,8), torch.rand(8,8)>.5])
    assert axs.shape==(1,3)
    assert all(ax.images[0].get_clim()==(0,1) for ax in axs.flat)
    assert all(ax.images[0].get_interpolation()=='nearest' for ax in axs.flat)

@pytest.mark.parametrize('n,nrows,shape', [(1,1,(1,1)),(7,2,(2,4)),(3,3,(3,1))])
def test_grid(n, nrows, shape): assert show_images(torch.rand(n,1,8,8), [str(i) for i in range(n)], nrows=nrows).shape==shape

def test_images_take_what_tensors_come_as():
    x = torch.rand(2,3,8,10, requires_grad=True)
    for o,side in ((x,(8,10)), (x.half(),(8,10)), (x.transpose(2,3),(10,8)), ((x*0).byte(),(8,10)),
                   ([a.detach().numpy() for a in x],(8,10))):
        assert [ax.images[0].get_array().shape for ax in show_images(o).flat]==[(*side,3)]*2

def test_titles_and_rows():
    axs = show_images(torch.rand(4,1,8,8), ['a','b'], nrows=2, rows=['up','down'])
    assert [ax.get_title() for ax in axs.flat]==['a','b','','']
    assert [ax.get_ylabel() for ax in axs[:,0]]==['up','down']

@pytest.mark.parametrize('y,w,vocab,says', [
    ([0,1],   [.62,.38],     ['cat','dog'], 'cat .62 / dog .38'),
    ([0,1],   [.38,.62],     ['cat','dog'], 'dog .62 / cat .38'),
    ([1,1],   [.5,.5],       ['cat','dog'], 'dog 1.00'),
    ([0,1],   [1.,0.],       None,          '0 1.00'),
    ([0,1,2], [.2,.5,.3],    None,          '1 .50 / 2 .30 / 0 .20'),
    ([0,1],   [.9,.4],       None,          '0 .90 / 1 .40'),   # SnapMix: rows need not sum to 1
    ([0],     [0.],          None,          '0 .00'),
])
def test_mix_title(y, w, vocab, says): assert mix_title(torch.tensor(y), torch.tensor(w), vocab)==says

def test_mix_title_of_float_targets(): assert mix_title(torch.rand(2,4), torch.tensor([.3,.7]), ['a','b','c','d'])=='.70 / .30'

def mixed(B=3, N=2, C=3, mask=True):
    idx = torch.stack([torch.arange(B).roll(-k) for k in range(N)], 1)
    return SimpleNamespace(x=torch.rand(B,C,8,10), idx=idx, w=torch.full((B,N), 1/N), mask=torch.rand(B,N,8,10) if mask else None)

@pytest.mark.parametrize('N,mask,rows', [(1,False,2),(2,False,3),(2,True,4),(3,True,7),(4,False,5)])
def test_mixed_rows(N, mask, rows):
    m = mixed(N=N, mask=mask)
    assert show_mixed(m, torch.rand(3,3,8,10), torch.arange(3)).shape==(rows,3)

def test_mixed_of_one_grey_image_with_float_targets():
    axs = show_mixed(mixed(B=1, C=1), torch.rand(1,1,8,10), torch.rand(1,5))
    assert axs[-1,0].get_xlabel()=='.50\n.50'

def test_mixed_shows_n_columns(): assert show_mixed(mixed(B=9), torch.rand(9,3,8,10), torch.arange(9), n=4).shape==(4,4)

def test_bars_are_the_largest():
    axs = label_bars(torch.tensor([[.1,.7,.2],[.5,.2,.3]]), ['a','b','c'], top=2)
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in axs]==[['b','c'],['a','c']]

def test_curves():
    ax = plot_curves({'one':[1,2,3], 'seeds':np.arange(12.).reshape(4,3), 'tensor':torch.ones(3)}, [0,.1,.2], 'eps', 'accuracy')
    assert [l.get_label() for l in ax.lines]==['one','seeds','tensor'] and len(ax.collections)==1
    assert np.allclose(ax.lines[1].get_ydata(), [4.5,5.5,6.5])
    assert (ax.get_xlabel(),ax.get_ylabel())==('eps','accuracy')
