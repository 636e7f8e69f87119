"Loaders: fixed splits, pixels in [0,1], nothing random but by seed, and one clear sentence for bad data"
import pickle, random
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import (DataLoaders, ImageDataLoaders, Learner, Normalize, Resize, TfmdDL, TensorImage, accuracy, aug_transforms, load_learner)
from hypothesis import given, settings, strategies as st
import advmix.data
from advmix.data import *

def colours(path, n=12, size=16, names=('blue','green','red'), sub='', mode='RGB'):
    "A folder of noisy images, one colour per class"
    rng = np.random.RandomState(0)
    for c,name in enumerate(names):
        (path/sub/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            im = rng.randint(0, 60, (size,size,3)).astype('uint8')
            im[...,2-c%3] += 150
            Image.fromarray(im).convert(mode).save(path/sub/name/f'{i:03}.png')
    return path

# ---------------------------------------------------------------- splits

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0,6), min_size=1, max_size=120), st.integers(0,3))
def test_every_prefix_is_stratified(y, seed):
    order,y = stratified(y, seed),np.array(y)
    assert sorted(order)==list(range(len(y)))
    assert (order==stratified(y, seed)).all()
    k = len(np.unique(y))
    for n in (len(y)//4, len(y)//2, 3*len(y)//4):
        for c in np.unique(y): assert abs((y[order[:n]]==c).sum()-n*(y==c).mean())<=k/2+1

def test_digits_split_is_fixed():
    a,b = digits_dls(seed=0),digits_dls(bs=32, seed=7)
    assert [len(dl.dataset) for dl in a.loaders]==[1167,180,450]
    for which in ('train','valid','test'):
        for u,v in zip(split_tensors(a, which), split_tensors(b, which)): assert torch.equal(u,v)
    x,y = split_tensors(a)
    assert y[:20].tolist()==[3,1,5,6,4,9,7,0,2,8]*2
    assert (y.bincount()-45).abs().max()<=2
    assert x.double().sum().item()==8772.0625   # of these very images

def test_digits_parts_are_disjoint_and_complete():
    from sklearn.datasets import load_digits
    xs = torch.cat([split_tensors(digits_dls(), w)[0] for w in ('train','valid','test')]).flatten(1)
    ref = torch.tensor(load_digits().images/16).float().flatten(1)
    assert len(xs)==1797 and torch.equal(xs.unique(dim=0), ref.unique(dim=0))

def test_seed_orders_the_training_batches_and_nothing_else_does():
    def labels(seed, noise):
        random.seed(noise); torch.manual_seed(noise)
        dls = digits_dls(seed=seed)
        dls.one_batch()
        return [torch.cat([y for _,y in dls.train]) for _ in range(2)]
    a,b,c = labels(0,1),labels(0,2),labels(1,1)
    assert torch.equal(a[0],b[0]) and torch.equal(a[1],b[1])
    assert not torch.equal(a[0],a[1]) and not torch.equal(a[0],c[0])

# ---------------------------------------------------------------- batches

def test_batches():
    dls = digits_dls(bs=64)
    x,y = dls.one_batch()
    assert isinstance(x, TensorImage) and x.shape==(64,1,8,8) and x.dtype==torch.float32 and y.dtype==torch.int64
    assert 0<=x.min() and x.max()<=1 and dls.c==10 and list(dls.vocab)==list('0123456789')
    assert sum(len(y) for _,y in dls.train)==1167//64*64
    assert sum(len(y) for _,y in dls.valid)==180 and sum(len(y) for _,y in dls[2])==450
    assert len(dls)==3 and len(dls.train)==18 and len(dls[2])==8

def test_a_batch_larger_than_the_data_still_trains(): assert [len(y) for _,y in digits_dls(bs=4000).train]==[1167]

def test_memory_dl_equals_tfmd_dl():
    dls = digits_dls(bs=50)
    slow = dls.valid.new(cls=TfmdDL)
    for (a,b),(c,d) in zip(slow, dls.valid):
        assert type(a) is type(c) and type(b) is type(d)
        assert torch.equal(a,c) and torch.equal(b,d)

def test_batches_are_copies():
    dls = digits_dls()
    before = dls.valid.everything()[0].clone()
    for x,_ in dls.valid: x.zero_()
    assert torch.equal(dls.valid.everything()[0], before)

def test_memory_is_shared_with_new_loaders_of_the_same_data_only():
    dls = digits_dls()
    dls.valid.everything()
    assert dls.valid.new()._kept is dls.valid._kept
    assert dls.valid.new(dls.train.dataset)._kept is None

def test_digits_enlarged():
    x,_ = digits_dls(size=20).one_batch()
    assert x.shape[-2:]==(20,20) and 0<=x.min() and x.max()<=1

# ---------------------------------------------------------------- arrays

def arrays(n=40, c=3, dtype='float32'):
    rng = np.random.RandomState(0)
    x = rng.rand(n,c,8,8)
    return ((x*255).astype('uint8') if dtype=='uint8' else x.astype(dtype)),np.arange(n)%4

@pytest.mark.parametrize('dtype', ['uint8','float32','float64'])
@pytest.mark.parametrize('c', [1,3,4])
def test_arrays(dtype, c):
    x,y = arrays(c=c, dtype=dtype)
    dls = tensor_dls(x, y, bs=8, vocab=list('abcd'))
    assert [len(dl.dataset) for dl in dls.loaders]==[28,4,8] and dls.c==4
    xt,yt = split_tensors(dls)
    ref = torch.tensor(x/255 if dtype=='uint8' else x).float()
    for a,b in zip(xt,yt): assert any(torch.allclose(a,r, atol=1e-6) and b==t for r,t in zip(ref,y))

def test_given_parts_are_kept_in_order():
    x,y = arrays()
    dls = tensor_dls(x[:20], y[:20], x_test=x[30:], y_test=y[30:], bs=4)
    assert [len(dl.dataset) for dl in dls.loaders]==[18,2,10]
    assert torch.equal(split_tensors(dls)[0], torch.tensor(x[30:])) and split_tensors(dls)[1].tolist()==y[30:].tolist()

@pytest.mark.parametrize('spoil,says', [
    (lambda x,y: (x*2, y),                              r'x_train lies in .* not in \[0,1\]'),
    (lambda x,y: (np.where(x>.5, np.nan, x), y),        'x_train contains NaN'),
    (lambda x,y: (x, y-1),                              'negative labels'),
    (lambda x,y: (x, y[:-1]),                           '40 images and 39 labels'),
    (lambda x,y: (x.transpose(0,2,3,1), y),             'channels last'),
    (lambda x,y: (x[:,0], y),                           r'\(B,C,H,W\)'),
    (lambda x,y: ((x*100).astype('int64'), y),          'divide by 255'),
    (lambda x,y: (x, y+.5),                             'class numbers'),
])
def test_bad_arrays(spoil, says):
    with pytest.raises(ValueError, match=says): tensor_dls(*spoil(*arrays()))

def test_labels_beyond_the_vocabulary():
    x,y = arrays()
    with pytest.raises(ValueError, match='outside 0..1'): tensor_dls(x, y, vocab=['a','b'])
    with pytest.raises(ValueError, match='x_test lies in'): tensor_dls(x, y, x_test=x-1, y_test=y)

# ---------------------------------------------------------------- pictures

def test_to_pixels_takes_a_picture_however_it_comes():
    a = np.random.RandomState(0).randint(0, 256, (5,7,3)).astype('uint8')
    ref = torch.tensor(a).permute(2,0,1)/255
    for o in (a, Image.fromarray(a), a/255, torch.tensor(a).permute(2,0,1), ref, to_pixels(a), Labelled(a, 'b')):
        assert torch.allclose(to_pixels(o).as_subclass(torch.Tensor), ref, atol=1e-6)
    for o in (a[...,0], Image.fromarray(a[...,0]), ref[0], ref[:1]): assert to_pixels(o).shape==(1,5,7)

def test_photos():
    ps = photos(64)
    assert ps.shape==(3,3,64,64) and type(ps) is torch.Tensor and 0<=ps.min() and ps.max()<=1
    assert torch.equal(photos(64, 2), ps[:2]) and (ps.std((1,2,3))>.1).all()

# ---------------------------------------------------------------- augmentation

def test_crop_flip_chooses_rows_and_columns():
    x = TensorImage(torch.rand(1,2,6,9)).repeat(200,1,1,1)
    p = torch.nn.functional.pad(x[:1].as_subclass(torch.Tensor), [2]*4, mode='reflect')[0]
    could = [c for i in range(5) for j in range(5) for c in (p[:,i:i+6,j:j+9], p[:,i:i+6,j:j+9].flip(-1))]
    out = CropFlip(2)(x, split_idx=0).as_subclass(torch.Tensor)
    seen = [next(k for k,c in enumerate(could) if torch.equal(c,o)) for o in out]
    assert len(set(seen))>35 and .3<np.mean([k%2 for k in seen])<.7
    seen = [next(k for k,c in enumerate(could) if torch.equal(c,o)) for o in CropFlip(2, flip=False)(x, split_idx=0).as_subclass(torch.Tensor)]
    assert all(k%2==0 for k in seen)

def test_crop_flip_is_for_training_and_reproducible():
    x = TensorImage(torch.rand(4,3,8,8))
    draw = lambda: (torch.manual_seed(1), CropFlip()(x, split_idx=0))[1]
    assert torch.equal(CropFlip()(x, split_idx=1), x) and torch.equal(draw(), draw())
    assert CropFlip()(x.half(), split_idx=0).dtype==torch.half

def test_evaluation_never_augments(tmp_path):
    dls = folder_dls(colours(tmp_path), bs=4)
    a,b = split_tensors(dls, 'train'),split_tensors(dls, 'train')
    assert torch.equal(a[0],b[0]) and not torch.equal(next(iter(dls.train))[0].sort(0)[0], next(iter(dls.train))[0].sort(0)[0])
    stored = dls.train.everything()[0].as_subclass(torch.Tensor)/255
    assert torch.allclose(a[0], stored)

# ---------------------------------------------------------------- folders

def names(dls, i): return {f'{p.parent.name}/{p.name}' for p in dls[i].dataset.items}

def test_folder_without_parts(tmp_path):
    dls = folder_dls(colours(tmp_path, 20), bs=8)
    assert [len(dl.dataset) for dl in dls.loaders]==[42,6,12] and list(dls.vocab)==['blue','green','red']
    assert all((split_tensors(dls, w)[1].bincount()==n).all() for w,n in (('train',14),('valid',2),('test',4)))
    assert not names(dls,0)&names(dls,1) and not names(dls,0)&names(dls,2) and not names(dls,1)&names(dls,2)
    assert names(folder_dls(tmp_path, seed=5),2)==names(dls,2)
    x,y = split_tensors(dls)
    assert x.shape==(12,3,16,16) and (x.mean((2,3)).argmax(1)==2-y).all()   # the right label on the right image

@pytest.mark.parametrize('subs,sizes', [
    (('train','valid','test'),(36,36,36)), (('train','val','test'),(36,36,36)), (('train','test'),(32,4,36)),
    (('train','validation'),(28,36,8)), (('train',),(24,4,8))])
def test_folder_with_parts(tmp_path, subs, sizes):
    for s in subs: colours(tmp_path, 12, sub=s)
    (tmp_path/'extras'/'grey').mkdir(parents=True)
    Image.new('RGB', (4,4)).save(tmp_path/'extras'/'grey'/'0.png')
    dls = folder_dls(tmp_path, bs=8)
    assert tuple(len(dl.dataset) for dl in dls.loaders)==sizes and 'grey' not in dls.vocab
    for i,s in enumerate(('train','val','test')):
        if any(o.startswith(s) for o in subs): assert all(p.relative_to(tmp_path).parts[0].startswith(s) for p in dls[i].dataset.items)

def test_folder_sizes_and_modes(tmp_path):
    colours(tmp_path/'big', 6, size=300)
    colours(tmp_path/'grey', 6, mode='L')
    Image.new('RGBA', (40,20), 'red').save(tmp_path/'grey'/'red'/'wide.png')
    assert folder_dls(tmp_path/'big', bs=2).one_batch()[0].shape==(2,3,224,224)
    assert folder_dls(tmp_path/'big', bs=2, size=24).one_batch()[0].shape==(2,3,24,24)
    assert split_tensors(folder_dls(tmp_path/'grey', bs=2), 'train')[0].shape[1:]==(3,16,16)

def test_folder_in_memory_or_not(tmp_path):
    colours(tmp_path)
    a,b = (folder_dls(tmp_path, bs=8, in_memory=m, augment=False) for m in (True,False))
    assert type(a.train) is MemoryDL and type(b.train) is TfmdDL
    b.loaders = [dl.new(num_workers=0) for dl in b.loaders]
    assert torch.equal(split_tensors(a)[0], split_tensors(b)[0])

def test_n_train_is_stratified(tmp_path):
    dls = folder_dls(colours(tmp_path, 20), n_train=12)
    assert split_tensors(dls, 'train')[1].bincount().tolist()==[4,4,4] and len(dls[2].dataset)==12

def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match='does not exist'): folder_dls(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='no images'): folder_dls(tmp_path)
    colours(tmp_path, names=('red',))
    with pytest.raises(ValueError, match="single class, 'red'"): folder_dls(tmp_path)
    colours(tmp_path)
    (tmp_path/'red'/'000.png').write_bytes(b'no picture')
    dls = folder_dls(tmp_path, size=8)
    with pytest.raises(ValueError, match='000.png cannot be read as an image .*remove or replace'): [dl.everything() for dl in dls.loaders]

