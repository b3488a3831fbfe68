"""Faults that happen to a run, each in a process of its own that was forked from this one.

    python tests/faults.py            # all of them, as a table
    python tests/faults.py kill 20    # one run that is killed at 20 random moments
    python tests/faults.py sweep 8    # a sweep of two runs at once, of which something is killed at 8 random moments

`test_faults.py` asserts what the table says, and so does the explanation about bad days.
"""
import json, math, os, random, resource, shutil, signal, sys, tempfile, time
from pathlib import Path
from dataclasses import asdict
import matplotlib.pyplot, sklearn.datasets, torch, torchvision, tqdm.auto      # once, before processes are forked
import dsb.training.plot, dsb.training.sweep, dsb.training.train, dsb.training.tune
from dsb.cli import main
from dsb.core import markdown_table
from dsb.training.folder import load_checkpoint
from dsb.training.train import Trainer

RUN = ('--data_set digits --model lenet5 --method dsb --rule cover --block_size 8 --sparsity 0.8 --initial_ratio 2 --T 3 --epochs 3 '
       '--batch_size 32 --n_train 128 --n_val 32 --n_test 32 --lr 0.05 --seed 3 --device cpu').split()
STEPS = 4                                              # of an epoch

# Runs in processes of their own

def begin(argv, said, before=None):
    "Fork a process that runs a command and writes what it says to a file; `before` is called in it"
    pid = os.fork()
    if pid: return pid
    status = 99
    try:
        fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for o in 1, 2: os.dup2(fd, o)
        if before: before()
        status = main([*map(str, argv)])
    except SystemExit as e: status = e.code
    except BaseException:
        import traceback; traceback.print_exc()
    finally:
        for o in sys.stdout, sys.stderr: o.flush()
        os._exit(status)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(argv, d, before=None):
    "(exit status, what it said on a line that begins with dsb:, all that it said) of a command"
    said = Path(d)/'said.txt'
    status = end(begin(argv, said, before))
    text = said.read_text(encoding='utf-8')
    return status, [l for l in text.splitlines() if l.startswith('dsb:')], text

def no_pictures(*_): return []

def at_step(step, happens):
    "What `begin` takes: let something happen before a step of the run"
    def before():
        train_step = Trainer.train_step
        def doomed(self, x, y):
            if self.step == step: happens(self)
            train_step(self, x, y)
        Trainer.train_step = doomed
    return before

# What two equal runs share

def state(out):
    "All that is saved but times"
    _, ck = load_checkpoint(out)
    for row in ck['history']: row.pop('step_ms')
    return {k: v for k, v in ck.items() if k not in ('seconds', 'times', 'checksum', 'config')}

def equal(a, b):
    "Equal bit for bit, through dictionaries and lists"
    if torch.is_tensor(a): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b

def same_run(a, b):
    "Are two runs that have ended equal: weights, structures, momentum, metrics, result?"
    def told(out): return [{k: v for k, v in json.loads(l).items() if k != 'step_ms'} for l in (Path(out)/'metrics.jsonl').read_text().splitlines()]
    def result(out): return {k: v for k, v in json.loads((Path(out)/'summary.json').read_text()).items() if k not in ('seconds', 'step_ms')}
    return equal(state(a), state(b)) and told(a) == told(b) and result(a) == result(b)

def hidden(out): return [p.name for p in Path(out).iterdir() if p.name.startswith('.')]

def killed(d, n, seed=0):
    "Kill one run `n` times at random moments, until it has ended; begin another where it ends too soon. (kills, runs)"
    d, g, kills, runs = Path(d), random.Random(seed), 0, 0
    dsb.training.train.draw_run = no_pictures
    begun = time.perf_counter()
    assert run(['train', *RUN, '--save_every', '3', '--out', d/'whole'], d)[0] == 0
    longest = time.perf_counter()-begun
    while kills < n:
        out, status, runs = d/f'run-{runs}', None, runs+1
        while status != 0:
            again = (out/'last.pt').exists()
            pid = begin(['train', '--resume', out] if again else ['train', *RUN, '--save_every', '3', '--out', out], d/'said.txt')
            if kills < n:
                time.sleep(g.uniform(0, longest))
                try: os.kill(pid, signal.SIGKILL)
                except ProcessLookupError: pass
            status = end(pid)
            kills += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), (d/'said.txt').read_text()
        assert same_run(d/'whole', out), f'run {runs} differs'
        assert not hidden(out), hidden(out)
    return kills, runs

