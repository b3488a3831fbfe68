"Every format that `dsb export` writes: what it prints is run in a fresh process, and what is wrong ends with one line"
import copy, json, os, pickle, shutil, subprocess, sys, textwrap
from importlib.util import find_spec
from pathlib import Path
import pytest
import torch
import dsb
from dsb.cli import main
from dsb.production.formats import FORMATS
from dsb.training.folder import load_checkpoint
from dsb.training.train import restored

pytest.importorskip('safetensors')
TRAIN = '--data_set digits --epochs 1 --batch_size 64 --n_train 128 --n_test 64 --device cpu'.split()
NEEDS = {o: ('onnx','onnxscript','onnxruntime') for o in ('onnx','onnx-sparse')}

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small convolutional run; its BatchNorms have seen images"
    out = tmp_path_factory.mktemp('runs')/'run'
    assert main(['train', *TRAIN, '--model', 'wrn-10-1', '--sparsity', '.8', '--block_size', '16', '--out', str(out)]) == 0
    return out

@pytest.fixture(scope='module')
def model(run): return restored(load_checkpoint(run/'best.pt')[1])

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))

def needs(format):
    for o in NEEDS.get(format, ()):
        if not find_spec(o): pytest.skip(f'{o} is not installed')

def fresh(code, cwd):
    "What a new process prints"
    root = Path(dsb.__file__).parent.parent
    r = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True,
                       env=os.environ | dict(PYTHONPATH=str(root)))
    assert r.returncode == 0, r.stderr
    return r.stdout

def ends(capsys, argv):
    "The one line with which a command ends, status 2"
    with pytest.raises(SystemExit) as e: main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and err.startswith('dsb: error: '), err
    return err

def program(capsys, *argv):
    "The lines that an export prints"
    assert main(['export', *map(str, argv)]) == 0
    out = capsys.readouterr().out
    return textwrap.dedent(out[out.index('\n')+1:])

@pytest.mark.parametrize('format, fold', [(k, fold) for k, f in FORMATS.items() for fold in (False, True) if not (f.folds and fold)])
def test_what_is_printed_loads_it(format, fold, run, model, tmp_path, capsys):
    "In a process that has imported nothing, in another folder, on images that the export has not seen"
    needs(format)
    lines = program(capsys, run, '--format', format, '--out', tmp_path/FORMATS[format].file, *['--fold']*fold)
    torch.save(IMAGES, tmp_path/'images')
    head = 'import torch\nimages = torch.load("images")\n'
    if 'onnx' in format:
        lines = lines.replace('images = numpy.zeros((1, 3, 32, 32), \'float32\')', 'images = images.numpy()')
        assert 'images.numpy()' in lines
        tail = 'y = torch.from_numpy(logits)\n'
    else: tail = 'with torch.no_grad(): y = model(images)\n'
    fresh(head + lines + tail + 'torch.save(y, "y")', tmp_path)
    with torch.no_grad(): want = model(IMAGES)
    assert torch.allclose(torch.load(tmp_path/'y'), want, rtol=0, atol=1e-4*float(want.abs().max()))

def test_sizes(run, model, tmp_path, capsys):
    "show tells what exports weigh, before they are made"
    assert main(['show', str(run)]) == 0
    said = next(l for l in capsys.readouterr().out.splitlines() if l.startswith('dsb export: '))
    for format, word in ('safetensors', 0), ('dense', 1):
        assert main(['export', str(run), '--format', format, '--out', str(tmp_path/FORMATS[format].file)]) == 0
        told = float(said.removeprefix('dsb export: ').split(', ')[word].split()[0])
        size = (tmp_path/FORMATS[format].file).stat().st_size/1e6
        assert told <= size <= told + .03, (format, told, size)     # names and headers come on top

