"Images in files: folders, CIFAR, archives of arrays, by name, and the classes that a network knows"
import io, tarfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
import advmix.files
from advmix.data import *
from advmix.files import *

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

# ---------------------------------------------------------------- folders

def files(dls, i): return [Path(o.image) for o in dls[i].dataset.items]
def names(dls, i): return {f'{p.parent.name}/{p.name}' for p in files(dls, i)}

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
        if any(o.startswith(s) for o in subs):
            assert all(p.relative_to(tmp_path).parts[0].startswith(s) for p in files(dls, i))

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
    assert a.train.fake_l.num_workers==0 and not b.train._kept
    b.loaders = [dl.new(num_workers=0) for dl in b.loaders]
    assert torch.equal(split_tensors(a)[0], split_tensors(b)[0]) and a[2]._kept and not b[2]._kept

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
    with pytest.raises(ValueError, match=r'red/000.png \(UnidentifiedImageError\) cannot be read as images: remove or replace'):
        for dl in dls.loaders: list(dl)

def test_test_folder_with_a_class_of_its_own(tmp_path):
    colours(tmp_path, sub='train'); colours(tmp_path, sub='test', names=('blue','purple'))
    with pytest.raises(ValueError, match=r"\['purple'\] are not among those the training images have"): folder_dls(tmp_path)
    colours(tmp_path/'b', sub='train'); (tmp_path/'b'/'test').mkdir()
    Image.new('RGB', (4,4)).save(tmp_path/'b'/'test'/'0.png')   # unlabelled
    with pytest.raises(ValueError, match=r"classes \['test'\]"): folder_dls(tmp_path/'b')

# ---------------------------------------------------------------- the classes a network knows

def right(net_vocab, dls, monkeypatch=None):
    "Accuracy of an oracle that looks at the colour and numbers the classes as `net_vocab` does"
    x,y = split_tensors(dls)
    known = [net_vocab.index(n) if n in net_vocab else -1 for n in ('red','green','blue')]   # channel 0, 1, 2
    return (torch.tensor(known)[x.mean((2,3)).argmax(1)]==y).float().mean().item()

vocab = ['red','blue','ant','green']

def test_labels_follow_the_network(tmp_path):
    colours(tmp_path/'all')
    dls = get_dls(tmp_path/'all', vocab=vocab)
    assert list(dls.vocab)==vocab and right(vocab, dls)==1
    assert right(vocab, get_dls(tmp_path/'all'))<.5   # the folder's own numbers are wrong for this network

def test_absent_classes_are_fine(tmp_path):
    colours(tmp_path/'two', names=('blue','green'))   # as a third name they would be colour 0 and 1 of this folder
    colours(tmp_path/'one', names=('blue',))
    for d in ('two','one'): assert get_dls(tmp_path/d, vocab=vocab).c==4
    x,y = split_tensors(get_dls(tmp_path/'one', vocab=vocab))
    assert set(y.tolist())=={1}

@pytest.mark.parametrize('names,strange', [
    (('blue','green','rouge'),               "['rouge']"),
    (('blue','green','red','white','black'), "['black', 'white']")])
def test_renamed_and_additional_classes_are_refused_by_name(tmp_path, names, strange):
    colours(tmp_path, names=names)
    with pytest.raises(ValueError) as e: get_dls(tmp_path, vocab=vocab)
    assert f'classes {strange} are not among those the network knows, {vocab}: rename or remove' in str(e.value)

@pytest.mark.parametrize('n', [2,37])
def test_few_and_many_classes(tmp_path, n):
    names = [f'c{i:02}' for i in range(n)]
    for i,name in enumerate(names):
        (tmp_path/name).mkdir()
        for k in range(6): Image.new('L', (8,8), i*6).save(tmp_path/name/f'{k}.png')
    order = names[::-1]
    x,y = split_tensors(get_dls(tmp_path, vocab=order))
    assert (y==n-1-(x.mean((1,2,3))*255/6).round()).all() and len(y.unique())==n

def test_digits_and_arrays_know_names_too(tmp_path):
    a,b = get_dls('digits'),get_dls('digits', vocab=[str(i) for i in range(9,-1,-1)])
    assert torch.equal(split_tensors(a)[1], 9-split_tensors(b)[1])
    x,y = np.random.rand(40,3,8,8),np.arange(40)%4
    np.savez(tmp_path/'a.npz', x_train=x, y_train=y, x_test=x, y_test=y, vocab=list('abcd'))
    assert split_tensors(get_dls(tmp_path/'a.npz', vocab=list('dxcba')))[1].tolist()==[[4,3,2,0][i] for i in y]
    with pytest.raises(ValueError, match=r"classes \['d'\]"): get_dls(tmp_path/'a.npz', vocab=list('abc'))