# Sweeps

SWEEP = dict(common=dict(model='lenet5', data_set='digits', sparsity=.8, n_train=128, n_val=32, n_test=32, batch_size=32, lr=.05, epochs=4, T=3, save_every=3, device='cpu'),
             methods=dict(small=dict(method='small-dense'), blocks=dict(method='dsb', block_size=8, initial_ratio=2)), grid=dict(seed=[1, 2]))

class Forked:
    "The process of a run, forked instead of started: as much of a `Popen` as a sweep asks for"
    def __init__(self, job, log):
        read, self.write = os.pipe()                   # by which the run learns that the sweep is gone
        self.returncode, self.pid = None, os.fork()
        if self.pid: return os.close(read)
        os.closerange(3, read); os.closerange(read+1, 256)     # as `Popen` does: the sweep's lock is its own
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = 99
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for o in 1, 2: os.dup2(fd, o)
            dsb.training.sweep._stop_with(read)
            status = dsb.training.sweep.work(job)
        finally: os._exit(status)
    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
    def terminate(self): os.kill(self.pid, signal.SIGTERM)

def forked_worker(run, folder, threads):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'outcome.json').unlink(missing_ok=True)
    return dsb.training.sweep.Worker(run, folder, Forked(dict(config=asdict(run.config), folder=str(folder), threads=threads), folder/'log.txt'), time.monotonic())

