"Runs to which something happens, damaged checkpoints, odd arguments: one line, and nothing lost"
import copy, gc, io, json, math, os, random, shutil, socket, subprocess, sys, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import pytest, torch

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='forks processes and sets limits on them')

def told(root, *argv, timeout=550):
    "What a program prints"
    r = subprocess.run([sys.executable, *map(str, argv)], cwd=root, capture_output=True, text=True, timeout=timeout)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout

SAYS = dict(
    disk_full=(2, 'File too large'), not_writable=(2, 'Permission denied'), folder_renamed=(2, 'was removed, moved or replaced'),
    folder_replaced=(2, 'was removed, moved or replaced'), folder_deleted=(2, 'was removed, moved or replaced'),
    no_memory=(2, 'out of memory at step 6, with batch_size=32'), not_a_number=(1, 'not finite at step 7'), torn=(0, 'going back to'),
    flipped_bit=(0, 'going back to'), missing=(0, 'going back to'), swapped=(2, 'not as it was written'),
    newer_format=(2, 'written by a newer dsb'), two_together=(2, 'run'), worker_killed=(2, 'a process that reads images has ended'),
    bomb=(2, 'cannot be read as an image'))

def test_faults(root):
    "Each fault ends the run with one line, or is overcome; the run goes on to the same end as one that nothing disturbed"
    found = json.loads(told(root, 'tests/faults.py', 'json'))
    assert found.keys() == SAYS.keys()
    for name, (status, lines, lost) in found.items():
        assert (status, len(lines), lost) == (SAYS[name][0], 1, 'the run' if name == 'folder_deleted' else 'nothing'), (name, found[name])
        assert SAYS[name][1] in lines[0], (name, lines)

def test_killed_at_random_moments(root):
    "kill -9 at 20 moments: weights, structures, momentum, metrics and results equal those of the run that nothing disturbed"
    assert told(root, 'tests/faults.py', 'kill', 20).startswith('20 kills, ')

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for processes in /proc')
def test_sweep_killed_at_random_moments(root):
    "kill -9 of a sweep, of a run of it or of all together, and the same command again: each run has one line, with the results of the sweep that nothing disturbed"
    kills, sweeps = told(root, 'tests/faults.py', 'sweep', 6).split(' kills, ')
    assert int(kills) >= 6 and sweeps.endswith('all equal to the one that nothing disturbed\n')

class Tiny:
    "A hundred batches of two images of random numbers"
    num_classes, image_size, channels, steps_per_epoch = 2, 8, 1, 100
    x, y = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    def train_batches(self, epoch, start=0): return list(zip(self.x.split(2), self.y.split(2)))[start:]
    def test_batches(self): yield self.x[:8], self.y[:8]

def held():
    "(tensors, descriptors, threads, bytes of memory) of this process"
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return tensors, len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task')), int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='looks for memory in /proc')
def test_nothing_piles_up(tmp_path, monkeypatch):
    "2000 steps with 400 updates, of which the last 1500 leave nothing behind: no tensors (but for what is kept of the present structures), descriptors, threads or memory"
    from dsb.training import train
    monkeypatch.setattr(train, 'draw_run', lambda *_: [])
    config = train.TrainConfig(model='lenet300-100', block_size=8, sparsity=.8, initial_ratio=1, T=5, T_end=10**6, epochs=20, batch_size=2, eval_every=5, lr=.01, device='cpu')
    t, seen = train.Trainer(config, tmp_path/'run', Tiny(), verbose=False), []
    t.log = lambda history: seen.append(held()) if len(history) in (5, 20) else None
    t.fit()
    assert (t.step, t.upd.updates) == (2000, 400) and sum(u['net_changed'] > 0 for h in t.history for u in h['updates']) > 200
    (tensors, *others, memory), (more, *same, larger) = seen
    assert others == same and more < tensors+50 and larger < memory+4*2**20, seen

# Damaged checkpoints

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of one epoch"
    from dsb.cli import main
    out = tmp_path_factory.mktemp('faults')/'run'
    argv = '--data_set digits --model lenet300-100 --method dsb --T 2 --epochs 2 --batch_size 32 --n_train 128 --n_val 16 --n_test 16 --device cpu --out'.split()
    with redirect_stdout(io.StringIO()): assert main(['train', *argv, str(out)]) == 0
    return out

def tries(f):
    "What resuming says of a checkpoint: a line, or None where it is accepted. Anything but a ValueError is a failure"
    from dsb.cli import continued
    try: continued(dict(resume=str(f), out=str(f.parent/'new')))
    except ValueError as e: return str(e)
    finally: shutil.rmtree(f.parent/'new', ignore_errors=True)

def content(f):
    from dsb.training.folder import content_checksum, load_checkpoint
    return content_checksum({k: v for k, v in load_checkpoint(f)[1].items()})

