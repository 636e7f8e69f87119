"Killed at any moment and started again: the same weights to the last bit, the same history, the same report; `kill_many.py` kills more"
import random, sys
import pytest
if sys.platform!='linux': pytest.skip('kills forked processes', allow_module_level=True)
from kill_many import Case, VARIANTS

@pytest.mark.parametrize('variant', VARIANTS)
def test_killed_at_random(variant, tmp_path):
    case = Case(variant, tmp_path)
    assert 'checkpoint.pth' not in case.want['files'] and case.want['nets'] and case.want['report']['rows']
    died,diff = case.at_random(random.Random(variant), times=2)
    assert not diff

def test_killed_at_every_moment_of_writing(tmp_path):
    "Each file before, in the middle of and after it is written, renamed or deleted"
    case  = Case('mixup', tmp_path, suite='clean,autoattack', n_eval=3, epochs=1)
    files = {m.split()[2] for m in case.moments}
    written = {'config.json','checkpoint.pth','history.csv','model.safetensors','report.png','history.png','report.json','autoattack.pth'}
    assert written<={f.removesuffix('.tmp') for f in files}
    some  = [m for m in case.moments if m.endswith('#1') and (m.startswith('torn') or ' replace ' in m or ' unlink ' in m)]
    wrong = {m: res for m in some if (res := case.at_moment(m))!=(True, [])}
    assert not wrong
