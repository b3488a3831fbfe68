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

# All of it in one call

def test_speed_up_in_a_fresh_process(root):
    "Memory is kept from then on, threads stay, a second call changes nothing"
    code = '''
import torch, dsb
from dsb.training.tune import tuned
torch.set_num_threads(1)
m = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
was = tuned()
assert dsb.speed_up(m) is m
kind, hooks = type(m), len(m._forward_pre_hooks)
assert dsb.speed_up(m) is m and type(m) is kind and len(m._forward_pre_hooks) == hooks == 1
print(was, tuned(), torch.get_num_threads())
'''
    kept = 'False' if left_alone(CLEAN, sys.platform, libc_name()) else 'True'
    assert says(root, code) == ['False', kept, '1']

def resnet(sparsity, fast):
    "A sparse ResNet-18; above .95 its first convolution is sparse too"
    import dsb, torch, torchvision
    torch.manual_seed(0)
    model = dsb.sparsify(torchvision.models.resnet18(num_classes=10), sparsity)
    return dsb.speed_up(model) if fast else model

@pytest.mark.parametrize('sparsity', [.9, .97])
def test_speed_up_computes_the_same(sparsity):
    "Loss, gradients and running statistics of a step, up to the order of sums"
    import torch
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    plain, fast = resnet(sparsity, False), resnet(sparsity, True)
    assert list(plain.state_dict()) == list(fast.state_dict())
    losses = [torch.nn.functional.cross_entropy(m(x), y) for m in (plain, fast)]
    for o in losses: o.backward()
    assert torch.allclose(*losses, rtol=1e-4)
    for a, b in zip(plain.parameters(), fast.parameters()):
        assert (a.grad - b.grad).norm() <= 2e-3*(a.grad.norm() + 1e-3)
    for a, b in zip(plain.buffers(), fast.buffers()): assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4)

def test_speed_up_goes_along(tmp_path):
    "A copy, a file and the way back to dense compute the same"
    import copy, dsb, torch
    model, x = resnet(.97, True).eval(), torch.randn(2, 3, 32, 32)
    torch.save(model, tmp_path/'m.pt')
    with torch.no_grad():
        y = model(x)
        for o in (copy.deepcopy(model), torch.load(tmp_path/'m.pt', weights_only=False), dsb.densify(model)):
            assert torch.allclose(o(x), y, atol=1e-4)
        assert torch.allclose(dsb.unfuse(model)(x), y, atol=1e-4)

@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason='no GPU')
def test_speed_up_on_a_gpu():
    import dsb, torch
    model, before = resnet(.9, False).cuda(), type(resnet(.9, False))
    assert dsb.speed_up(model) is model and type(model) is before and not model._forward_pre_hooks
    moved = resnet(.9, True).cuda().eval()
    x = torch.randn(2, 3, 64, 64, device='cuda')
    assert torch.allclose(moved(x), model.eval()(x), atol=1e-3)

@pytest.mark.parametrize('half', [False, True])
def test_speed_up_with_a_batch(half, capsys):
    "Whatever wins when it is measured for real, outputs and statistics stay, and nothing is measured twice"
    import torch
    from unittest import mock
    import dsb.training.tune as tune
    x = torch.randn(3, 3, 32, 32)
    model, plain = resnet(.8, True), resnet(.8, True)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        assert tune.speed_up(model, x) is model and model.training
        assert capsys.readouterr().err.startswith('dsb: measured ')
        before = [b.clone() for b in model.buffers()]
        assert all(torch.equal(a, b) for a, b in zip(before, plain.buffers()))
        with mock.patch.object(tune, '_step_of', side_effect=AssertionError('measured again')): tune.speed_up(model, x)
        with torch.no_grad(): a, b = model.eval()(x).float(), plain.eval()(x).float()
    assert (a - b).norm() <= (.05 if half else 1e-4)*b.norm()