def test_damaged_bytes(run, tmp_path):
    "150 files with a flipped bit, a part that is missing, doubled or zero: refused, or read as what was saved"
    g, data, f, want = random.Random(0), (run/'last.pt').read_bytes(), tmp_path/'x.pt', content(run/'last.pt')
    accepted = 0
    for i in range(150):
        at, n = g.randrange(len(data)), g.randrange(1, 2000)
        bad = [data[:at] + bytes([data[at] ^ 1 << g.randrange(8)]) + data[at+1:], data[:at], data[:at] + data[at+n:],
               data[:at] + data[at:at+n] + data[at:], data[:at] + bytes(n) + data[at+n:]][i % 5]
        f.write_bytes(bad)
        said = tries(f)
        if said is None: assert content(f) == want
        else: assert 'x.pt' in said and '\n' not in said
        accepted += said is None
    assert accepted < 15                                       # in the room between the pieces of the archive

def leaves(o, path=()):
    "The places in dictionaries and lists at which there is neither"
    items = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, (list, tuple)) else None
    if items is None or not o: yield path
    else:
        for k, v in items: yield from leaves(v, (*path, k))

def put(o, path, v):
    "A copy of a checkpoint with another value in a place"
    o = copy.deepcopy(o); at = o
    for k in path[:-1]: at = at[k]
    at[path[-1]] = v
    return o

def same(a, b):
    from dsb.training.folder import content_checksum
    try: return content_checksum(a) == content_checksum(b)
    except ValueError: return False

ODD = [None, 'x', math.nan, -1, [], {}, 1e400, 10**30, -0.5, [1], True, torch.zeros(3), torch.tensor(math.nan), torch.zeros(1).expand(2**40)]
FREE = {'data_dir', 'print_freq', 'save_every', 'keep', 'workers', 'cuda', 'seconds'}   # any number will do

def test_odd_contents(run, tmp_path):
    "200 checkpoints with another value in one place and the right checksum: refused in one line"
    from dsb.training.folder import sealed
    g, ck, f = random.Random(1), torch.load(run/'last.pt', weights_only=True), tmp_path/'x.pt'
    places = [p for p in leaves(ck) if p[0] not in ('format', 'checksum') and not FREE & set(map(str, p))]
    by_part = {k: [p for p in places if p[0] == k] for k in sorted({p[0] for p in places})}
    accepted = []
    for i in range(200):
        path = g.choice(by_part[g.choice(sorted(by_part))])
        odd = g.choice([o for o in ODD if o is not None or path[0] != 'config'])       # None: what follows from the rest
        bad = put(ck, path, odd)
        if same(bad, ck): continue
        try: bad = sealed(bad)
        except ValueError: pass                                # more elements than memory
        torch.save(bad, f)
        said = tries(f)
        if said is None: accepted.append((path, odd))
        else: assert 'x.pt' in said and '\n' not in said
    assert not accepted, accepted

def test_code_in_a_checkpoint(run, tmp_path):
    "Nothing in a file is executed"
    import pickle
    class Runs:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    ck = torch.load(run/'last.pt', weights_only=True)
    for bad in Runs(), ck | dict(best=Runs()): torch.save(bad, tmp_path/'x.pt'); assert 'not a checkpoint' in tries(tmp_path/'x.pt')
    (tmp_path/'x.pt').write_bytes(pickle.dumps(Runs())); assert 'not a checkpoint' in tries(tmp_path/'x.pt')
    assert not (tmp_path/'executed').exists()

# Odd arguments

GOOD = dict(data_set=['digits', 'glyphs', 'cifar10'], model=['wrn-22-2', 'lenet5'], sparsity=['.5', '0.9'], T=['10', '1000'], alpha=['.3'],
            epochs=['3', '1000000'], batch_size=['32'], lr=['.1', '1e-5'], momentum=['0', '.9'], weight_decay=['0'], seed=['0', '9223372036854775807'],
            recipe=['cifar', 'short'], eval_every=['1'], accumulate_steps=['1', '7'], save_every=['0', '5'], keep=['0', '3'], on_nan=['skip', 'stop'],
            print_freq=['5'], n_train=['100'], n_val=['0', '7'], device=['cpu', 'auto'])
NUMBERS = '-1 nan inf x 1e999 0x10 1,5 1_'.split() + ['', ' ', '٣٫', '1.5.2', '--']
BAD = {k: NUMBERS for k in 'sparsity alpha epochs batch_size lr momentum weight_decay seed eval_every accumulate_steps save_every keep print_freq T'.split()}
BAD |= {k: ['x', '', '1', '\n', '../..', 'digit', 'ä'*500] for k in ('data_set', 'model', 'recipe', 'device', 'on_nan', 'distribution', 'method', 'rule', 'grow', 'start')}

