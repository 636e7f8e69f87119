"""Change the library in one place at a time, and see whether the tests notice. Works on a copy; pytest never runs it.

    python tests/mutate.py labels ratio                      # 20 mutants each, always the same; a table at the end
    python tests/mutate.py aom -n 50 --seed 3 --only 4,17    # two of fifty others again, after a new test"""
import argparse, ast, difflib, math, os, random, shutil, signal, sys, tempfile, time
from functools import partial
from itertools import accumulate
from pathlib import Path
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
sys.dont_write_bytecode = True   # a stale one would hide a mutant
import pytest, fastai.vision.all, hypothesis, pyautoattack, scipy.stats, sklearn.datasets, torch   # not advmix: each fork imports its own

ALSO = dict(attack='aom', aom='attack', iat='attack', ratio='aom', labels='aom', mix='zoo', minmax='objectives', autoattack='evaluate')
COMPARE = {ast.Lt:(ast.LtE,ast.Gt), ast.LtE:(ast.Lt,), ast.Gt:(ast.GtE,ast.Lt), ast.GtE:(ast.Gt,), ast.Eq:(ast.NotEq,), ast.NotEq:(ast.Eq,),
           ast.Is:(ast.IsNot,), ast.IsNot:(ast.Is,), ast.In:(ast.NotIn,), ast.NotIn:(ast.In,)}
BINARY  = {ast.Add:ast.Sub, ast.Sub:ast.Add, ast.Mult:ast.Div, ast.Div:ast.Mult, ast.FloorDiv:ast.Mult, ast.Mod:ast.Add, ast.Pow:ast.Mult,
           ast.BitAnd:ast.BitOr, ast.BitOr:ast.BitAnd}
PAIRS   = 'min max, clamp_min clamp_max, any all, sum mean, minimum maximum, rand randn, rand_like randn_like, ones zeros, ' \
          'new_ones new_zeros, zeros_like ones_like, argmax argmin'
NAMES   = {a:b for p in PAIRS.split(', ') for a,b in (p.split(), p.split()[::-1])}
NO_OPS  = 'detach clone abs square sqrt log sign float double long expand_as requires_grad_ contiguous cpu nan_to_num'.split()
SKIP    = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)

def variants(n, src):
    "What could stand in place of an expression or statement: texts"
    def text(n): return f'({ast.get_source_segment(src, n)})'
    def other(**kw): return f'({ast.unparse(type(n)(**(vars(n) | kw)))})'
    if isinstance(n, ast.Compare):
        yield from (other(ops=n.ops[:i]+[new()]+n.ops[i+1:]) for i,o in enumerate(n.ops) for new in COMPARE[type(o)])
    elif isinstance(n, ast.BinOp) and type(n.op) in BINARY:
        ends = text(n.left),text(n.right)
        if isinstance(n.op, ast.BitOr) and 'dict' in ''.join(ends): yield from ends   # a union of dicts
        elif not isinstance(getattr(n.left, 'value', 0), str): yield other(op=BINARY[type(n.op)]())
    elif isinstance(n, ast.UnaryOp): yield text(n.operand)
    elif isinstance(n, ast.BoolOp):
        yield from (other(op=ast.Or() if isinstance(n.op, ast.And) else ast.And()), text(n.values[0]))
        yield other(values=n.values[1:]) if len(n.values)>2 else text(n.values[1])
    elif isinstance(n, ast.IfExp): yield from (text(n.body), text(n.orelse))
    elif isinstance(n, ast.Constant):
        if isinstance(v := n.value, bool): yield repr(not v)
        elif isinstance(v, float): yield from map(repr, [v+1, v/2, 0.] if v>1e-3 else [1000*v, 0.] if v else [1.])
        elif isinstance(v, int): yield from {0:['1'], 1:['0']}.get(v, [repr(v+1), repr(v-1)])   # a dimension too many dies by itself
    elif isinstance(n, ast.Call):
        f,method = n.func,getattr(n.func, 'attr', '')
        for i in range(len(n.keywords)): yield other(keywords=n.keywords[:i]+n.keywords[i+1:])
        if method in NO_OPS: yield text(f.value)
        if method in NAMES: yield other(func=ast.Attribute(f.value, NAMES[method], ast.Load()))
        if method in ('copy','deepcopy') and len(n.args)==1: yield text(n.args[0])
        if getattr(f, 'id', '') in ('min','max','any','all'): yield other(func=ast.Name(NAMES[f.id], ast.Load()))
    elif isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple) and len(n.value.elts)==2:
        yield 'return '+','.join(map(text, n.value.elts[::-1]))
    elif isinstance(n, (ast.Expr, ast.AugAssign)) or isinstance(n, ast.If) and not n.orelse: yield 'pass'
    elif isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute): yield 'pass'
    elif isinstance(n, ast.withitem) and not n.optional_vars: yield 'nullcontext()'