def test_test_folder_with_a_class_of_its_own(tmp_path):
    colours(tmp_path, sub='train'); colours(tmp_path, sub='test', names=('blue','purple'))
    with pytest.raises(ValueError, match="class 'purple', which the training images lack"): folder_dls(tmp_path)
    colours(tmp_path/'b', sub='train'); (tmp_path/'b'/'test').mkdir()
    Image.new('RGB', (4,4)).save(tmp_path/'b'/'test'/'0.png')   # unlabelled
    with pytest.raises(ValueError, match="class 'test'"): folder_dls(tmp_path/'b')

# ---------------------------------------------------------------- by name

def test_cifar_layouts(tmp_path, monkeypatch):
    for s in ('train','test'):
        colours(tmp_path/'c10', sub=s)
        colours(tmp_path/'c100', sub=f'{s}/primary')   # CIFAR-100 has a super class in between
    got = []
    monkeypatch.setattr(advmix.data, 'untar_data', lambda url: (got.append(url), tmp_path/('c100' if '100' in url else 'c10'))[1])
    for name in ('cifar10','cifar100'):
        dls = get_dls(name, bs=4, size=16)
        assert list(dls.vocab)==['blue','green','red'] and [len(dl.dataset) for dl in dls.loaders]==[32,4,36]
    assert len(set(got))==2
    assert cifar_dls(path=tmp_path/'c10', n_train=9, size=16).train_ds[0][0].shape==(3,16,16)

