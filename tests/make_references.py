"""Makes tests/references.npz: the published corruptions and PatchDrop, run on one photograph, as small arrays

The corruptions are the released code of ImageNet-C, as packaged on PyPI (imagenet-c 0.0.3, imagenet_c/corruptions.py), with its constants
replaced by those of the other scales where asked. In an environment of its own (OpenCV is no requirement of ours):

    pip download --no-deps --no-binary :all: imagenet-c && tar xzf imagenet_c-0.0.3.tar.gz
    pip install numpy scipy scikit-image opencv-python-headless pillow scikit-learn
    python tests/make_references.py imagenet_c-0.0.3/imagenet_c/corruptions.py tests/references.npz
"""
import re, sys
import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

CIFAR_C = dict(   # constants in place of ImageNet-C's
    gaussian_noise='[.04, .06, .08, .09, .10]', shot_noise='[500, 250, 100, 75, 50]', speckle_noise='[.06, .1, .12, .16, .2]',
    gaussian_blur='[.4, .6, .7, .8, 1]', brightness='[.05, .1, .15, .2, .3]', contrast='[.75, .5, .4, .3, .15]',
    saturate='[(.3,0), (.1,0), (1.5,0), (2,.1), (2.5,.2)]', jpeg_compression='[80, 65, 58, 50, 40]', pixelate='[.95, .9, .85, .75, .65]',
    elastic_transform='[tuple(32*v for v in c) for c in ((0,0,.08), (.05,.2,.07), (.08,.06,.06), (.1,.04,.05), (.1,.03,.03))]')

def released(path, size, constants={}):
    "The functions of the released file, on images of `size` pixels, without ImageMagick and in today's numpy"
    src = open(path).read()
    for line in ('from wand', 'import wand', 'from pkg_resources'): src = re.sub(rf'(?m)^{line}.*$', '', src)
    src = re.sub(r"(?s)# Tell Python about the C method.*?(?=# modification of)", '', src)
    today = {'scipy.ndimage.interpolation':'scipy.ndimage', 'multichannel=True':'channel_axis=-1', 'np.float_':'float'}
    for old,new in today.items(): src = src.replace(old, new)
    src = src.replace('224 * c', f'{size} * c').replace('(224, 224)', f'({size}, {size})')
    for name,c in constants.items():
        src,n = re.subn(rf'(def {name}\(.*?\n(?:(?!def ).*\n)*?\s+c = )\[.*?\](?=\[severity)', lambda m: m[1]+c, src, count=1, flags=re.S)
        assert n==1, name
    space = {}
    exec(src, space)
    return space

def main(path, out):
    photo = Image.fromarray(load_sample_images().images[0])
    res = {}
    small,large = (ImageOps.fit(photo, (s,s)) for s in (32,224))
    for name in CIFAR_C:
        res |= run(released(path, 32, CIFAR_C), small, name, 'cifar')
        if name=='elastic_transform': res |= run(released(path, 224), large, name, 'imagenet')
        else: res |= run(released(path, 32), small, name, 'imagenet')
    rng,ims = np.random.RandomState(0),np.stack([np.asarray(ImageOps.fit(photo, (28,28)))]*2).transpose(0,3,1,2)/255
    mean,std = np.array([.485,.456,.406])[:,None,None],np.array([.229,.224,.225])[:,None,None]
    for ratio in (.1,.5):                                    # one draw for the batch, cut off to a whole number of patches
        dropped = rng.permutation(14*14)[:int(ratio*14*14)]
        for fill in ('black','mean'):
            z = (ims-mean)/std if fill=='mean' else ims.copy()
            z = z.reshape(2,3,14,2,14,2).transpose(0,2,4,1,3,5).reshape(2,196,12)
            z[:,dropped] = 0
            z = z.reshape(2,14,14,3,2,2).transpose(0,3,1,4,2,5).reshape(2,3,28,28)
            res[f'patchdrop_{fill}_{ratio}'] = (z*std+mean if fill=='mean' else z).astype(np.float32)[:1]
        res[f'patchdrop_index_{ratio}'] = dropped.astype(np.uint8)
    np.savez_compressed(out, **res)

def run(f, im, name, scale):
    res,step = [],im.size[0]//16
    for s in range(1,6):
        np.random.seed(s)
        res.append(np.asarray(f[name](im, s), dtype=np.float64)[::step,::step])
    return {f'{scale}_{name}': np.stack(res).round().astype(np.uint8)}

if __name__=='__main__': main(*sys.argv[1:])
