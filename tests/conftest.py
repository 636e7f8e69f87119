"Two processes with two OpenMP threads each slow one another down on two cores, so one thread a process, set before torch is imported"
import os
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
import pytest, torch
from fastai.torch_core import set_seed

torch.set_num_threads(1)

def pytest_addoption(parser):
    parser.addoption('--seed', type=int, default=0, help='another seed before each test: what fails with some was luck')

def pytest_configure(config): set_seed(config.getoption('--seed'))

@pytest.fixture(autouse=True)
def seed(request):
    "torch, NumPy and Python's random, which fastai's DataLoader shuffles by"
    set_seed(request.config.getoption('--seed'))

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