def test_cifar_out_of_reach(monkeypatch):
    def offline(url): raise OSError('no network')
    monkeypatch.setattr(advmix.data, 'untar_data', offline)
    with pytest.raises(ValueError, match='CIFAR-10 is neither in the cache of fastai nor within reach'): get_dls('cifar10')
    with pytest.raises(ValueError, match='CIFAR-10 and CIFAR-100'): cifar_dls(11)

def test_get_dls(tmp_path):
    colours(tmp_path/'f')
    x,y = arrays()
    np.savez(tmp_path/'a.npz', x_train=x, y_train=y, vocab=list('abcd'))
    assert get_dls().c==10 and get_dls('digits', size=16).one_batch()[0].shape[-1]==16
    assert get_dls(str(tmp_path/'f'), bs=4).c==3 and get_dls(tmp_path/'f', bs=4, size=8).one_batch()[0].shape[-1]==8
    assert list(get_dls(tmp_path/'a.npz').vocab)==list('abcd')
    for bad in ('mnist', tmp_path/'nowhere', tmp_path/'f'/'red'/'000.png'):
        with pytest.raises(ValueError, match='use digits, cifar10, cifar100, a folder'): get_dls(bad)
    with pytest.raises(ValueError, match='leave size out'): get_dls(tmp_path/'a.npz', size=4)
    np.savez(tmp_path/'b.npz', x=x, y_train=y)
    with pytest.raises(ValueError, match='it needs x_train and y_train'): get_dls(tmp_path/'b.npz')

