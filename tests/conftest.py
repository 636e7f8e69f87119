"Two processes with two OpenMP threads each slow one another down on two cores, so one thread a process, set before torch is imported"
import os
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
import pytest, torch

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture(scope='module')
def tiles():
    "48 pieces of two photographs, 32 pixels a side"
    from advmix.data import photos
    cut = lambda p: p.unfold(1,32,32).unfold(2,32,32).permute(1,2,0,3,4).reshape(-1,3,32,32)[::3]
    return torch.cat([cut(p) for p in photos(288, 2)])[:48]

@pytest.fixture(scope='module')
def digits():
    "60 test images and their labels"
    from advmix.data import digits_dls, split_tensors
    return split_tensors(digits_dls(), n=60)