def children(pid):
    try: return [int(o) for o in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except OSError: return []

def came_to(file):
    "label and seed -> what a run came to, without times; each run has one line that is no failure"
    lines = [json.loads(l) for l in file.with_suffix('.jsonl').read_text().splitlines()]
    good = [l for l in lines if 'error' not in l]
    for l in good:
        for k in 'seconds', 'step_ms': l['result'].pop(k)
    found = {(l['run']['label'], l['run']['seed']): [l[k] for k in ('result', 'test_acc', 'val_acc', 'train_loss', 'updates')] for l in good}
    assert len(found) == len(good) == 4, lines
    return found

def swept(d, n, seed=0):
    "Kill a sweep, a run of it or all of them `n` times at random moments and type the same command again. (kills, sweeps)"
    d, g, kills, sweeps, longest = Path(d), random.Random(seed), 0, 0, None
    dsb.training.sweep.start_worker = forked_worker
    while longest is None or kills < n:
        file, status, undisturbed = d/f'{sweeps}.json', None, longest is None
        file.write_text(json.dumps(SWEEP))
        begun = time.perf_counter()
        while status != 0:
            pid = begin(['sweep', file, '--jobs', 2, '--threads', 1], d/'said.txt')
            if not undisturbed and kills < n:
                time.sleep(g.uniform(0, longest))
                runs = children(pid)
                for p in g.choice([[pid], runs[:1], runs[-1:], [*runs, pid]]):
                    os.kill(p, signal.SIGKILL)
                    kills += 1
            status = end(pid)
            assert status in (0, 1, -signal.SIGKILL), (d/'said.txt').read_text()
        if undisturbed: longest, whole = time.perf_counter()-begun, came_to(file)
        assert came_to(file) == whole, f'sweep {sweeps} differs'
        left = sorted(str(p.relative_to(d)) for p in file.with_suffix('.runs').rglob('*'))
        assert not left and not file.with_suffix('.runs').exists(), left
        sweeps += 1
    return kills, sweeps-1

# The faults: each gets a folder, makes its own run, and returns (exit status, line, what the run had lost in the end)

def _then_resumed(d, out='run'):
    "What is lost where the run goes on as if nothing had been: nothing, if it ends like the one that nothing disturbed"
    status, lines, text = run(['train', '--resume', d/out], d)
    assert status == 0, text
    assert not hidden(d/out), hidden(d/out)
    return 'nothing' if same_run(d.parent/'whole', d/out) else 'the run differs'

def _during(d, happens, step=STEPS+2, more=()):
    "A run to which something happens in its second epoch"
    return run(['train', *RUN, '--save_every', '3', '--out', d/'run', *more], d, at_step(step, happens))

def disk_full(d):
    status, lines, _ = _during(d, lambda t: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
    return status, lines, _then_resumed(d)

def not_writable(d):
    def happens(t):
        t.out.chmod(0o555)
        if os.geteuid() == 0: os.setuid(65534)
    d.chmod(0o755)
    status, lines, _ = _during(d, happens)
    (d/'run').chmod(0o755)
    return status, lines, _then_resumed(d)

def folder_renamed(d):
    status, lines, _ = _during(d, lambda t: t.out.rename(d/'elsewhere'))
    assert not (d/'run').exists()
    return status, lines, _then_resumed(d, 'elsewhere')

def folder_replaced(d):
    status, lines, _ = _during(d, lambda t: (t.out.rename(d/'elsewhere'), t.out.mkdir()))
    assert not list((d/'run').iterdir())
    return status, lines, _then_resumed(d, 'elsewhere')

def folder_deleted(d):
    status, lines, _ = _during(d, lambda t: shutil.rmtree(t.out))
    return status, lines, 'the run' if not (d/'run').exists() else 'a folder is left'

def no_memory(d):
    def happens(t):
        size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
        t.model.forward = lambda x: torch.zeros(2**26)
    status, lines, _ = _during(d, happens)
    return status, lines, _then_resumed(d)

def not_a_number(d):
    def happens(t): next(t.model.parameters()).data.fill_(math.nan)
    status, lines, _ = _during(d, happens)
    return status, lines, _then_resumed(d)

def _whole(d):
    "A run of two epochs and a half, with earlier checkpoints"
    status, *_ = _during(d, lambda t: os.kill(os.getpid(), signal.SIGKILL), 2*STEPS+2)
    assert status == -signal.SIGKILL
    return d/'run'/'last.pt'

def torn(d):
    f = _whole(d)
    f.write_bytes(f.read_bytes()[:-1000])
    status, lines, _ = run(['show', d/'run'], d)
    return status, lines, _then_resumed(d)

def flipped_bit(d):
    f = _whole(d); data = bytearray(f.read_bytes())
    data[len(data)//2] ^= 8
    f.write_bytes(data)
    status, lines, _ = run(['show', d/'run'], d)
    return status, lines, _then_resumed(d)

def missing(d):
    _whole(d).unlink()
    status, lines, _ = run(['show', d/'run'], d)
    return status, lines, _then_resumed(d)

def swapped(d):
    f = _whole(d); before = {p: p.read_bytes() for p in f.parent.iterdir()}
    ck = torch.load(f, weights_only=True)
    names = [n for n, t in ck['model'].items() if n.endswith('bias')][:2]
    a, b = (ck['model'][n] for n in names)
    ck['model'] |= {names[0]: b, names[1]: a}
    torch.save(ck, d/'swapped.pt')
    status, lines, _ = run(['train', '--resume', d/'swapped.pt'], d)
    assert {p: p.read_bytes() for p in f.parent.iterdir()} == before
    return status, lines, _then_resumed(d)

def newer_format(d):
    f = _whole(d); good = f.read_bytes(); ck = torch.load(f, weights_only=True)
    torch.save(ck | dict(format=ck['format'] | dict(version=9)), f)
    status, lines, _ = run(['train', '--resume', d/'run'], d)
    f.write_bytes(good)
    return status, lines, _then_resumed(d)

def two_together(d):
    pids = [begin(['train', *RUN, '--save_every', '3', '--out', d/'run'], d/f'said-{i}.txt') for i in range(2)]
    got = sorted((end(p), (d/f'said-{i}.txt').read_text()) for i, p in enumerate(pids))
    assert [s for s, _ in got] == [0, 2], got
    return 2, [l for l in got[1][1].splitlines() if l.startswith('dsb:')], _then_resumed(d)

def worker_killed(d):
    import multiprocessing
    images(d/'data', 24, 2)
    def happens(t):
        for p in multiprocessing.active_children(): os.kill(p.pid, signal.SIGKILL)
        time.sleep(.2)
    argv = ('--data_set imagenet --model lenet5 --sparsity 0 --epochs 1 --batch_size 2 --n_train 8 --n_test 2 --workers 1 --save_every 1 --device cpu').split()
    whole = ['train', *argv, '--data_dir', d/'data']
    status, lines, text = run([*whole, '--out', d/'run'], d, at_step(2, happens))
    undisturbed, _, text = run([*whole, '--out', d/'undisturbed'], d)
    assert undisturbed == 0, text
    again, _, text = run(['train', '--resume', d/'run'], d)
    assert again == 0, text
    return status, lines, 'nothing' if equal(state(d/'undisturbed'), state(d/'run')) else 'the run differs'

def images(folder, n, classes, size=(64, 48)):
    "A tree like that of ImageNet: so many JPEGs, half of them for training"
    from PIL import Image
    import numpy as np
    g = np.random.default_rng(0)
    for i in range(n):
        f = Path(folder)/('train' if i % 2 else 'val')/f'n{i//2 % classes:03d}'/f'{i}.JPEG'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(f)

def bomb(d):
    images(d/'data', 8, 2)
    import struct, zlib
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    f = next((d/'data'/'train').rglob('*.JPEG'))
    f.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b'IEND', b''))
    argv = '--data_set imagenet --model lenet5 --epochs 1 --batch_size 4 --workers 0 --device cpu'.split()
    status, lines, _ = run(['train', *argv, '--data_dir', d/'data', '--out', d/'run'], d)
    return status, lines, 'nothing' if not (d/'run').exists() else 'a folder is left'

FAULTS = dict(
    disk_full=(disk_full, 'the disk is full in mid-run', 'ulimit -f 10'),
    not_writable=(not_writable, 'the folder becomes read-only', 'chmod 555 runs/a'),
    folder_renamed=(folder_renamed, 'the folder is renamed', 'mv runs/a elsewhere'),
    folder_replaced=(folder_replaced, 'the folder is renamed, an empty one is put in its place', 'mv runs/a elsewhere; mkdir runs/a'),
    folder_deleted=(folder_deleted, 'the folder is deleted', 'rm -r runs/a'),
    no_memory=(no_memory, 'memory is used up in mid-run', 'ulimit -v N'),
    not_a_number=(not_a_number, 'the weights stop being numbers', '(written into them)'),
    torn=(torn, '`last.pt` is cut short', 'truncate -s -1000 runs/a/last.pt; dsb show runs/a'),
    flipped_bit=(flipped_bit, 'a bit of `last.pt` is flipped', 'dsb show runs/a'),
    missing=(missing, '`last.pt` is deleted', 'rm runs/a/last.pt; dsb show runs/a'),
    swapped=(swapped, 'two tensors of a checkpoint are swapped', 'dsb train --resume swapped.pt'),
    newer_format=(newer_format, 'a checkpoint of a newer version', 'dsb train --resume runs/a'),
    two_together=(two_together, 'two runs start together in one folder', 'dsb train --out runs/a & dsb train --out runs/a'),
    worker_killed=(worker_killed, 'a process that reads images is killed', 'kill -9 PID'),
    bomb=(bomb, 'an image claims 60 000×60 000 pixels', 'dsb train --data_set imagenet'))

def tried(d, names=FAULTS):
    "What came of each fault: name -> (exit status, lines, what was lost)"
    d, draw_run, found = Path(d), dsb.training.train.draw_run, {}
    dsb.training.train.draw_run = no_pictures            # they take longer than all the rest
    d.chmod(0o755)                                       # for `not_writable`, which becomes another user
    try:
        assert run(['train', *RUN, '--save_every', '3', '--out', d/'whole'], d)[0] == 0
        for name in names:
            (d/name).mkdir()
            found[name] = FAULTS[name][0](d/name)
    finally: dsb.training.train.draw_run = draw_run
    return found

def table(found, d):
    "A row for each fault"
    def line(o): return ' '.join(o).replace(str(d) + '/', '').replace('|', '\\|')
    rows = [[what, f'`{command}`', status, line(lines).removeprefix('dsb: '), lost]
            for (_, what, command), (status, lines, lost) in ((FAULTS[k], v) for k, v in found.items())]
    return markdown_table([['fault', 'command', 'status', 'what is said', 'lost'], *rows], left=(0, 1, 3, 4))

if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        if sys.argv[1:2] == ['kill']: print('%d kills, %d runs, all equal to the one that nothing disturbed' % killed(d, int(sys.argv[2])))
        elif sys.argv[1:2] == ['sweep']: print('%d kills, %d sweeps, all equal to the one that nothing disturbed' % swept(d, int(sys.argv[2])))
        elif sys.argv[1:] == ['json']: print(json.dumps(tried(d)))
        else: print(table(tried(d, sys.argv[1:] or FAULTS), d))