@pytest.mark.parametrize('data', ['digits','folder','npz'])
def test_on_the_device_by_name(tmp_path, data):
    colours(tmp_path/'folder')
    np.savez(tmp_path/'a.npz', x_train=np.random.rand(40,3,8,8), y_train=np.arange(40)%4)
    path = dict(digits='digits', folder=tmp_path/'folder', npz=tmp_path/'a.npz')[data]
    a,b = (split_tensors(get_dls(path, in_memory=m)) for m in (True,'device'))
    assert torch.equal(a[0],b[0]) and torch.equal(a[1],b[1])

# ---------------------------------------------------------------- by name

def test_cifar_layouts(tmp_path, monkeypatch):
    for s in ('train','test'):
        colours(tmp_path/'c10', sub=s)
        colours(tmp_path/'c100', sub=f'{s}/primary')   # CIFAR-100 has a super class in between
    got = []
    def untar(url): got.append(url); return tmp_path/('c100' if '100' in url else 'c10')
    monkeypatch.setattr(advmix.files, 'untar_data', untar)
    for name in ('cifar10','cifar100'):
        dls = get_dls(name, bs=4, n_train=9)
        assert list(dls.vocab)==['blue','green','red'] and [len(dl.dataset) for dl in dls.loaders]==[9,4,36]
        assert dls.one_batch()[0].shape[-2:]==(32,32)
    assert len(set(got))==2

def test_cifar_out_of_reach(monkeypatch):
    def offline(url): raise OSError('no network')
    monkeypatch.setattr(advmix.files, 'untar_data', offline)
    with pytest.raises(ValueError, match='cifar10 is neither in the cache of fastai nor within reach.*an unpacked copy'): get_dls('cifar10')

def test_archives_are_unpacked_by_the_data_filter(tmp_path, monkeypatch):
    "An archive that climbs out of its folder: fastai unpacks with whatever filter is set, so ours must be, and gone afterwards"
    evil = tmp_path/'evil.tgz'
    with tarfile.open(evil, 'w:gz') as t: t.addfile(tarfile.TarInfo('../climbed.txt'), io.BytesIO())
    def untar(url): tarfile.open(evil).extractall(tmp_path/'cache')
    monkeypatch.setattr(advmix.files, 'untar_data', untar)
    before = vars(tarfile.TarFile).get('extraction_filter')
    with pytest.raises(Exception, match='outside|climbed'): get_dls('cifar10')
    assert not (tmp_path/'climbed.txt').exists() and vars(tarfile.TarFile).get('extraction_filter') is before

def test_get_dls(tmp_path):
    colours(tmp_path/'f')
    x,y = np.random.rand(40,3,8,8).astype('float32'),np.arange(40)%4
    np.savez(tmp_path/'a.npz', x_train=x, y_train=y, vocab=list('abcd'))
    assert get_dls().c==10 and get_dls('digits', size=16).one_batch()[0].shape[-1]==16
    assert get_dls(str(tmp_path/'f'), bs=4).c==3 and get_dls(tmp_path/'f', bs=4, size=8).one_batch()[0].shape[-1]==8
    assert list(get_dls(tmp_path/'a.npz').vocab)==list('abcd')
    for bad in ('mnist', tmp_path/'nowhere', tmp_path/'f'/'red'/'000.png'):
        with pytest.raises(ValueError, match='use digits, cifar10, cifar100, a folder'): get_dls(bad)
    with pytest.raises(ValueError, match='leave size out'): get_dls(tmp_path/'a.npz', size=4)

@pytest.mark.parametrize('arrays,says', [
    (dict(x=np.zeros((4,3,8,8)), y_train=np.arange(4)), 'it needs x_train and y_train'),
    (dict(x_train=np.zeros((4,3,8,8)), y_train=np.arange(4), extra=np.zeros(1)), 'it needs x_train and y_train, and may have x_valid'),
    (dict(x_train=np.zeros((4,3,8,8)), y_train=np.array([print]*4, dtype=object)), 'without objects'),
])
def test_foreign_npz(tmp_path, arrays, says):
    np.savez(tmp_path/'b.npz', **arrays)
    with pytest.raises(ValueError, match=says): get_dls(tmp_path/'b.npz')

def test_broken_npz(tmp_path):
    for i,b in enumerate((b'', b'PK nothing', b'text')):
        (tmp_path/f'{i}.npz').write_bytes(b)
        with pytest.raises(ValueError, match=f'{i}.npz cannot be read'): get_dls(tmp_path/f'{i}.npz')