def test_hub_folder(run, model, tmp_path, capsys):
    "To a folder of config.json and model.safetensors, and back, from another process"
    lines = program(capsys, run, '--format', 'safetensors', '--out', tmp_path/'hub')
    assert {o.name for o in (tmp_path/'hub').iterdir()} == {'config.json', 'model.safetensors'}
    fresh(lines + 'assert model.group3[0].conv2.structure.n_blocks', tmp_path)
    config = json.loads((tmp_path/'hub/config.json').read_text())
    assert config['dsb']['network'] == dict(name='wrn-10-1', num_classes=10, image_size=32, in_channels=3)
    with torch.no_grad(): assert torch.equal(dsb.load(tmp_path/'hub')(IMAGES), model(IMAGES))
    before = (run/'config.json').read_bytes()
    assert 'holds a config.json of something else' in ends(capsys, ['export', run, '--format', 'safetensors', '--out', run])
    assert (run/'config.json').read_bytes() == before and not (run/'model.safetensors').exists()

def test_load_takes_runs(run, model):
    for path in run, run/'best.pt', run/'last.pt':
        with torch.no_grad(): assert torch.equal(dsb.load(path)(IMAGES), model(IMAGES))

def test_the_lines_of_the_readme(run, model, root, tmp_path):
    "The main job's run is loaded by the two lines that follow it"
    text = (root/'README.md').read_text(encoding='utf-8')
    job = text.index('--out runs/digits')
    lines = text[text.index('```python', job):].split('```')[1].removeprefix('python')
    assert lines.strip().splitlines() == ['import dsb', "model = dsb.load('runs/digits')"]
    shutil.copytree(run, tmp_path/'runs/digits')
    assert fresh(lines + 'print(dsb.summary(model).density)', tmp_path).strip() == str(dsb.summary(model).density)

@pytest.mark.parametrize('options, compact', [('--method dense', False), ('--method small-dense --sparsity .8', False), ('--method rigl --sparsity .8', True)])
def test_other_methods(options, compact, tmp_path, capsys):
    "Dense runs, narrow ones and single entries in the formats that can hold them"
    assert main(['train', *TRAIN, '--model', 'lenet300-100', *options.split(), '--out', str(tmp_path/'r')]) == 0
    capsys.readouterr()
    m, x = dsb.load(tmp_path/'r'), torch.randn(2, 1, 32, 32)
    for format in 'dense', 'safetensors', 'torch.export':
        exec(program(capsys, tmp_path/'r', '--format', format), scope := {})
        with torch.no_grad(): assert torch.allclose(scope['model'](x), m(x), atol=1e-4)
    assert 'needs a network with blocks' in ends(capsys, ['export', tmp_path/'r', '--format', 'bsr'])
    small, large = ((tmp_path/'r'/FORMATS[o].file).stat().st_size for o in ('safetensors', 'dense'))
    assert (small < .5*large) == compact

def test_bad_input(run, tmp_path, capsys):
    assert "format='onxx': expected one of dense, safetensors, onnx, onnx-sparse, torch.export, bsr; did you mean 'onnx'?" in \
        ends(capsys, ['export', run, '--format', 'onxx'])
    for format in FORMATS:
        (tmp_path/'file').write_text('')
        err = ends(capsys, ['export', run, '--format', format, '--out', tmp_path/'file'/FORMATS[format].file])
        assert 'cannot write to' in err
    shutil.copytree(run, tmp_path/'cut')
    (tmp_path/'cut/best.pt').write_bytes((run/'best.pt').read_bytes()[:1000])
    assert 'best.pt' in ends(capsys, ['export', tmp_path/'cut', '--format', 'onnx'])

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_nothing_is_executed(tmp_path, capsys):
    "A pickle in the place of a checkpoint or of an export"
    made = tmp_path/'made'
    torch.save(dict(model=Evil(str(made))), tmp_path/'best.pt')
    (tmp_path/'model.safetensors').write_bytes(pickle.dumps(Evil(str(made)), 2))
    for format in FORMATS: assert 'best.pt is not a checkpoint' in ends(capsys, ['export', tmp_path, '--format', format])
    for path in tmp_path, tmp_path/'best.pt', tmp_path/'model.safetensors':
        with pytest.raises(ValueError, match='best.pt|model.safetensors'): dsb.load(path)
    assert not made.exists()

