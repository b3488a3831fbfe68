"Runs in real processes: interrupted, killed, continued, distributed"
import json, os, signal, struct, subprocess, sys
import pytest
import torch
from dsb.training.data import load_data
from dsb.training.train import restored
from faults import equal

TIMES = 'seconds', 'step_ms'      # of a summary, never the same
RUN = ('--data_set digits --model wrn-10-1 --dropout 0.2 --method dsb --rule cover --block_size 8 --sparsity 0.8 --initial_ratio 3 --T 4 --epochs 3 --batch_size 32 --n_train 256 --n_val 48 --n_test 64 '
       '--lr 0.05 --seed 3 --device cpu').split()

def start(root, *argv):
    "A training process whose lines can be read"
    return subprocess.Popen([sys.executable, 'main.py', *map(str, argv)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)

def until(p, text):
    "Read the process's lines until one holds `text`"
    for line in p.stdout:
        if text in line: return
    pytest.fail(f'{text!r} never came: {p.stderr.read()}')

def end(p):
    "Exit status and what was said on stderr"
    out, err = p.communicate(timeout=180)
    return p.returncode, err

@pytest.fixture(scope='module')
def whole(root, tmp_path_factory):
    "The run that nothing disturbs"
    out = tmp_path_factory.mktemp('whole')/'run'
    p = start(root, *RUN, '--out', out)
    status, err = end(p)
    assert (status, err) == (0, '')   # no bar where stderr is no terminal
    return out

def state(out):
    "What two equal runs share: everything but times, folders and devices"
    ck = torch.load(out/'last.pt', weights_only=True)
    for row in ck['history']: row.pop('step_ms')
    return {k: ck[k] for k in ('model', 'opt', 'upd', 'step', 'epoch', 'batch', 'history', 'best', 'start', 'rng')}

def assert_same(a, b):
    a, b = state(a), state(b)
    for k in a: assert equal(a[k], b[k]), f'{k} differs'

def test_best_by_validation(whole):
    "The best epoch of a run is the first of the highest validation accuracy, whatever the test says"
    rows = [json.loads(l) for l in (whole/'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    accs, r = [row['val_acc'] for row in rows], json.loads((whole/'summary.json').read_text(encoding='utf-8'))
    epoch = 1 + accs.index(max(accs))
    assert (r['best_epoch'], r['best_val_acc'], r['best_acc']) == (epoch, max(accs), rows[epoch-1]['test_acc'])
    assert r['final_acc'] == rows[-1]['test_acc'] and torch.load(whole/'best.pt', weights_only=True)['epoch'] == epoch

def test_validation_changes_nothing_else():
    "With the same training images, a run with validation images has the weights of one without"
    from dsb.training.data import TensorData
    from dsb.training.train import Trainer, TrainConfig
    d = load_data('digits', channels=1, n_train=256, n_val=64, n_test=64, batch_size=32)
    parts = [(d.train, d.test, d.val), (d.train, d.test)]
    config = TrainConfig(model='lenet5', method='dsb', rule='cover', block_size=8, sparsity=.5, epochs=2, T=3, batch_size=32, device='cpu')
    one, two = (Trainer(config, data=TensorData(d.name, d.info, d.classes, *p, batch_size=32), verbose=False) for p in parts)
    one.fit(); two.fit()
    assert all(map(torch.equal, one.model.state_dict().values(), two.model.state_dict().values()))
    for a, b in zip(one.history, two.history): assert a.keys() - b.keys() == {'val_loss', 'val_acc'} and a['test_acc'] == b['test_acc']

def test_interrupted_twice(root, whole, tmp_path):
    "Ctrl-C in the middle of the first epoch, kill in the middle of the third: 130, 143, and the same run in the end"
    out = tmp_path/'run'
    p = start(root, *RUN, '--out', out, '--print_freq', 1)
    until(p, 'step      5')
    p.send_signal(signal.SIGINT)
    status, err = end(p)
    assert status == 130 and f'--resume {out}' in err and 'Traceback' not in err
    at = torch.load(out/'last.pt', weights_only=True)
    assert at['epoch'] == 0 and 5 <= at['batch'] < 8 and not (out/'summary.json').exists()
    p = start(root, '--resume', out, '--print_freq', 1)
    until(p, 'step     18')
    p.send_signal(signal.SIGTERM)
    status, err = end(p)
    assert status == 143 and f'--resume {out}' in err
    assert torch.load(out/'last.pt', weights_only=True)['epoch'] == 2
    assert end(start(root, '--resume', out/'last.pt')) == (0, '')
    assert_same(whole, out)
    assert len((out/'metrics.jsonl').read_text(encoding='utf-8').splitlines()) == 3
    a, b = (json.loads((f/'summary.json').read_text(encoding='utf-8')) for f in (whole, out))
    assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}

def test_killed(root, whole, tmp_path):
    "kill -9 leaves the last epoch's checkpoint whole; the run continues in another folder"
    out, other = tmp_path/'run', tmp_path/'other'
    p = start(root, *RUN, '--out', out, '--print_freq', 1)
    until(p, 'step     12')
    p.kill()
    assert end(p)[0] == -signal.SIGKILL
    assert torch.load(out/'last.pt', weights_only=True)['epoch'] == 1
    assert end(start(root, '--resume', out, '--out', other)) == (0, '')
    assert_same(whole, other)
    assert (other/'best.pt').exists()

THEN_ALONE = """
import sys
from pathlib import Path
from dsb.cli import train_command
status, threads = train_command(), Path('/proc/self/task')
left = [name for p in threads.glob('*/comm') if 'gloo' in (name := p.read_text())]
assert not left, f'gloo computes on, {left}: Python may end in one of its threads'
sys.exit(status)
"""

@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_two_processes(root, tmp_path):
    "Two processes train one model: equal structures (the run itself insists), one folder, and a result like that of one process"
    one, two = tmp_path/'one', tmp_path/'two'
    run = ('--data_set digits --model lenet300-100 --method dsb --rule columns --T 4 --epochs 2 --batch_size 32 --n_train 256 --n_val 33 --n_test 65 --lr 0.02 --device cpu --out').split()
    script = tmp_path/'main.py'
    script.write_text(THEN_ALONE, encoding='utf-8')
    def both(*words):
        p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, *words],
                           cwd=root, capture_output=True, text=True, timeout=180)
        assert p.returncode == 0, p.stderr
        return p
    p = both(*run, two)
    assert p.stdout.count('epoch 2/2') == 1
    assert end(start(root, *run, one)) == (0, '')
    a, b = ([json.loads(l) for l in (f/'metrics.jsonl').read_text(encoding='utf-8').splitlines()] for f in (one, two))
    assert [r['step'] for r in a] == [r['step'] for r in b] and a[0]['updates'][0]['net_changed'] > 0
    for x, y in zip(a, b): assert all(abs(x[k] - y[k]) < .05 for k in ('train_loss', 'val_loss', 'test_loss'))
    ck = torch.load(two/'last.pt', weights_only=True)
    model, data = restored(ck), load_data('digits', channels=1, n_val=33, n_test=65)
    for batches, key in (data.val_batches(), 'val_acc'), (data.test_batches(), 'test_acc'):   # each image counts once
        hits = [(model(x).argmax(1) == y).float() for x, y in batches]
        assert b[-1][key] == torch.cat(hits).mean(dtype=torch.float64).item()
    assert len(ck['rng']) == 2 and not torch.equal(ck['rng'][0][0], ck['rng'][1][0])
    both('--resume', two/'last-1.pt', '--out', tmp_path/'again')            # with fewer weights than a new run begins with
    assert b[0]['density'] < .3 and torch.load(two/'last-1.pt', weights_only=True)['epoch'] == 1
    assert_same(two, tmp_path/'again')

