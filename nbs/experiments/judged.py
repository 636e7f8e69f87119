"What the judgements of `adversarial.py` say: which images stand, and by how much two trainings differ"
import numpy as np, pandas as pd
from advmix.intervals import bootstrap

def frame(rows):
    "`judged` or `valid` as a table; `row` is clean, pgd20, APGD (CE and T, no other attack) or autoattack"
    d = pd.DataFrame(rows)
    return d.assign(row=d['name'].replace('autoattack (apgd-ce, apgd-t only)', 'APGD'))

def stands(judged, arm):
    "Seed -> which images its network keeps under APGD, `(n,)`"
    r = judged[(judged.arm==arm)&(judged.row=='APGD')].sort_values('seed')
    return {s: np.array([c=='1' for c in k], float) for s,k in zip(r.seed, r.stands)}

def difference(a, b, *sets):
    "`a` less `b` in points over the images of all `sets`: mean, 95 % bootstrap interval over images, seeds"
    p,q  = ([stands(j, arm) for j in sets] for arm in (a,b))
    both = sorted(set.intersection(*map(set, (*p, *q))))
    d    = 100*np.array([np.concatenate([v[s]-w[s] for v,w in zip(p, q)]) for s in both])
    mean,low,high = bootstrap(d.mean(0), ends=None)
    return dict(mean=mean, low=low, high=high) | {f'seed {s}': v for s,v in zip(both, d.mean(1))}
