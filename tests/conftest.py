"What the tests share: where the checkout is, and a quiet, repeatable setting"
import os
from pathlib import Path
import pytest
from hypothesis import settings

os.environ.setdefault('MPLBACKEND', 'agg')
settings.register_profile('dsb', deadline=None, derandomize=True)
settings.load_profile('dsb')

@pytest.fixture(scope='session')
def root():
    "The checkout"
    return Path(__file__).resolve().parent.parent

LONG = 'notebooks', 'hostile', 'cpu_kernels', 'processes', 'faults', 'site', 'cli', 'topology', 'updates'

def pytest_collection_modifyitems(items):
    "Files that take long come first, so that at the end no process is left alone with one of them"
    def place(o):
        name = o.path.stem.removeprefix('test_')
        return LONG.index(name) if name in LONG else len(LONG)
    items.sort(key=place)