def test_bar_in_a_terminal(root, tmp_path):
    "Where stderr is a terminal there is a bar with loss, accuracy, speed and the time that is left"
    pty, fcntl, termios = (pytest.importorskip(m) for m in ('pty', 'fcntl', 'termios'))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    argv = [sys.executable, 'main.py', *'--data_set digits --model lenet300-100 --epochs 2 --n_train 256 --n_test 32 --batch_size 16 --device cpu --out'.split(), str(tmp_path/'r')]
    p = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    out, seen = p.communicate(timeout=120)[0], b''
    while True:
        try: chunk = os.read(master, 65536)
        except OSError: break
        if not chunk: break
        seen += chunk
    bar = seen.decode(errors='ignore')
    assert p.returncode == 0 and out.count('\nepoch ') == 2
    assert 'loss' in bar and 'acc' in bar and ('step/s' in bar or 's/step' in bar) and '<' in bar

SMALL = ('--data_set digits --model lenet300-100 --method dsb --T 1 --epochs 3 --batch_size 32 --n_train 128 --n_test 32 '
         '--device cpu --print_freq 1').split()

def test_reader_that_leaves(root, tmp_path):
    "Whoever reads the lines of a run may go at any time: it trains on to its end, without a word about it"
    p = start(root, *SMALL, '--out', tmp_path/'run')
    until(p, 'step      3')
    p.stdout.close()
    assert (p.stderr.read(), p.wait(timeout=120)) == ('', 0)
    assert len((tmp_path/'run/metrics.jsonl').read_bytes().splitlines()) == 3 and (tmp_path/'run/masks.png').exists()

