"Execute notebooks as nbdev_test does, and write the outputs back: python tests/run_notebooks.py [--slow] [NOTEBOOK ...]"
import os, sys
os.environ |= dict(IN_TEST='1', OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))   # before torch is imported
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.processors import FrontmatterProc
from nbdev.process import NBProcessor
from fastcore.xtras import working_directory

root = Path(__file__).resolve().parents[1]

def skipped(cell):
    "What nbdev_test skips: prose, `eval: false`, slow and cuda cells, and the export at the end"
    flags = getattr(cell, 'directives_', None) or {}
    return (cell.cell_type!='code' or 'nbdev_export(' in cell.source
            or flags.get('eval:', [''])[0].lower()=='false' or 'cuda' in flags
            or ('slow' in flags and '--slow' not in sys.argv))

def run(path):
    "Execute one notebook in its own folder, stop at the first exception, write the outputs back"
    path = Path(path).resolve()
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    shell = CaptureShell(path, mpl_format='png')
    sys.path.insert(0, str(root))
    with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=skipped)
    source = read_nb(path)   # NBProcessor takes the directives out of the cells
    for c,d in zip(source.cells, nb.cells):
        if c.cell_type!='code' or skipped(d): continue
        c.outputs = [o for o in d.get('outputs', []) if o.get('name')!='stderr']   # warnings carry local paths
    write_nb(source, path)

if __name__=='__main__':
    everything = sorted(p for p in (root/'nbs').rglob('[!_.]*.ipynb') if not (p.parent/'.notest').exists())
    for p in [a for a in sys.argv[1:] if a!='--slow'] or everything:
        print(p, flush=True)
        run(p)
