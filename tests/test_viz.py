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

photos = torch.rand(9,3,8,10)

def mixed(B=3, N=2, C=3, mask=True, eps=0.):
    "Mixtures of `photos`, by masks that are kept or forgotten, with a perturbation or without"
    idx = torch.stack([torch.arange(B).roll(-k) for k in range(N)], 1)
    m   = torch.rand(B,N,8,10).softmax(1)
    x   = (m[:,:,None]*photos[:,:C][idx]).sum(1)
    return SimpleNamespace(x=x+eps*torch.ones(8,10).tril().sub(.5).mul(2), idx=idx, w=torch.full((B,N), 1/N), mask=m if mask else None)

def rows(axs): return [ax.get_ylabel().replace('\n', ' ') for ax in axs[:,0]]

@pytest.mark.parametrize('N,mask,eps,shown', [
    (1, False, 0,    ['image','mixture']),
    (2, False, .1,   ['image','partner','mixture']),   # without masks nobody knows what was added
    (2, True,  0,    ['image','partner','mask','mixture']),
    (2, True,  .03,  ['image','partner','mask','perturbation ×8','mixture']),
    (2, True,  .125, ['image','partner','mask','perturbation ×4','mixture']),
    (3, True,  0,    ['image','partner 1','partner 2','mask of image','mask of partner 1','mask of partner 2','mixture']),
    (4, False, 0,    ['image','partner 1','partner 2','partner 3','mixture']),
])
def test_mixed_rows(N, mask, eps, shown):
    m = mixed(N=N, mask=mask, eps=eps)
    if N==1: m.x = photos[:3]
    axs = show_mixed(m, photos, torch.arange(9))
    assert rows(axs)==shown and axs.shape==(len(shown),3)

def test_an_attack_on_single_images_shows():
    m = SimpleNamespace(x=photos[:3]+.01, idx=torch.arange(3)[:,None], w=torch.ones(3,1), mask=None)
    axs = show_mixed(m, photos, torch.arange(9))
    assert rows(axs)==['image','perturbation ×8','mixture']
    assert np.allclose(axs[1,0].images[0].get_array(), .58, atol=1e-4)

def test_half_precision_is_no_attack():
    m = mixed()
    m.x = m.x.bfloat16()
    assert 'mask' in rows(show_mixed(m, photos, torch.arange(9))) and len(rows(show_mixed(m, photos, torch.arange(9))))==4

def test_classes_are_named_and_masks_have_a_key():
    axs = show_mixed(mixed(), photos, torch.arange(9), [f'c{i}' for i in range(9)])
    assert [ax.get_title() for ax in axs.flat]==['c0','c1','c2','c1','c2','c0']+['']*6
    bar, = axs[2,2].child_axes
    assert [t.get_text() for t in bar.get_yticklabels()]==['partner','image'] and not axs[2,0].child_axes
    bars = [axs[r,2].child_axes[0] for r in (3,4,5)] if len(axs := show_mixed(mixed(N=3), photos, torch.arange(9)))==7 else []
    assert [[t.get_text() for t in b.get_yticklabels()] for b in bars]==[['0','1']]*3

def test_mixed_of_one_grey_image_with_float_targets():
    axs = show_mixed(mixed(B=1, C=1), photos[:,:1], torch.rand(9,5))
    assert axs[-1,0].get_xlabel()=='.50\n.50' and axs[0,0].get_title()==''

def test_figures_are_saved(tmp_path):
    show_mixed(mixed(), photos, torch.arange(9), save=tmp_path/'mix.png')
    assert (tmp_path/'mix.png').read_bytes()[1:4]==b'PNG'

def test_mixed_shows_n_columns(): assert show_mixed(mixed(B=9), photos, torch.arange(9), n=4).shape==(4,4)

def test_bars_are_the_largest():
    axs = label_bars(torch.tensor([[.1,.7,.2],[.5,.2,.3]]), ['a','b','c'], top=2)
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in axs]==[['b','c'],['a','c']]

def test_of_several_terms_the_attacked_one_is_shown():
    clean,adv = mixed(),mixed(eps=.03)
    for terms in ([(.5,clean),(.5,adv)], [(1.,adv),(.2,clean)]):
        assert 'perturbation ×8' in rows(show_mixed(terms, photos, torch.arange(9)))