def test_interrupted(run, tmp_path, capsys, monkeypatch):
    "An export that fails leaves the old file, and nothing beside it"
    out = tmp_path/'dense.pt'
    out.write_text('old')
    def bad(*args): return lambda x: torch.zeros(len(x), 10)
    monkeypatch.setitem(FORMATS, 'dense', FORMATS['dense']._replace(read=bad))
    assert 'gives other outputs' in ends(capsys, ['export', run, '--out', out])
    assert out.read_text() == 'old' and [o.name for o in tmp_path.iterdir()] == ['dense.pt']

def test_flipped_bits(run, tmp_path, capsys):
    "Whichever byte of a file is changed, it is refused or its tensors are what they were"
    program(capsys, run, '--format', 'safetensors', '--out', tmp_path/'m.safetensors')
    raw, want = (tmp_path/'m.safetensors').read_bytes(), dsb.load(tmp_path/'m.safetensors').state_dict()
    g, refused = torch.Generator().manual_seed(0), 0
    places = torch.cat([torch.randint(8+4000, (60,), generator=g), torch.randint(len(raw), (60,), generator=g)]).tolist()
    for i in places:
        (tmp_path/'m.safetensors').write_bytes(raw[:i] + bytes([raw[i] ^ 4]) + raw[i+1:])
        try: got = dsb.load(tmp_path/'m.safetensors').state_dict()
        except ValueError as e:
            assert str(tmp_path/'m.safetensors') in str(e)
            refused += 1
            continue
        assert all(torch.equal(got[k], want[k]) for k in want)
    assert refused > 80

def shaken(model):
    "The model in evaluation and float64, its BatchNorms with random numbers"
    g = torch.Generator().manual_seed(0)
    for m in model.double().modules():
        if not isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)): continue
        for t in (m.running_mean, m.bias, m.weight): t.data.copy_(torch.randn(t.shape, generator=g))
        m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + .1)
    return model.eval()

@pytest.mark.parametrize('name, left', [('resnet18', 0), ('shufflenet_v2_x0_5', 0), ('mobilenet_v3_small', 0), ('regnet_y_400mf', 0), ('densenet121', 62)])
def test_fold_of_other_models(name, left):
    "Networks that are written in many ways, some with branches, splits and attention over channels"
    import torchvision
    m = shaken(torchvision.models.get_model(name, num_classes=5))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    f = dsb.fold(m)
    assert sum(isinstance(o, torch.nn.BatchNorm2d) for o in f.modules()) == left
    with torch.no_grad(): want, got = m(x), f(x)
    assert float((got-want).abs().max()) < 1e-12*float(want.abs().max())

def test_fold_of_scripts():
    "A compiled part stays as it is"
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8)).eval()
    m = shaken(torch.nn.Sequential(torch.jit.script(inner), torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad(): assert torch.allclose(dsb.fold(m)(x), m(x))

@pytest.mark.parametrize('dynamo', [True, False])
def test_onnx_by_torch(dynamo, model, tmp_path):
    "torch's own exporter takes a sparse network, also one that was made fast; runtimes compute the same"
    needs('onnx')
    import onnxruntime
    entries = dsb.sparsify(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, 16)), .9, block_size=0)
    for m in model, dsb.speed_up(copy.deepcopy(model)), entries:
        torch.onnx.export(m.eval(), (IMAGES,), str(tmp_path/'m.onnx'), dynamo=dynamo, verbose=False)
        session = onnxruntime.InferenceSession(str(tmp_path/'m.onnx'), providers=['CPUExecutionProvider'])
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0])
        with torch.no_grad(): want = m(IMAGES)
        assert torch.allclose(got, want, rtol=0, atol=1e-4*float(want.abs().max()))