def test_reader_that_leaves_a_notebook(tmp_path, monkeypatch):
    "The same for a `Trainer` that nobody wraps in a command"
    from dsb.training.train import Trainer, TrainConfig
    r, w = os.pipe(); os.close(r)
    with os.fdopen(w, 'w') as out:
        monkeypatch.setattr('sys.stdout', out)
        config = TrainConfig(model='lenet300-100', epochs=2, n_train=128, n_test=32, batch_size=32)
        assert Trainer(config, tmp_path/'r').fit()['epochs'] == 2
        monkeypatch.undo()
        with open(os.devnull, 'w') as null: os.dup2(null.fileno(), w)    # what is still in the buffer

def test_started_together(root, tmp_path):
    "Three runs that start at once, of which nobody says where to, get a folder each"
    env, pipe = os.environ | dict(PYTHONPATH=str(root)), subprocess.PIPE
    words = [sys.executable, root/'main.py', *SMALL]
    ps = [subprocess.Popen(words, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    assert [end(p) for p in ps] == [(0, '')]*3
    name = 'digits-lenet300-100-dsb-s0.9-b16-T1-seed0'
    assert {p.name for p in (tmp_path/'runs').iterdir()} == {name, name + '-2', name + '-3'}
    assert all((p/'summary.json').exists() for p in (tmp_path/'runs').iterdir())

def test_folder_of_a_live_run(root, tmp_path):
    "Refused while the run is going on, and free as soon as it is gone, however it went"
    out = tmp_path/'a run'
    argv = [*RUN, '--epochs', 50, '--out', out, '--print_freq', 1]
    p = start(root, *argv)
    until(p, 'step     12')
    for other in (['--resume', out], argv):
        status, err = end(start(root, *other))
        assert status == 2 and err.count('\n') == 1
        assert 'in use by a run that is going on' in err or 'already holds a run' in err
    p.kill(); p.communicate()
    q = start(root, '--resume', out)
    until(q, 'step ')
    q.send_signal(signal.SIGTERM)
    status, err = end(q)
    assert status == 143 and f"--resume '{out}'" in err

def test_compiled(monkeypatch, capsys):
    "--compile: the same run bit for bit where torch compiles without changing the arithmetic; two graphs of the whole network, two more for all the sizes that it is pruned to"
    from functools import partial
    from dsb.training.train import Trainer, TrainConfig
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    config = dict(model='wrn-10-1', method='dsb', rule='cover', block_size=8, sparsity=.5, initial_ratio=1.5, T=3, prune_end=10, epochs=3, batch_size=16, n_train=64, n_test=16, lr=.05, device='cpu')
    a, b = (Trainer(TrainConfig(**config, compile=o), verbose=o) for o in (True, False))
    a._epochs(); b._epochs()
    assert sum(u['pruned'] > 0 for h in a.history for u in h['updates']) == 3
    assert a.upd.layers.keys() == b.upd.layers.keys() and all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.result()['compiled_graphs'] == 4 and a.result()['compile_seconds'] > 0 and 'compiled_graphs' not in b.result()
    said = [l.partition(', compiled ')[2] for l in capsys.readouterr().out.splitlines()]
    assert sum(int(l.split()[0]) for l in said if l) == 4 and not said[-1]

def test_compiled_with_a_break(monkeypatch):
    "A network of which torch.compile makes no single graph ends the run with the reason"
    from dsb.training.folder import Trouble
    from dsb.training.train import Trainer, TrainConfig
    torch._dynamo.reset()
    t = Trainer(TrainConfig(model='lenet300-100', epochs=1, n_train=64, n_test=16, batch_size=32, device='cpu', compile=True), verbose=False)
    t.model.register_forward_pre_hook(lambda m, args: print('broken'))
    with pytest.raises(Trouble, match='torch.compile cannot compile this network here .*: leave --compile out'): t.fit()
