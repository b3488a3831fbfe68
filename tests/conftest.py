"What the tests share: where the checkout is, and a quiet, repeatable setting"
import os
from pathlib import Path
import pytest
from hypothesis import settings

os.environ.setdefault('MPLBACKEND', 'agg')
# Before torch is imported: several files at once with several threads each only wait for each other. A test of threads
# says how many it wants.
os.environ.setdefault('OMP_NUM_THREADS', '1')
settings.register_profile('dsb', deadline=None, derandomize=True)
settings.load_profile('dsb')

@pytest.fixture(scope='session')
def root():
    "The checkout"
    return Path(__file__).resolve().parent.parent
