"""What a sweep of `advmix_compare --ema` left, its averages measured further, in one file

    python learned.py RUNS results/cifar_learned.json

Adds for each average: FGSM and PGD-20 at a quarter of the published radius, where networks that were not trained against
attacks still differ, and accuracy with a tenth to nine tenths of the patches missing. What was measured is kept in the
folder of its run and not measured again; a run that isn't finished is left out."""
import argparse, json
from pathlib import Path
import torch
from advmix.attack import Threat
from advmix.data import split_tensors
from advmix.evaluate import attacked
from advmix.files import get_dls
from advmix.folder import Run
from advmix.occlusion import occlusion_rows

SMALL  = 2/255
RATIOS = .1,.3,.5,.7,.9
NAMES  = dict(clean='clean', fgsm='fgsm', mean='corruption')   # accuracies that are kept, by the first word of a row

def further(run, n):
    "Weak attacks on the first `n` test images, and the occlusion curve on all of them"
    file = run.folder/'further.json'
    if not file.exists():
        c,net = run.config,run.model(ema=True)
        x,y   = split_tensors(get_dls(c.data, bs=c.bs, seed=c.seed, size=c.size), 'test')
        weak  = {k: attacked(net, x[:n], y[:n], Threat(SMALL, steps=s, step=t, random_start=r)).accuracy
                 for k,s,t,r in (('fgsm',1,SMALL,False), ('pgd20',20,SMALL/4,True))}
        curve = [r['accuracy'] for r in occlusion_rows(net, x, y, RATIOS, 'mean')]
        Run.write_file(file, json.dumps(dict(eps=SMALL, n=len(x[:n]), **weak, ratios=RATIOS, occlusion=curve)))
        print(run.folder.name, 'measured', flush=True)
    return json.loads(file.read_text())

def measured(run, average):
    "What the report says of the student or of the average"
    res = {}
    for r in run.report.rows:
        if r['name'].endswith('_ema')!=average: continue
        word = r['name'].split()[0].removesuffix('_ema')
        if word in NAMES:       res[NAMES[word]] = r['accuracy']
        if word=='clean':       res |= dict(stands=r['stands'])                     # image by image: 1 is right
        if word=='mean':        res |= dict(corrupted=r['per_image'], of=r['of'])   # in how many of so many it is right
        if word=='calibration': res |= dict(ece=r['ece'], ece_floor=r['ece_floor'])
    return res

def of_run(folder, n):
    run = Run(folder)
    c,h = run.config,run.history
    spec = folder.name.removesuffix(f'-{c.seed}').replace(',', ':')
    return dict(spec=spec, seed=c.seed, settings=vars(c), student=measured(run, False), average=measured(run, True),
                further=further(run, n), masks={k: h[k].round(4).tolist() for k in ('mask_entropy','slope') if k in h},
                train_loss=h.train_loss.round(3).tolist(), valid={k: h[k].round(4).tolist() for k in ('accuracy','accuracy_ema')},
                environment=run.report.environment)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', type=Path, help='what advmix_compare calls --out')
    p.add_argument('to', type=Path, help='the file to write')
    p.add_argument('--n_attack', type=int, default=500, help='test images to attack')
    a = p.parse_args()
    torch.set_num_threads(1)
    runs = [of_run(f.parent, a.n_attack) for f in sorted(a.runs.glob('*/report.json'))]
    Run.write_file(a.to, json.dumps(runs))
    print(len(runs), 'runs in', a.to)