def test_arguments(tmp_path, monkeypatch):
    "400 command lines: what is wrong is refused in one line, and all that is right reaches the trainer as a config"
    from dsb import cli
    from dsb.training import train
    class Reached(Exception): pass
    def trainer(config, *_, **__):
        train.data_shape(config)
        raise Reached(config)
    monkeypatch.setattr(train, 'Trainer', trainer)
    monkeypatch.chdir(tmp_path)
    g, refused = random.Random(2), 0
    for i in range(400):
        names = g.sample(sorted(GOOD), g.randrange(5))
        words, wrong = [w for k in names for w in (f'--{k}', g.choice(GOOD[k]))], i % 2
        if wrong:
            k = g.choice(sorted(BAD)); v = g.choice(BAD[k])
            words += [f'--{k}={v}'] if g.random() < .5 or v == '--' else [f'--{k}', v]
        err = io.StringIO()
        try:
            with redirect_stderr(err): cli.train_command(words)
        except SystemExit as e:
            assert (e.code, err.getvalue().count('\n'), err.getvalue()[:11]) == (2, 1, 'dsb: error:'), (words, err.getvalue())
            refused += 1
            continue
        except Reached as e: assert not wrong, (words, e)
    assert 200 <= refused < 400 and not list(tmp_path.iterdir())

# Several processes

TWO = '--data_set digits --model lenet5 --method dsb --rule cover --block_size 8 --sparsity 0.8 --T 3 --epochs 30 --batch_size 32 --n_train 128 --n_test 32 --device cpu --print_freq 1'.split()

@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
@pytest.mark.parametrize('more, kill, status, says', [
    (['--lr', '.2'], None, [2, 2], 'process 1: started with lr=0.2, but process 0 with lr=0.1'),
    (['--lr', 'x'], None, [2, 2], "process 1: argument --lr/--learning-rate: invalid float value: 'x'"),
    ([], 1, [2, -9], 'another of the 2 processes has ended')])
def test_one_of_two_fails(more, kill, status, says, root, tmp_path):
    "Another option in one process, a process that is killed: all end within 30 seconds, and one of them says why"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    ps = [subprocess.Popen([sys.executable, 'main.py', *TWO, '--out', str(tmp_path/'run'), *more*r], cwd=root, env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        if kill is not None:
            for line in ps[0].stdout:
                if 'step      2' in line: break
            ps[kill].kill()
            begun = time.perf_counter()
        errs = [p.communicate(timeout=120)[1] for p in ps]
        assert kill is None or time.perf_counter()-begun < 30
    finally:
        for p in ps: p.kill()
    assert [p.returncode for p in ps] == status and ''.join(errs).count('\n') == 1 and says in ''.join(errs), errs

# The commands of the original for ImageNet and Tiny-ImageNet

def tree(folder, name):
    "200 images as the data set has them"
    from PIL import Image
    g, wnids = random.Random(0), [f'n{i:03d}' for i in range(5)]
    def jpeg(f, size):
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes('RGB', size, g.randbytes(3*size[0]*size[1])).save(f)
    for i in range(100):
        w = wnids[i % 5]
        if name == 'imagenet':
            for part in 'train', 'val': jpeg(folder/part/w/f'{i}.JPEG', (g.randrange(40, 90), 64))
        else:
            jpeg(folder/'train'/w/'images'/f'{i}.JPEG', (64, 64)); jpeg(folder/'val'/'images'/f'{i}.JPEG', (64, 64))
    if name == 'imagenet': return
    (folder/'wnids.txt').write_text('\n'.join(wnids))
    (folder/'val'/'val_annotations.txt').write_text(''.join(f'{i}.JPEG\t{wnids[i % 5]}\t0\t0\t62\t62\n' for i in range(100)))

@pytest.mark.parametrize('name, sparsity', [('imagenet', '0.5'), ('tinyimagenet', '0.75')])
def test_original_command(name, sparsity, tmp_path, monkeypatch, capsys):
    "The whole command, on 200 images and with few of them in a step"
    from dsb.cli import train_command
    monkeypatch.setenv('DSB_CACHE', str(tmp_path/'cache'))
    tree(tmp_path/'data', name)
    words = f'--data_set {name} --sparsity {sparsity} --model ResNet50 --block_size 16 --batch_size 256 --T_end 400000 --T 800'
    small = f'--epochs 1 --batch_size 2 --n_train 4 --n_test 2 --workers 0 --device cpu --data_dir {tmp_path/"data"} --out {tmp_path/"run"}'
    assert train_command(f'{words} {small}'.split(), 'imagenet', 'train_imagenet.py') == 0
    r = json.loads((tmp_path/'run'/'summary.json').read_text())
    assert abs(r['density'] - (1-float(sparsity))) < .01 and (r['steps'], r['block_size'], r['method']) == (2, 16, 'dsb')