# ---------------------------------------------------------------- back to pixels

def test_stats_are_found_and_undone(tmp_path):
    colours(tmp_path)
    mean,std = [.2,.4,.6],[.1,.2,.3]
    kw = dict(valid_pct=.5, seed=0, bs=4, num_workers=0, item_tfms=Resize(16))
    plain = ImageDataLoaders.from_folder(tmp_path, **kw)
    theirs = ImageDataLoaders.from_folder(tmp_path, batch_tfms=[*aug_transforms(), Normalize.from_stats(mean, std)], **kw)
    m,s = pixel_stats(theirs)
    assert m.shape==(1,3,1,1) and torch.allclose(m.flatten(), torch.tensor(mean)) and torch.allclose(s.flatten(), torch.tensor(std))
    assert pixel_stats(plain) is None and pixel_stats(theirs.valid) is not None
    for which in ('train','valid','test'):
        (a,y),(b,z) = split_tensors(theirs, which),split_tensors(plain, which)
        assert torch.allclose(a,b, atol=1e-6) and torch.equal(y,z) and type(a) is torch.Tensor and 0<=a.min() and a.max()<=1
    assert torch.equal(split_tensors(plain, 'test')[0], split_tensors(plain, 'valid')[0])
    assert np.allclose(data_stats(theirs), data_stats(plain), atol=1e-5)