def sites(n, src, within=None):
    "Every place `(node, texts)` below a node; not docstrings, annotations, messages, imports, `__all__`, `__repr__`"
    if isinstance(n, SKIP) or getattr(n, 'name', '')=='__repr__' or isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant): return
    if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') in ('__all__','_all_'): return
    signed = isinstance(within, ast.UnaryOp) and isinstance(n, ast.Constant)   # -1 becomes 1, not -0
    if not signed and (texts := list(variants(n, src))): yield getattr(n, 'context_expr', n),texts
    skip = dict(FunctionDef=('returns','decorator_list'), ClassDef=('decorator_list',), arg=('annotation',), AnnAssign=('annotation',))
    parts = [v if isinstance(v, list) else [v] for k,v in ast.iter_fields(n) if k not in skip.get(type(n).__name__, ())]
    for c in sum(parts, []):
        if isinstance(c, ast.AST): yield from sites(c, src, n)

def mutants(path, n, seed):
    "Sources with one change each, drawn evenly from the places"
    raw = (src := path.read_text()).encode()   # positions are in bytes
    starts = [0, *accumulate(map(len, raw.splitlines(True)))]
    rng,every = random.Random(seed),list(sites(ast.parse(src), src))
    for node,texts in rng.sample(every, min(n, len(every))):
        a,b = starts[node.lineno-1]+node.col_offset,starts[node.end_lineno-1]+node.end_col_offset
        new = (raw[:a]+rng.choice(texts).encode()+raw[b:]).decode()
        if new.count('nullcontext')==1: new = new.replace('\nimport ', '\nfrom contextlib import nullcontext\nimport ', 1)
        yield src,new,''.join(difflib.unified_diff(src.splitlines(True), new.splitlines(True), path.name, path.name, n=0))

def tests(root, files, limit=math.inf):
    "Did they pass, how long did it take, and which failed; in a fork, which has torch and fastai already"
    start,out = time.monotonic(),tempfile.TemporaryFile('w+')
    if not (pid := os.fork()):
        try:
            os.setsid(), os.chdir(root), sys.path.insert(0, str(root)), os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            assert Path(__import__('advmix').__file__).parents[1]==root, 'this is the installed package, not the copy'
            rc = pytest.main(['-x', '-q', '--tb=no', '-p', 'no:cacheprovider', *files])
            sys.stdout.flush()
        finally: os._exit(locals().get('rc', 9))
    while not (status := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic()>start+limit: os.killpg(pid, signal.SIGKILL)
        time.sleep(.05)
    out.seek(0)
    lines = out.read().splitlines() or ['']
    last = [l.split(' - ')[0] for l in lines if l.startswith(('FAILED','ERROR'))] or lines[-1:]
    return status[1]==0,time.monotonic()-start,'out of time' if os.WIFSIGNALED(status[1]) else last[0]

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name,kw in {'modules':dict(nargs='+'), '-n':dict(type=int, default=20), '--seed':dict(type=int, default=0), '--only':{},
                    '--log':dict(type=argparse.FileType('a'))}.items(): a.add_argument(name, **kw)
    a,here = a.parse_args(),Path(__file__).resolve().parents[1]
    say = partial(print, flush=True, file=a.log)
    with tempfile.TemporaryDirectory() as tmp:
        root,table = Path(tmp).resolve()/'copy',[]
        shutil.copytree(here, root, ignore=shutil.ignore_patterns('.*', '__pycache__'))
        for m in a.modules:
            path,files = root/'advmix'/f'{m}.py',[f'tests/test_{f}.py' for f in (m, ALSO.get(m)) if f]
            good,took,last = tests(root, files)
            if not good: sys.exit(f'{m}: the tests fail without a change: {last}')
            alive,total = [],0
            for k,(src,new,diff) in enumerate(mutants(path, a.n, a.seed)):
                if a.only and str(k) not in a.only.split(','): continue
                path.write_text(new)
                good,_,last = tests(root, files, 4*took+60)
                path.write_text(src)
                alive,total = alive+[str(k)]*good,total+1
                say(f'## {m} {k}: {"SURVIVED" if good else "killed"} ({last})\n{diff}')
            table.append(f'{m}: {total-len(alive)} of {total} killed, alive: {", ".join(alive) or "none"}')
    say('\n'.join(table))

if __name__=='__main__': main()
