"A sweep through the command line: killed, stopped, continued, and refused where its file or its results are wrong"
import contextlib, io, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from dsb.cli import main
from dsb.training.sweep import Sweep, read_lines

SPEC = {'common': dict(model='lenet300-100', data_set='digits', n_train=200, n_val=50, n_test=100, batch_size=10, lr=.02, epochs=15, eval_every=6, T=20, device='cpu'),
        'methods': {'wild': dict(method='dense', lr=1e30), 'small': dict(method='small-dense'), 'blocks': dict(method='dsb', block_size=16)},
        'grid': {'seed': [1], 'sparsity': [.8]}}

def write(folder, spec=SPEC):
    "The file of a sweep in a folder of its own"
    folder.mkdir(exist_ok=True)
    (folder/'s.json').write_text(json.dumps(spec))
    return folder/'s.json'

def start(root, file, *options):
    "The sweep as a process"
    return subprocess.Popen([sys.executable, '-m', 'dsb.cli', 'sweep', str(file), '--threads', '1', *options], cwd=root, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def until(ready, p=None, seconds=120):
    "Wait until `ready()`, while `p` runs"
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end and (p is None or p.poll() is None), p and p.communicate()
        time.sleep(.02)

def epochs(file):
    "Epochs that are done, of runs that ended and of runs under way"
    n = 0
    for f in (file.with_suffix('.jsonl'), *file.with_suffix('.runs').glob('*/metrics.jsonl')):
        try: n += len(f.read_bytes().splitlines())*(SPEC['common']['epochs'] if f.parent == file.parent else 1)
        except OSError: pass                                         # a run that has just ended
    return n

def workers(file):
    "Processes of the sweep's runs"
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: words = p.read_bytes()
        except OSError: continue
        if b'dsb.training.sweep' in words and str(file.parent).encode() in words: found.append(p)
    return found

def results(file):
    "label -> what a run came to"
    return {l['run']['label']: l.get('error') or (l['result']['final_acc'], l['result']['structure'], l['test_acc'], l['train_loss'], l['updates'])
            for l in read_lines(file.with_suffix('.jsonl'))}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The file of a sweep that nothing disturbed"
    file = write(tmp_path_factory.mktemp('whole'))
    with contextlib.redirect_stdout(io.StringIO()) as out: assert main(['sweep', str(file), '--jobs', '2', '--threads', '1']) == 1  # one of the runs is made to fail
    out = out.getvalue()
    assert '3/3 ' in out and 'wild, sparsity 0.0, seed 1: failed: Diverged' in out
    return file

def test_results(whole):
    lines = {l['run']['label']: l for l in read_lines(whole.with_suffix('.jsonl'))}
    assert lines['wild']['error'].startswith('Diverged') and 'result' not in lines['wild']
    blocks = lines['blocks']
    assert blocks['run'] == dict(label='blocks', sparsity=.8, seed=1) and len(blocks['test_acc']) == 3 and len(blocks['train_loss']) == 15
    chosen, r = max(range(3), key=lambda i: blocks['val_acc'][i]), blocks['result']   # by validation, of the three evaluations
    assert (r['best_epoch'], r['best_acc'], r['final_acc']) == ((6, 12, 15)[chosen], blocks['test_acc'][chosen], blocks['test_acc'][-1])
    assert blocks['updates']['number'] > 5 and lines['small']['updates'] == dict(number=0)
    assert abs(lines['small']['result']['active']/blocks['result']['active'] - 1) < .03
    assert blocks['command'].startswith('dsb train --model lenet300-100 --data_set digits --method dsb --sparsity 0.8')
    assert blocks['versions'].keys() == {'dsb', 'torch', 'python'} and blocks['threads'] == 1
    assert [p.name for p in whole.with_suffix('.runs').iterdir()] == ['wild-sparsity0.0-seed1']     # what failed can be looked at

@pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks for processes in /proc')
def test_stopped_and_continued(root, whole, tmp_path, capsys):
    file, only = write(tmp_path/'cut'), ('--only', 'label=small,blocks')
    p = start(root, file, *only)
    until(lambda: epochs(file) > 0, p)
    with pytest.raises(SystemExit) as e: main(['sweep', str(file)])
    assert e.value.code == 2 and 'another sweep is writing to' in capsys.readouterr().err
    p.kill(); p.communicate()                                        # no chance to pass anything on
    until(lambda: not workers(file))
    assert (file.with_suffix('.runs')/'small-sparsity0.8-seed1/last.pt').exists()
    done = epochs(file)
    p = start(root, file, '--jobs', '2', *only)
    until(lambda: epochs(file) > done, p)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and 'of 2 runs done; the same command goes on' in err and not workers(file)
    with file.with_suffix('.jsonl').open('ab') as f: f.write(b'{"run": {"label": "bl')
    assert main(['sweep', str(file), '--jobs', '2', '--threads', '1', *only]) == 0
    assert not file.with_suffix('.runs').exists()
    assert results(file) == {k: v for k, v in results(whole).items() if k != 'wild'}

def test_table(whole, capsys):
    assert main(['sweep', str(whole), '--against', 'small']) == 0
    first, second, note, costs = capsys.readouterr().out.split('\n\n')
    assert {l.split()[0] for l in costs.splitlines()[1:]} == {'blocks', 'small'} and 'of training' in costs.splitlines()[0]
    assert 'only one or two runs' in note
    assert first.splitlines()[0].split() == ['accuracy,', '%', '0.8'] and [l.split()[0] for l in second.splitlines()] == ['minus', 'blocks']
    assert main(['sweep', str(whole), '--list']) == 0
    assert [l.split()[0] for l in capsys.readouterr().out.splitlines()[1:]] == ['failed', 'done', 'done']
    assert main(['sweep', str(whole), '--only', 'label=small,blocks']) == 0      # nothing is left to do
    assert '2 of 2 runs done' in capsys.readouterr().out

def refused(capsys, *argv):
    "The one line with which the sweep is refused"
    with pytest.raises(SystemExit) as e: main(['sweep', *map(str, argv)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and err.startswith('dsb: error: '), err
    return err

@pytest.mark.parametrize('change, says', [
    (dict(methods={}), 'methods: nothing there'),
    (dict(method={}), "entry='method': expected one of common, methods, grid; did you mean 'methods'?"),
    (dict(common=dict(sparsty=.9)), "common: field='sparsty'"),
    (dict(methods=dict(a=dict(lrr=.1))), "methods: a: field='lrr'"),
    (dict(grid=dict(sed=[0])), "grid: field='sed'"),
    (dict(grid=dict(seed=0)), 'grid: seed is 0, expected a list'),
    (dict(grid=dict(seed=[0], sparsity=[.9, 1.])), 'small, seed 0, sparsity 1.0: sparsity=1.0: expected a number in [0, 1)'),
    (dict(grid=dict(seed=[0, '1'])), "wild, seed 1: seed='1': expected a whole number"),
    (dict(grid=dict(seed=[0], lr=[.1])), 'grid: lr varies there, and common sets it too'),
    (dict(methods=dict(a=dict(method='rigl', block_size=16))), 'use method dsb or ssb'),
    (dict(methods=dict(a=dict(model='ReNet18'))), 'did you mean ResNet18?'),
    (dict(common=dict(data_set='digit')), 'did you mean digits?'),
    (dict(methods=dict(a=dict(dropout=.3, model='mlp'))), 'has no dropout'),
])
def test_bad_file(change, says, capsys, tmp_path):
    file = write(tmp_path, SPEC | change)
    assert says in refused(capsys, file)
    assert list(tmp_path.iterdir()) == [file]                        # nothing was begun

def test_bad_input(capsys, tmp_path):
    assert 'cannot be read' in refused(capsys, tmp_path/'none.json')
    file = write(tmp_path)
    for options, says in (('--jobs 0', 'jobs=0'), ('--threads 0', 'threads=0'), ('--only label=block', "did you mean 'blocks'?"), ('--against small', 'no run of'),
                          (f'--out {file}', 'give another --out'), ('--out /proc/none/x', 'cannot write to'), ('--jbs 2', 'did you mean --jobs?')):
        assert says in refused(capsys, file, *options.split())
    file.write_text('{"methods": {"a": {}},}')
    assert 's.json is not the JSON of a sweep: ' in refused(capsys, file)

def test_changed_config(capsys, tmp_path, whole):
    file, out = write(tmp_path, SPEC | dict(common=SPEC['common'] | dict(epochs=16))), whole.with_suffix('.jsonl')
    err = refused(capsys, file, '--out', out)
    assert 'has this run with epochs=15, now it is epochs=16; give another --out' in err and 'small, sparsity 0.8, seed 1' in err
    file = write(tmp_path, SPEC | dict(common=SPEC['common'] | dict(print_freq=5, data_dir='elsewhere')))
    assert main(['sweep', str(file), '--out', str(out), '--list', '--only', 'label=small']) == 0     # what may change on the way may change here
    assert main(['sweep', str(file), '--out', str(tmp_path/'new.jsonl'), '--list']) == 0
    out.write_bytes(b'{"run"\n' + (whole_lines := out.read_bytes()))
    try: assert 'line 1 is no line of a sweep' in refused(capsys, whole)
    finally: out.write_bytes(whole_lines)

# Languages and pipes

def dsb(root, *argv, **env):
    "(status, stdout, stderr) of `dsb sweep` in a process of its own"
    words = [sys.executable, '-m', 'dsb.cli', 'sweep', *map(str, argv)]
    p = subprocess.run(words, cwd=root, env=os.environ | env, capture_output=True, timeout=120)
    return p.returncode, p.stdout.decode(errors='replace'), p.stderr.decode(errors='replace')

def test_languages(root, tmp_path):
    "A file in UTF-8, with the mark of some editors or without, under one locale and then under another"
    folder, plain = tmp_path/'Läufe 実験', dict(LC_ALL='C', PYTHONUTF8='0')
    folder.mkdir()
    spec = dict(common=SPEC['common'] | dict(epochs=1, batch_size=100), grid=dict(seed=[0], sparsity=[.8]),
                methods={'größer': dict(method='dense'), '小': dict(method='dsb', block_size=16)})
    file = folder/'s ü.json'
    file.write_text(json.dumps(spec, ensure_ascii=False), encoding='utf-8-sig')
    assert dsb(root, file, '--only', 'label=größer', **plain)[0] == 0
    status, out, err = dsb(root, file, '--list')
    assert (status, err) == (0, '')
    assert [l.split()[:2] for l in out.splitlines()[1:]] == [['done', 'größer,'], ['to', 'do']]
    file.write_text(json.dumps(spec, ensure_ascii=False), encoding='utf-8')
    assert main(['sweep', str(file), '--threads', '1']) == 0
    status, out, err = dsb(root, file, '--against', '小', **plain | dict(PYTHONIOENCODING='ascii:strict'))
    assert (status, err) == (0, '') and '\\u5c0f' in out
    assert out.splitlines()[0].split() == ['accuracy,', '%', 'dense', '0.8']

def test_not_utf8(capsys, tmp_path):
    (tmp_path/'s.json').write_bytes(json.dumps(SPEC).replace('small', 'größer').encode('latin-1'))
    assert "is not the JSON of a sweep: 'utf-8' codec can't decode" in refused(capsys, tmp_path/'s.json')

def test_reader_that_leaves(root, tmp_path):
    "`dsb sweep FILE | head -1` does all runs"
    file = write(tmp_path, SPEC | dict(common=SPEC['common'] | dict(epochs=1, batch_size=100)))
    p = start(root, file, '--only', 'label=small,blocks')
    p.stdout.readline(); p.stdout.close()
    assert (p.stderr.read(), p.wait(timeout=120)) == ('', 0)
    assert set(results(file)) == {'small', 'blocks'}

def test_folder_of_another_dsb(capsys, tmp_path):
    "A folder of a run whose config cannot be read is named, with what to do"
    file = write(tmp_path)
    folder = tmp_path/'s.runs/small-sparsity0.8-seed1'; folder.mkdir(parents=True); (folder/'last.pt').touch()
    for content in (None, b'{', b'[]', b'\xff'):
        if content: (folder/'config.json').write_bytes(content)
        assert f'{folder}/config.json cannot be read' in refused(capsys, file)

def test_waits_for_one_that_is_saving(tmp_path):
    "The process of a sweep that was killed may still be saving: the next one waits for the folder"
    import threading
    from dsb.training.sweep import Sweep, make_trainer
    from dsb.training.folder import Claim
    run = Sweep(write(tmp_path)).runs[1]
    claim = Claim(tmp_path/'r')
    threading.Timer(1, claim.release).start()
    began = time.monotonic()
    assert make_trainer(run.config, tmp_path/'r').out == tmp_path/'r' and time.monotonic() - began > .9

def test_results_that_are_none(capsys, tmp_path):
    "Whatever is wrong with the file of results is said in one line"
    file = write(tmp_path)
    (tmp_path/'folder').mkdir(); (tmp_path/'list.jsonl').write_bytes(b'{"run": {"label": ["a"]}}\n')
    for out, says in (('folder', 'cannot be read (Is a directory): give another --out'), ('list.jsonl', 'line 1 is no line of a sweep')):
        for more in [], ['--list'], ['--table']: assert says in refused(capsys, file, '--out', tmp_path/out, *more)

def test_sweeps_of_the_book(root):
    "The results in the repository are those of the files that ask for them: what this dsb would do today is what was done"
    files = [f for f in (root/'nbs'/'explanations').glob('*.json') if f.with_suffix('.jsonl').exists()]
    sweeps = [Sweep(f) for f in files]
    assert len(sweeps) > 2 and all(any(s.state(r) == 'done' for r in s.runs) for s in sweeps)
