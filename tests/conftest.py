"Two processes with two OpenMP threads each slow one another down on two cores, so one thread a process, set before torch is imported"
import os
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
import pytest, torch

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)
