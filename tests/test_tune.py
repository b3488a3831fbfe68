"Freed memory is kept, by the commands and by `dsb.tune()`, in processes of their own: the setting is for a whole process"
import json, os, subprocess, sys
import pytest
from dsb.training.tune import left_alone, libc_name

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_') and k not in ('GLIBC_TUNABLES', 'LD_PRELOAD')}
QUICK = '--data_set digits --model lenet300-100 --epochs 1 --batch_size 64 --n_train 128 --n_test 64 --device cpu'.split()
KEPT = 'freed memory kept'
supported = pytest.mark.skipif(bool(left_alone(CLEAN, sys.platform, libc_name())), reason='malloc is not that of glibc under Linux')

def call(root, *argv, **env):
    "A process in the checkout, with nothing set for malloc but `env`"
    return subprocess.run([sys.executable, *map(str, argv)], cwd=root, env=CLEAN | env, capture_output=True, text=True, timeout=120)

def says(root, code, **env):
    "What a program prints"
    p = call(root, '-c', code, **env)
    assert p.returncode == 0, p.stderr
    return p.stdout.split()

LOOP = '''
import resource, torch, dsb
from dsb.training.tune import tuned
def faults(bytes=32 << 20, times=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times): torch.ones(bytes//4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
'''

@supported
@pytest.mark.parametrize('env', [{}, dict(GLIBC_TUNABLES='glibc.malloc.hugetlb=1'), dict(MALLOC_ARENA_MAX='1')], ids=['plain', 'huge pages', 'one arena'])
def test_faults_fall(env, root):
    was, before, now, first, again, small = says(root, LOOP + 'print(tuned(), faults(), dsb.tune(), faults(), faults(), faults(1 << 20))', **env)
    assert (was, now) == ('False', 'True')
    assert int(again)*4 <= int(before) and int(small)*4 <= int(before)

@supported
def test_variables_do_the_same(root):
    "The two variables that the notebook names"
    env = dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='-1')
    assert says(root, LOOP + 'faults(); print(tuned(), faults() < 80)', **env) == ['True', 'True']

@supported
@pytest.mark.parametrize('env', [dict(MALLOC_MMAP_MAX_='65536'), dict(GLIBC_TUNABLES='glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=131072')])
def test_own_choice_stands(env, root, tmp_path):
    assert says(root, LOOP + 'print(dsb.tune(), tuned(), faults() > 300)', **env) == ['False', 'False', 'True']
    p = call(root, 'main.py', *QUICK, '--out', tmp_path/'r', **env)
    assert p.returncode == 0 and KEPT not in p.stdout, p.stderr

@supported
def test_memory_stays_bounded(root):
    "Pieces of many sizes that come and go in no order: at most twice the memory that is live at once"
    live, grown = map(int, says(root, '''
import random, resource, torch, dsb
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
dsb.tune(); random.seed(0)
live, peak, before = [], 0, rss()
for _ in range(1500):
    live.append(torch.ones(random.randint(1, 20) << 18))
    peak = max(peak, sum(4*o.numel() for o in live))
    if len(live) > 12: live.pop(random.randrange(len(live)))
print(peak, rss() - before)
'''))
    assert grown <= 2*live

@supported
def test_memory_can_be_given_back(root):
    before, kept, after = map(int, says(root, '''
import ctypes, torch, dsb
rss = lambda: int(open('/proc/self/statm').read().split()[1])
dsb.tune(); a = rss()
torch.ones(1 << 26); b = rss()
ctypes.CDLL(None).malloc_trim(0)
print(a, b, rss())
'''))
    assert kept - before > 60000 and after - before < 6000   # in pages; 65536 are 256 MB

def test_needs_no_torch(root):
    alone = "import sys, types; m = types.ModuleType('dsb'); m.__path__ = ['dsb']; sys.modules['dsb'] = m; from dsb.training.tune import tune; tune(); assert 'torch' not in sys.modules"
    assert says(root, alone) == []

# The commands

@pytest.fixture(scope='module')
def runs(root, tmp_path_factory):
    "The same run with and without: (process, folder)"
    d = tmp_path_factory.mktemp('runs')
    return {name: (call(root, 'main.py', *QUICK, '--block_size', '16', '--T', '1', *more, '--out', d/name), d/name) for name, more in (('kept', []), ('plain', ['--no_tune']))}

@supported
def test_headline(runs):
    for name, (p, _) in runs.items():
        assert p.returncode == 0 and p.stderr == '' and (KEPT in p.stdout) == (name == 'kept')

def test_same_result(runs):
    "Where memory comes from decides nothing else, and is no part of a run's configuration"
    rows = [json.loads((out/'metrics.jsonl').read_text()) for _, out in runs.values()]
    for r in rows: r.pop('step_ms')
    configs = [json.loads((out/'config.json').read_text()) for _, out in runs.values()]
    assert rows[0] == rows[1] and configs[0] == configs[1]

def test_resume(root, runs):
    "A run that was begun without goes on with, and the other way round"
    for (_, out), more in zip(runs.values(), (['--no_tune'], [])):
        p = call(root, '-m', 'dsb.cli', 'train', '--resume', out, *more)
        assert p.returncode == 0 and 'is complete' in p.stdout, p.stderr

@pytest.mark.parametrize('more', [[], ['--no-tune']])
def test_error(more, root, tmp_path):
    p = call(root, 'train_imagenet.py', *QUICK, '--model', 'lenet6', *more, '--out', tmp_path/'r')
    assert p.returncode == 2 and p.stdout == '' and p.stderr.startswith('dsb: error: ') and p.stderr.count('\n') == 1
