"What the tests share: where the checkout is, and a quiet, repeatable setting"
import os
from pathlib import Path
import pytest
from hypothesis import settings

# Here and in every process that a test starts, and before torch is imported: several files at once with several threads
# each only wait for each other. A test of threads says how many it wants.
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
settings.register_profile('dsb', deadline=None, derandomize=True)
settings.load_profile('dsb')

@pytest.fixture(scope='session')
def root():
    "The checkout"
    return Path(__file__).resolve().parent.parent