def test_n_is_spread_evenly():
    dls = digits_dls()
    x,y = split_tensors(dls)
    for n in (1,7,450,1000): assert torch.equal(split_tensors(dls, n=n)[1], y[[i*450//min(n,450) for i in range(min(n,450))]])

def test_loaders_are_left_alone():
    dls = digits_dls()
    state,shuffle = dls.train.rng.getstate(),dls.train.shuffle
    split_tensors(dls, 'train', 5); data_stats(dls, 10)
    assert dls.train.rng.getstate()==state and dls.train.shuffle==shuffle and len(next(iter(dls.train))[1])==64
    assert dls.train.dataset.split_idx==0

def test_data_that_is_not_pixels():
    x,y = arrays()
    hidden = DataLoaders(*[TfmdDL([(torch.tensor(a)*2-1, b) for a,b in zip(x,y)], num_workers=0) for _ in range(2)])
    with pytest.raises(ValueError, match=r'test images lies in .*not in \[0,1\]'): split_tensors(hidden)
    multi = DataLoaders(*[TfmdDL([(torch.tensor(a), torch.rand(4)) for a in x], num_workers=0) for _ in range(2)])
    with pytest.raises(ValueError, match='class numbers'): split_tensors(multi)
    with pytest.raises(ValueError, match="'train', 'valid' or 'test'"): split_tensors(digits_dls(), 'held out')

def test_plain_torch_loaders():
    from torch.utils.data import DataLoader
    x,y = arrays()
    data = [(torch.tensor(a), int(b)) for a,b in zip(x,y)]
    dls = DataLoaders(DataLoader(data, 8), DataLoader(data, 8))
    assert torch.equal(split_tensors(dls, 'valid')[0], torch.tensor(x)) and pixel_stats(dls) is None

# ---------------------------------------------------------------- a Learner's life

def test_show_export_load_predict(tmp_path):
    import matplotlib.pyplot as plt
    dls = digits_dls()
    dls.show_batch(max_n=3)
    plt.close('all')
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64,10)), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, .05)
    learn.export('d.pkl')
    assert (tmp_path/'d.pkl').stat().st_size<200_000   # without the data
    loaded,(x,y) = load_learner(tmp_path/'d.pkl'),split_tensors(dls)
    with loaded.no_bar():
        want = loaded.model(x[:1]).argmax(1).item()
        for o in (x[0], x[0,0].numpy(), Image.fromarray((x[0,0]*255).byte().numpy())): assert loaded.predict(o)[:2]==(str(want), torch.tensor(want))
        p,_ = loaded.get_preds(dl=loaded.dls.test_dl(list(x)))
        assert torch.allclose(p, loaded.model(x).softmax(1), atol=1e-5)

def test_predict_from_files(tmp_path):
    dls = folder_dls(colours(tmp_path/'c'), bs=8)
    learn = Learner(dls, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3,3)), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(20, .1)
    learn.export('f.pkl')
    loaded = load_learner(tmp_path/'f.pkl')
    f = tmp_path/'c'/'green'/'003.png'
    with loaded.no_bar():
        for o in (f, str(f), Image.open(f), np.array(Image.open(f)), to_pixels(Image.open(f))): assert loaded.predict(o)[0]=='green'

def test_loaders_pickle():
    a = digits_dls()
    data = pickle.dumps(a)
    assert len(data)<3_000_000
    b = pickle.loads(data)
    assert torch.equal(split_tensors(a)[0], split_tensors(b)[0])
