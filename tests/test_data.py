"Loaders: fixed splits, pixels in [0,1], nothing random but by seed, and one clear sentence for bad data"
import pickle, random
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import (DataLoaders, ImageDataLoaders, Learner, Normalize, Resize, TfmdDL, TensorImage, accuracy,
    aug_transforms, load_learner)
from hypothesis import given, settings, strategies as st
from advmix.data import *
from advmix.data import _CropFlip as CropFlip, _Labelled as Labelled, _MemoryDL as MemoryDL, _stratified as stratified, _ToPixels
to_pixels = _ToPixels()

def write(path, mode='RGB', size=16, n=12, names=('blue','green','red')):
    "Image files of one colour per class, as pairs of file and class name"
    rng,res = np.random.RandomState(0),[]
    for c,name in enumerate(names):
        (path/name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            im = rng.randint(0, 60, (size,size,3)).astype('uint8')
            im[...,2-c%3] += 150
            Image.fromarray(im).convert(mode).save(path/name/f'{i:03}.png')
            res.append((path/name/f'{i:03}.png', name))
    return res

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
    split_tensors(dls, 'valid')   # reads through a loader of its own
    assert dls.valid._kept and dls.valid.new()._kept is dls.valid._kept
    assert dls.valid.new(dls.train.dataset)._kept==[]

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

@pytest.mark.parametrize('bad', [[1,2], 'gpu', 0.5])
def test_in_memory_is_one_of_three(bad):
    with pytest.raises(ValueError, match='use True, False or .device.'): tensor_dls(*arrays(), in_memory=bad)

def test_names_of_class_numbers():
    x,y = arrays()
    dls = tensor_dls(x, y, x_test=x, y_test=y, names=['cat','dog','owl','ant'], vocab=['owl','ant','dog','cat','bee'])
    assert list(dls.vocab)==['owl','ant','dog','cat','bee'] and dls.c==5
    assert split_tensors(dls)[1].tolist()==[[3,2,0,1][i] for i in y]
    with pytest.raises(ValueError, match=r"classes \['ant'\] are not among those the network knows, \['owl', 'dog', 'cat'\]"):
        tensor_dls(x, y, names=['cat','dog','owl','ant'], vocab=['owl','dog','cat'])
    few = y<3   # a class that is known and absent is no fault
    assert tensor_dls(x[few], y[few], names=['cat','dog','owl','ant'], vocab=['owl','dog','cat']).c==3

# ---------------------------------------------------------------- items

def test_items_are_files_pictures_or_arrays(tmp_path):
    files = write(tmp_path, n=6)
    pics  = [(Image.open(f),c) for f,c in files]
    array = [(np.array(im),c) for im,c in pics]
    a,b,c = (split_tensors(item_dls(o, bs=4)) for o in (files,pics,array))
    assert torch.equal(a[1],b[1]) and torch.allclose(a[0],b[0]) and torch.equal(b[0],c[0])

def test_items_with_a_vocabulary(tmp_path):
    files = write(tmp_path, n=6)
    dls = item_dls(files[:12], files[12:15], files[15:], vocab=['red','black','green','blue'])
    assert [[dls.vocab[i] for i in split_tensors(dls, w)[1]] for w in ('valid','test')]==[['red']*3]*2
    with pytest.raises(ValueError, match=r"classes \['red'\] are not among those the training images have"):
        item_dls(files[:12], files[12:15], files[15:])

def test_too_few_items(tmp_path):
    files = write(tmp_path, n=1, names=('a','b'))
    with pytest.raises(ValueError, match='2 training images are too few: what is held out leaves none'): item_dls(files)
    assert len(item_dls(files, files, files).train_ds)==2

def test_unreadable_files_are_named_together(tmp_path, monkeypatch):
    files = write(tmp_path)
    whole = files[3][0].read_bytes()
    files[0][0].write_bytes(b'no picture')
    files[3][0].write_bytes(whole[:len(whole)//2])   # a transfer that broke off
    files[30][0].write_bytes(b'')
    for kw in (dict(in_memory=True), dict(in_memory=False), dict(size=8), dict(size=8, in_memory=False)):
        with pytest.raises(ValueError, match=r'000.png \(Unid.*003.png \(.*006.png \(Unid.*cannot be read as images: remove or'):
            dls = item_dls(files, bs=4, **kw)
            dls = [dl.new(num_workers=min(1, dl.fake_l.num_workers)) for dl in dls.loaders]
            for dl in dls: list(dl)
    for f,_ in files[:20]: f.write_bytes(b'no picture')
    with pytest.raises(ValueError, match='and 11 more cannot be read') as e: item_dls(files)
    assert str(e.value).count('.png')==10
    learn = Learner(tensor_dls(*arrays()), torch.nn.Flatten())   # a fault that is not the files' stays as it is
    with pytest.raises(Exception) as e, learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert 'cannot be read' not in str(e.value)

def test_a_photograph_is_turned_as_the_camera_was_held(tmp_path):
    "Orientation 6: the first row of the file is the right edge of the picture"
    a = np.zeros((16,16,3), 'uint8')
    a[:4] = 255
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(a).save(tmp_path/'held.png', exif=exif)
    x = to_pixels(tmp_path/'held.png')
    assert (x[...,-4:]==1).all() and (x[...,:-4]==0).all()

def test_decompression_bomb(tmp_path, monkeypatch):
    files = write(tmp_path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)   # the files have 256
    with pytest.raises(ValueError, match=r'000.png \(too many pixels\).*cannot be read'): item_dls(files)

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

# ---------------------------------------------------------------- on the device

def test_images_on_the_device_are_the_same(tmp_path):
    "On a GPU the batches are cut there; here the device is the CPU, and every number must be as without"
    files = write(tmp_path)
    def batches(in_memory):
        torch.manual_seed(0); random.seed(0)
        dls = item_dls(files, bs=8, augment=True, in_memory=in_memory)
        return [t for _ in range(2) for b in dls.train for t in b]+list(split_tensors(dls))
    for a,b in zip(batches(True), batches('device')): assert torch.equal(a,b) and type(a) is type(b)

def test_what_is_kept_follows_the_device():
    dls = tensor_dls(*arrays(), in_memory='device')
    dls.valid.everything()
    dls.to(torch.device('meta'))   # a device without numbers: only where things are can be asked
    x,y = next(iter(dls.valid))
    assert x.device.type==y.device.type=='meta' and dls.valid.everything()[0].device.type=='meta'
    dls = tensor_dls(*arrays(), in_memory=True)
    dls.to(torch.device('meta'))
    assert dls.valid.everything()[0].device.type=='cpu'

# ---------------------------------------------------------------- augmentation

def test_crop_flip_chooses_rows_and_columns():
    x = TensorImage(torch.rand(1,2,6,9)).repeat(200,1,1,1)
    p = torch.nn.functional.pad(x[:1].as_subclass(torch.Tensor), [2]*4, mode='reflect')[0]
    could = [c for i in range(5) for j in range(5) for c in (p[:,i:i+6,j:j+9], p[:,i:i+6,j:j+9].flip(-1))]
    out = CropFlip(2)(x, split_idx=0).as_subclass(torch.Tensor)
    seen = [next(k for k,c in enumerate(could) if torch.equal(c,o)) for o in out]
    assert len(set(seen))>35 and .3<np.mean([k%2 for k in seen])<.7
    out = CropFlip(2, flip=False)(x, split_idx=0).as_subclass(torch.Tensor)
    seen = [next(k for k,c in enumerate(could) if torch.equal(c,o)) for o in out]
    assert all(k%2==0 for k in seen)

def test_crop_flip_is_for_training_and_reproducible():
    x = TensorImage(torch.rand(4,3,8,8))
    draw = lambda: (torch.manual_seed(1), CropFlip()(x, split_idx=0))[1]
    assert torch.equal(CropFlip()(x, split_idx=1), x) and torch.equal(draw(), draw())
    assert CropFlip()(x.half(), split_idx=0).dtype==torch.half

def test_evaluation_never_augments(tmp_path):
    dls = item_dls(write(tmp_path), bs=4, augment=True)
    a,b = split_tensors(dls, 'train'),split_tensors(dls, 'train')
    assert torch.equal(a[0],b[0]) and not torch.equal(next(iter(dls.train))[0].sort(0)[0], next(iter(dls.train))[0].sort(0)[0])
    stored = dls.train.everything()[0].as_subclass(torch.Tensor)/255
    assert torch.allclose(a[0], stored)

# ---------------------------------------------------------------- back to pixels

def test_stats_are_found_and_undone(tmp_path):
    write(tmp_path)
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
        for o in (x[0], x[0,0].numpy(), Image.fromarray((x[0,0]*255).byte().numpy())):
            assert loaded.predict(o)[:2]==(str(want), torch.tensor(want))
        p,_ = loaded.get_preds(dl=loaded.dls.test_dl(list(x)))
        assert torch.allclose(p, loaded.model(x).softmax(1), atol=1e-5)

def test_predict_from_files(tmp_path):
    dls = item_dls(write(tmp_path/'c'), bs=8, augment=True)
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
