"The command line: every wrong argument or input ends with status 2 and one line that helps"
import json, math, os, pickle, shutil, subprocess, sys, textwrap
from pathlib import Path
import pytest
import torch
from dsb.training.folder import sealed
from dsb.cli import main, train_command

QUICK = '--data_set digits --model lenet300-100 --epochs 1 --batch_size 64 --n_train 128 --n_test 64 --device cpu'.split()

def ends(capsys, status, argv, command=main):
    "The one line on stderr with which `argv` ends, status checked"
    with pytest.raises(SystemExit) as e: command([str(a) for a in argv])
    err = capsys.readouterr().err
    assert e.value.code == status, err
    assert err.count('\n') == 1 and err.startswith('dsb: error: ') and 'Traceback' not in err, err
    return err

def refused(capsys, tmp_path, *options):
    "The complaint about `options`; the run must not have begun"
    out = tmp_path/'runs/run'
    err = ends(capsys, 2, ['train', *QUICK, '--out', out, *options])
    assert not out.parent.exists()
    return err

@pytest.mark.parametrize('options, says', [
    ('--sparsity 1', 'sparsity=1.0: expected a number in [0, 1)'),
    ('--sparsity -0.1', 'sparsity=-0.1: expected a number in [0, 1)'),
    ('--sparsity nan', 'sparsity=nan: expected a number in [0, 1)'),
    ('--sparsity much', "argument --sparsity: invalid float value: 'much'"),
    ('--block_size -16', 'block_size=-16: expected 0 (unstructured) or a whole number'),
    ('--block_size 1000000', 'block_size=1000000: expected 0 (unstructured) or a whole number'),
    ('--block_size 16.5', "invalid int value: '16.5'"),
    ('--T 0', 'T=0: expected a whole number of steps'),
    ('--T -5', 'T=-5: expected a whole number of steps'),
    ('--T_end 0', 'T_end=0: expected the step at which updates end'),
    ('--T_end -1', 'T_end=-1: expected the step at which updates end'),
    ('--alpha 0 --initial_ratio 1', 'alpha=0 with initial_ratio=1: no weight would ever move'),
    ('--alpha 1.01', 'alpha=1.01: expected the first drop fraction'),
    ('--epochs 0', 'epochs=0: expected a whole number, at least 1'),
    ('--batch_size 0', 'batch_size=0: expected'),
    ('--lr 0', 'lr=0.0: expected a finite number above 0'),
    ('--lr inf', 'lr=inf: expected a finite number above 0'),
    ('--momentum 1', 'momentum=1.0: expected'),
    ('--wd -1', 'weight_decay=-1.0: expected'),
    ('--seed -1', 'seed=-1: expected'),
    ('--n_train 0', 'n_train=0: expected'),
    ('--image_size 0', 'image_size=0: expected a whole number of pixels'),
    ('--image_size 64', 'only those of imagenet are scaled; leave it out'),
    ('--n_train 1', 'training image'),
    ('--n_val -1', 'n_val=-1: expected a whole number, at least 0'),
    ('--n_val some', "argument --n_val: invalid int value: 'some'"),
    ('--n_val 1437', 'n_val=1437: digits has 1437 training images, and some must be left to train on'),
    ('--n_val 1400', 'n_train=128: digits has only 37 train images beside the 1400 of n_val'),
    ('--model wrn-23-2', 'did you mean wrn-22-2?'),
    ('--model ReNet-18', 'did you mean ResNet18?'),
    ('--data_set cifar11', 'did you mean cifar10?'),
    ('--data_set digit', 'did you mean digits?'),
    ('--method dsp', "did you mean 'dsb'?"),
    ('--recipe imagnet', "did you mean 'imagenet'?"),
    ('--distribution unifrm', "did you mean 'uniform'?"),
    ('--device gpu', "device='gpu': expected one of auto, cpu, cuda"),
    ('--cuda 0,1', 'torchrun'),
    ('--sparsty 0.9', 'unknown option --sparsty; did you mean --sparsity?'),
    ('--config x', 'unknown option --config (--help lists them)'),
    ('--model nosuch', "model 'nosuch': unknown. Expected one of alexnet-s"),
    ('--rule foo', "rule='foo': expected one of paper"),
    ('0.9', "unexpected argument '0.9'"),
    ('--dropout 0.3', 'has no dropout'),
    ('--start-epoch 1', 'start_epoch=1: expected less than epochs'),
])
def test_wrong_argument(options, says, capsys, tmp_path):
    assert says in refused(capsys, tmp_path, *options.split())

@pytest.mark.parametrize('options, says', [
    ('--method dsb --block_size 0', 'blocks need a size'),
    ('--method ssb --block_size 0', 'blocks need a size'),
    ('--method rigl --block_size 16', 'use method dsb or ssb'),
    ('--method set --block_size 16', 'use method dsb or ssb'),
    ('--method static --block_size 16', 'use method dsb or ssb'),
    ('--method dense --sparsity 0.5', 'leave one of the two out'),
    ('--method dsb --sparsity 0', 'use method dense'),
    ('--method dsb --static_update y', 'that would be method ssb'),
    ('--method rigl --static_update y', 'that would be method static'),
    ('--method set --static_update y', 'that would be method static'),
    ('--method ssb --static_update n', 'that would be method dsb'),
    ('--sparsity 0 --static_update y', 'a dense layer has nothing to update'),
    ('--sparsity 0.99999 --block_size 16', 'sparsity'),
])
def test_contradiction(options, says, capsys, tmp_path):
    assert says in refused(capsys, tmp_path, *options.split())

@pytest.mark.parametrize('options, method, block_size', [
    ('--block_size 16', 'dsb', 16), ('--block_size 8 --static_update y', 'ssb', 8), ('--block_size 16 --static_update no', 'dsb', 16),
    ('', 'rigl', 0), ('--static_update yes', 'static', 0), ('--method dsb', 'dsb', 16), ('--method set', 'set', 0),
    ('--sparsity 0', 'dense', 0), ('--sparsity 0 --block_size 16', 'dense', 0), ('--method dense', 'dense', 0),
    ('--batch-size 32 --learning_rate .05 --weight_decay 0 --wd 1e-3 --start_epoch 0', 'rigl', 0),
])
def test_method(options, method, block_size, capsys, tmp_path):
    assert main(['train', *QUICK, '--T', '1', '--out', str(tmp_path/'r'), *options.split()]) == 0
    config = json.loads((tmp_path/'r/config.json').read_text(encoding='utf-8'))
    summary = json.loads((tmp_path/'r/summary.json').read_text(encoding='utf-8'))
    assert (config['method'], config['block_size']) == (summary['method'], summary['block_size']) == (method, block_size)
    assert summary['density'] == 1 if method == 'dense' else abs(summary['density'] - .1) < .01
    assert (tmp_path/'r/masks.png').exists() == (method != 'dense')
    if '--wd' in options: assert config['weight_decay'] == 1e-3 and config['batch_size'] == 32 and config['lr'] == .05

def test_original_options():
    "Each option of the two original commands, with its spelling and default"
    from dsb.cli import option_groups, options_to_config, parse_options, train_parser
    from dsb.training.train import TrainConfig
    words = ('--data_dir d --model vgg-d --epochs 3 --start-epoch 1 -b 7 --lr .2 --momentum .8 --weight-decay .1 --resume r --cuda 1 --sparsity .8 --T_end 9 '
             '--T 5 --alpha .2 --block_size 8 --data_set cifar100 --static_update y').split()
    given = vars(parse_options(train_parser(), words))
    assert given == dict(data_dir='d', model='vgg-d', epochs=3, start_epoch=1, batch_size=7, lr=.2, momentum=.8, weight_decay=.1, resume='r', cuda='1',
                         sparsity=.8, T_end=9, T=5, alpha=.2, block_size=8, data_set='cifar100', static_update='y')
    for recipe, epochs in ('cifar', 160), ('imagenet', 105):
        c = TrainConfig(**options_to_config({}, recipe))
        assert (c.model, c.epochs, c.start_epoch, c.batch_size, c.lr, c.momentum, c.weight_decay, c.cuda, c.sparsity, c.settled(391).T, c.settled(391).alpha, c.block_size, c.data_set) == \
               ('wrn-22-2', epochs, 0, 128, .1, .9, 1e-4, 0, .9, 100, .3, 0, 'cifar10')
        defaults = {names[-1]: default for _, options in option_groups() for names, _, default, _ in options}
        for option, field in ('--lr', 'lr'), ('--momentum', 'momentum'), ('--T', 'T'), ('--alpha', 'alpha'), ('--batch_size', 'batch_size'):
            usual = defaults.get(option, defaults.get('--learning-rate'))
            assert (usual[recipe] if isinstance(usual, dict) else usual) == getattr(c, field)

@pytest.mark.parametrize('recipe, words', [
    ('cifar', '--data_set cifar10 --data_dir D --model wrn-22-2 --lr 0.1 --batch_size 128 --sparsity 0.9 --epochs 160 --T_end 75000 --T 100 --block_size 16'),
    ('cifar', '--data_set cifar100 --data_dir D --model vgg-d --lr 0.1 --batch_size 128 --sparsity 0.9 --epochs 160 --T_end 75000 --T 100 --block_size 16'),
    ('imagenet', '--data_set imagenet --sparsity 0.5 --model ResNet50 --block_size 16 --batch_size 256 --T_end 400000 --T 800'),
    ('imagenet', '--data_set tinyimagenet --sparsity 0.75 --model ResNet50 --block_size 16 --batch_size 256 --T_end 400000 --T 800')])
def test_documented_commands(recipe, words):
    "The commands of the original's README, word by word"
    from dsb.cli import options_to_config, parse_options, train_parser
    from dsb.training.config import TrainConfig
    words = words.split()
    c = TrainConfig(**options_to_config(vars(parse_options(train_parser(recipe), words)), recipe))
    assert c.method == 'dsb' and c.recipe == recipe and c.epochs == {'cifar': 160, 'imagenet': 105}[recipe]
    for name, value in zip(words[::2], words[1::2]): assert str(getattr(c, name[2:])) == value
    settled = c.settled(391)
    assert (settled.T, settled.T_end) == (c.T, c.T_end)

def test_vision_transformers_go_by_their_own_recipe():
    "AdamW, warm-up, cosine and smoothed labels unless another recipe is asked for, whatever the command"
    from dsb.cli import options_to_config, parse_options, train_parser
    from dsb.training.config import RECIPES, TrainConfig
    def config(words, recipe): return TrainConfig(**options_to_config(vars(parse_options(train_parser(recipe), words.split())), recipe))
    for recipe in 'cifar', 'imagenet':
        c, r = config('--model ViT-Tiny --data_set glyphs', recipe), RECIPES['vit']
        assert (c.recipe, c.lr, c.weight_decay, c.epochs, r.optimizer) == ('vit', r.lr, r.weight_decay, r.epochs, 'adamw')
        c = config('--model vit-small --recipe short --lr .05', recipe)
        assert (c.recipe, c.lr, c.weight_decay) == ('short', .05, 1e-4)

def test_no_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert "torch sees no GPU here; use device 'cpu'" in refused(capsys, tmp_path, '--device', 'cuda')

# Files and folders

def test_unwritable_out(capsys, tmp_path):
    (tmp_path/'file').write_text('')
    err = ends(capsys, 2, ['train', *QUICK, '--out', tmp_path/'file/run'])
    assert 'cannot write to --out' in err and 'choose a folder' in err
    assert 'cannot write to --out' in ends(capsys, 2, ['train', *QUICK, '--out', '/proc/dsb'])

def test_no_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'imagenet', 'tinyimagenet':
        err = ends(capsys, 2, ['--data_set', name, '--out', tmp_path/'r'], lambda a: train_command(a, 'imagenet', 'train_imagenet.py'))
        assert '--data_dir' in err and '--data_set digits' in err and not (tmp_path/'r').exists()

def test_empty_data(capsys, tmp_path):
    for split in 'train', 'val':
        for c in 'ab': (tmp_path/'imagenet'/split/c).mkdir(parents=True)
    err = refused(capsys, tmp_path, '--data_set', 'imagenet', '--data_dir', str(tmp_path/'imagenet'), '--model', 'ResNet18', '--n_train', '2', '--n_test', '1')
    assert 'imagenet' in err and 'digits' in err

def test_own_images(tmp_path, capsys):
    "A folder of three classes in place of ImageNet: three outputs, in training and in what is loaded"
    from PIL import Image
    for split, n in ('train', 4), ('val', 2):
        for k, c in enumerate(('cats', 'dogs', 'owls')):
            (tmp_path/'photos'/split/c).mkdir(parents=True)
            for i in range(n): Image.new('RGB', (40 + 10*i, 30), (90*k, 0, 10*i)).save(tmp_path/'photos'/split/c/f'{i}.png')
    words = '--data_set imagenet --model wrn-10-1 --block_size 8 --initial_ratio 1 --T 1 --epochs 1 --batch_size 4 --image_size 48 --workers 0'
    assert main(['train', *words.split(), '--data_dir', str(tmp_path/'photos'), '--out', str(tmp_path/'r')]) == 0
    assert main(['export', str(tmp_path/'r'), '--format', 'safetensors']) == 0
    images = capsys.readouterr().out.split('images: ')[1]
    shape = [int(n) for n in images.split('(N, ')[1].split(')')[0].split(',')]
    from dsb import load
    assert shape == [3, 48, 48]
    assert load(tmp_path/'r/model.safetensors').eval()(torch.zeros(1, *shape)).shape == (1, 3)

MINE = """
import dsb
from torch import nn
def net(num_classes, in_channels=3, width=1.):
    n = round(64*width)
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels*32**2, n), nn.ReLU(), nn.Linear(n, num_classes))
dsb.register_model('mine', net)
"""

def test_own_network(tmp_path):
    "A file of Python gives a network a name; commands that are not told of the file refuse its runs and run nothing"
    (tmp_path/'mine.py').write_text(MINE)
    def run(*argv, by=dsb):
        r = by(*argv, cwd=tmp_path)
        return r.returncode,r.stdout.decode(),r.stderr.decode()
    words = '--model mine --data_set digits --epochs 1 --recipe short --n_train 64 --n_test 32 --batch_size 32'.split()
    assert run('train', '--import', 'mine.py', *words, '--method', 'dsb', '--out', 'r')[0]==0
    for argv in ['show', 'r'], ['train', *words]:
        status,_,err = run(*argv)
        assert status==2 and "'mine': unknown" in err and '--import FILE' in err and err.count('\n')==1, err
    assert 'blocks of 16' in run('show', 'r', '--import', 'mine.py')[1]
    lines = run('export', 'r', '--import', 'mine.py', '--format', 'safetensors')[1]
    code = '\n'.join([*map(str.strip, lines[lines.index('import mine'):].splitlines()), 'print(dsb.summary(model).active)'])
    assert int(run('-c', code, by=python)[1])<.2*(32*32*64+640)
    spec = dict(common=dict(zip([w[2:] for w in words[::2]], words[1::2])), methods=dict(small=dict(method='small-dense')),
                grid=dict(seed=[0], sparsity=[.5]))
    spec['common'] = {k: int(v) if v.isdigit() else v for k, v in spec['common'].items()}
    (tmp_path/'s.json').write_text(json.dumps(spec))
    assert run('sweep', 's.json', '--import', 'mine.py')[0]==0
    line, = (tmp_path/'s.jsonl').read_text().splitlines()
    assert json.loads(line)['command'].startswith('dsb train --import mine.py --model mine')

def test_flipped_byte(capsys, tmp_path, monkeypatch):
    "A CIFAR file whose checksum is wrong is not trained on, nor is it downloaded over where there is no network"
    import torchvision
    def no_network(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr('torchvision.datasets.utils._urlretrieve', no_network)
    folder = tmp_path/'data/cifar-10-batches-py'
    folder.mkdir(parents=True)
    for f, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list + [('batches.meta', '')]:
        (folder/f).write_bytes(pickle.dumps(dict(data=[0], labels=[0], label_names=['a'])))
    err = refused(capsys, tmp_path, '--data_set', 'cifar10', '--data_dir', str(tmp_path/'data'))
    assert 'is damaged' in err and '--data_set digits' in err

def test_image_too_small(capsys, tmp_path, monkeypatch):
    from dsb.training import data
    infos = data._infos()
    monkeypatch.setattr(data, '_infos', lambda: infos | dict(digits=infos['digits']._replace(image_size=2)))
    monkeypatch.setattr('torch.nn.functional.interpolate', lambda x, size, **k: x[..., :2, :2])
    assert 'too small for lenet5' in refused(capsys, tmp_path, '--model', 'lenet5')

# The folder of a run

def test_default_folder(tmp_path, monkeypatch, capsys):
    "What differs is in the name, what is the same gets a number, and a folder that is there is left alone"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'runs/digits-lenet300-100-dsb-s0.9-b16-seed0').mkdir(parents=True)
    for more in '', '', '--rule columns', '--lr .05 --T 7', '--seed 3':
        assert main(['train', *QUICK, '--method', 'dsb', *more.split()]) == 0
    folders = {p.name.removeprefix('digits-lenet300-100-dsb-s0.9-b16-'): p for p in (tmp_path/'runs').iterdir()}
    assert folders.keys() == {'seed0', 'seed0-2', 'seed0-3', 'columns-seed0', 'lr0.05-T7-seed0', 'seed3'}
    assert not list(folders.pop('seed0').iterdir()) and all((p/'last.pt').exists() for p in folders.values())
    out = capsys.readouterr().out
    for p in folders.values(): assert f', in runs/{p.name}\n' in out and f'see runs/{p.name}/curves.png' in out

def test_without_options(tmp_path, monkeypatch, capsys):
    "`dsb train` alone trains blocks on data that is there; `main.py` alone has the original's defaults"
    from dsb.cli import options_to_config
    from dsb.training.data import DataError
    seen = []
    def look(self): seen.append(self.config); raise DataError('seen')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('dsb.training.train.Trainer.train_epoch', look)
    with pytest.raises(SystemExit): main(['train'])
    c, = seen
    assert (c.method, c.block_size, c.data_set, c.epochs) == ('dsb', 16, 'digits', 10)
    assert capsys.readouterr().out.startswith('no options given, so: dsb train --data_set digits --block_size 16 ')
    o = options_to_config({})
    assert (o['method'], o['block_size'], o['data_set']) == ('rigl', 0, 'cifar10')

def test_nothing_is_left(tmp_path, monkeypatch, capsys):
    "A run that fails before its first step leaves no folder of its own, and hides no error"
    from dsb.training.data import DataError
    monkeypatch.chdir(tmp_path)
    ends(capsys, 2, ['train', *QUICK, '--n_train', '1'])
    ends(capsys, 2, ['train', *QUICK, '--out', 'a/b/c', '--n_train', '1'])
    ends(capsys, 2, ['train', *QUICK, '--out', 'a/' + 'long'*99])
    def broken(self): raise DataError('x.png is broken')
    monkeypatch.setattr('dsb.training.train.Trainer.train_epoch', broken)
    for out in [], ['--out', 'a/b/c']: assert 'x.png is broken' in ends(capsys, 2, ['train', *QUICK, *out])
    assert not list(tmp_path.iterdir())
    (tmp_path/'mine').mkdir(); (tmp_path/'mine/probe').write_text('mine')
    ends(capsys, 2, ['train', *QUICK, '--out', 'mine/new'])
    ends(capsys, 2, ['train', *QUICK, '--out', 'mine'])
    assert (tmp_path/'mine/probe').read_text(encoding='utf-8') == 'mine' and not (tmp_path/'mine/new').exists()

def test_filled_parent(tmp_path, monkeypatch, capsys):
    "Where somebody has put something into a folder that the run has made, it stays and the true error comes out"
    from dsb.training import data, train
    def fails(*args, **kwargs):
        (tmp_path/'a/other').touch()
        raise data.DataError('no data today')
    monkeypatch.setattr(train, 'load_data', fails)
    assert 'no data today' in ends(capsys, 2, ['train', *QUICK, '--out', tmp_path/'a/b/c'])
    assert [p.name for p in (tmp_path/'a').iterdir()] == ['other']

def test_folder_in_use(run, tmp_path, capsys):
    "A folder of a run that is going on is refused to others that would write to it, and to nobody else"
    from dsb.training.folder import Claim
    live = tmp_path/'live run'
    shutil.copytree(run, live)
    claim = Claim(live, resume=True)
    assert "is in use by a run that is going on" in ends(capsys, 2, ['train', '--resume', live])
    assert "already holds a run: continue it with --resume '" in ends(capsys, 2, ['train', *QUICK, '--out', live])
    (live/'last.pt').rename(live/'kept.pt')
    assert "is in use by a run that is going on" in ends(capsys, 2, ['train', *QUICK, '--out', live])
    (live/'kept.pt').rename(live/'last.pt')
    for argv in ['show', live], ['export', live], ['train', '--resume', live, '--out', tmp_path/'other']:
        assert main(list(map(str, argv))) == 0
    claim.release()
    assert main(['train', '--resume', str(live)]) == 0

# Continuing

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs')/'run'
    assert main(['train', *QUICK, '--method', 'dsb', '--T', '1', '--out', str(out)]) == 0
    return out

def test_run_folder(run):
    assert {p.name for p in run.iterdir()} >= {'config.json', 'metrics.jsonl', 'last.pt', 'best.pt', 'summary.json', 'curves.png', 'masks.png'}
    (row,) = map(json.loads, (run/'metrics.jsonl').read_text(encoding='utf-8').splitlines())
    assert {'epoch', 'step', 'lr', 'train_loss', 'train_acc', 'test_loss', 'test_acc', 'density', 'step_ms'} <= row.keys()
    assert row['updates'] and {'step', 'drop_fraction', 'planned', 'confirmed', 'grown', 'net_changed', 'survived', 'ever_active'} <= row['updates'][0].keys()
    summary = json.loads((run/'summary.json').read_text(encoding='utf-8'))
    assert {'best_acc', 'final_acc', 'method', 'density', 'block_size', 'seconds'} <= summary.keys()

def test_folder_is_taken(run, capsys):
    err = ends(capsys, 2, ['train', *QUICK, '--out', run])
    assert 'already holds a run' in err and f'--resume {run}' in err

@pytest.mark.parametrize('options, says', [
    ('--lr 0.2', '--lr 0.2 contradicts the run in'), ('--epochs 9', 'which has 1'), ('--sparsity 0.8', 'which has 0.9'), ('--block_size 8', 'which has 16'),
    ('--static_update y', 'which has method dsb'), ('--method rigl', 'which has dsb'), ('--seed 1', 'which has 0'), ('--n_val 9', '--n_val 9 contradicts'), ('--model mlp', 'which has lenet300-100'),
    ('--amp', 'which has None'), ('--print_freq -1', 'print_freq=-1'), ('--device gpu', "device='gpu'")])
def test_resume_contradiction(options, says, run, capsys):
    assert says in ends(capsys, 2, ['train', '--resume', run, *options.split()])

def test_resume_complete(run, capsys):
    assert main(['train', '--resume', str(run), '--device', 'cpu', '--lr', '.1', '--model', 'LeNet-300-100', '--static_update', 'n', '--print_freq', '5']) == 0
    assert 'is complete' in capsys.readouterr().out

def test_resume_elsewhere(run, tmp_path, capsys):
    assert main(['train', '--resume', str(run/'best.pt'), '--out', str(tmp_path/'b')]) == 0
    assert {p.name for p in (tmp_path/'b').iterdir()} == {p.name for p in run.iterdir()} - {'dense.pt'}
    assert (tmp_path/'b/metrics.jsonl').read_bytes() == (run/'metrics.jsonl').read_bytes()

def foreign(run, d, kind):
    "A file that is no checkpoint"
    f = d/'x.pt'
    if kind == 'missing': return f
    if kind == 'empty folder': return d
    data = (run/'last.pt').read_bytes()
    if kind == 'truncated': f.write_bytes(data[:len(data)//2])
    if kind == 'empty': f.write_bytes(b'')
    if kind == 'text': f.write_text('epoch 3')
    if kind == 'state dict': torch.save(torch.nn.Linear(2, 2).state_dict(), f)
    if kind == 'code': torch.save(dict(format=dict(name='dsb-run', version=1), config=Path('x')), f)
    ck = torch.load(run/'last.pt', weights_only=True)
    if kind == 'version': torch.save(ck | dict(format=dict(name='dsb-run', version=99)), f)
    if kind == 'lacks': ck.pop('opt'); torch.save(sealed(ck), f)
    if kind == 'config': torch.save(sealed(ck | dict(config=ck['config'] | dict(colour='red'))), f)
    if kind == 'weights': ck['model'].popitem(); torch.save(sealed(ck), f)
    if kind == 'older': torch.save(ck | dict(format=dict(name='dsb-run', version=1)), f)
    if kind == 'unsealed': torch.save(ck | dict(step=3), f)
    return f

@pytest.mark.parametrize('kind, says', [
    ('missing', 'no checkpoint at'), ('empty folder', 'no checkpoint at'), ('truncated', 'truncated or of another program'), ('empty', 'truncated or of another program'), ('older', 'by an older dsb'), ('unsealed', 'not as it was written'),
    ('text', 'truncated or of another program'), ('state dict', "no 'format' entry"), ('code', 'of another program'), ('version', 'format version 99'),
    ('lacks', 'it lacks opt'), ('config', 'does not fit this dsb'), ('weights', 'does not fit this dsb')])
def test_resume_foreign(kind, says, run, tmp_path, capsys):
    assert says in ends(capsys, 2, ['train', '--resume', foreign(run, tmp_path, kind)])

# While training

def test_nan(capsys, tmp_path, monkeypatch):
    "A loss that is not finite: status 1, the step named, the last good checkpoint kept"
    from dsb.training.train import Trainer
    step = Trainer.train_step
    def spoilt(self, x, y):
        if self.step == 3: next(self.model.parameters()).data.fill_(math.nan)
        return step(self, x, y)
    monkeypatch.setattr(Trainer, 'train_step', spoilt)
    out = tmp_path/'r'
    err = ends(capsys, 1, ['train', *QUICK, '--epochs', '3', '--method', 'dsb', '--out', out])
    assert 'not finite at step 4 (epoch 2)' in err and str(out/'last.pt') in err and '--lr' in err
    ck = torch.load(out/'last.pt', weights_only=True)
    assert ck['step'] == 2 and all(v.isfinite().all() for v in ck['model'].values())
    assert not (out/'summary.json').exists()

def test_diverges_by_itself(capsys, tmp_path):
    err = ends(capsys, 1, ['train', *QUICK, '--epochs', '9', '--lr', '1e30', '--out', tmp_path/'r'])
    assert 'not finite' in err and 'no checkpoint was written before' in err
    assert not (tmp_path/'r/last.pt').exists()

def test_recipes(tmp_path, capsys):
    "The ImageNet command, in small: warm-up over 1/21 of the run, falls at 2/7, 2/3 and 6/7"
    argv = [*QUICK, '--epochs', '21', '--batch_size', '32', '--out', str(tmp_path/'r'), '--print_freq', '1']
    assert train_command(argv, 'imagenet', 'train_imagenet.py') == 0
    rows = [json.loads(l) for l in (tmp_path/'r/metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [round(r['lr'], 9) for r in rows] == [.1]*6 + [.01]*8 + [.001]*4 + [.0001]*3
    assert 'step      1  batch 1/4' in capsys.readouterr().out

def test_same_seed(tmp_path):
    "The same seed gives the same run, another seed another"
    for name, seed in ('a', 0), ('b', 0), ('c', 1):
        assert main(['train', *QUICK, '--method', 'set', '--T', '1', '--seed', str(seed), '--out', str(tmp_path/name)]) == 0
    a, b, c = (json.loads((tmp_path/n/'summary.json').read_text(encoding='utf-8')) for n in 'abc')
    rows = [json.loads((tmp_path/n/'metrics.jsonl').read_text(encoding='utf-8'))['train_loss'] for n in 'abc']
    assert (a['structure'], rows[0]) == (b['structure'], rows[1]) and a['structure'] != c['structure'] and rows[0] != rows[2]

def test_amp(tmp_path):
    assert main(['train', *QUICK, '--model', 'wrn-10-1', '--amp', '--method', 'dsb', '--block_size', '8', '--n_train', '64', '--T', '1', '--out', str(tmp_path/'r')]) == 0

# The other commands, and real processes

def test_show(run, capsys):
    (run/'masks.png').unlink()
    assert main(['show', str(run)]) == 0
    out = capsys.readouterr().out
    assert 'lenet300-100 on digits: dsb, sparsity 0.9, blocks of 16, pruned from 3 times as many, erk; seed 0, 1 of 1 epochs' in out and (run/'masks.png').exists()
    assert 'no checkpoint at' in ends(capsys, 2, ['show', run/'nothing'])

def test_export(run, capsys, tmp_path):
    from dsb.training.data import load_data
    from dsb.training.models import create_model
    assert main(['export', str(run)]) == 0
    assert str(run/'dense.pt') in capsys.readouterr().out
    model = create_model('lenet300-100', num_classes=10, image_size=32, in_channels=1)
    model.load_state_dict(torch.load(run/'dense.pt', weights_only=True))
    hits = sum((model.eval()(x).argmax(1) == y).sum() for x, y in load_data('digits', channels=1, n_test=64).test_batches())
    assert int(hits)/64 == json.loads((run/'summary.json').read_text(encoding='utf-8'))['best_acc']
    assert 'cannot write to' in ends(capsys, 2, ['export', run, '--out', run/'last.pt/x.pt'])
    assert main(['export', str(run), '--out', str(tmp_path/'new/w.pt')]) == 0

def test_eval(run, capsys):
    "What is said of a folder is its best model's accuracy, and nothing is written"
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*')}
    best = json.loads((run/'summary.json').read_text(encoding='utf-8'))['best_acc']
    for path, name in (run, 'best.pt'), (run/'last.pt', 'last.pt'):
        capsys.readouterr()
        assert main(['train', '--eval', str(path)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f'{run/name}, epoch 1: test {best:.2%}, loss ') and ', 64 images\nmost often mistaken: ' in out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob('*')}
    for options, says in ('--lr 0.2', '--lr 0.2 contradicts the run in'), ('--out x', '--out with --eval'), ('--data_dir x', ''):
        argv = ['train', '--eval', run, *options.split()]
        if says: assert says in ends(capsys, 2, argv)
        else: assert main(list(map(str, argv))) == 0
    assert 'no checkpoint at' in ends(capsys, 2, ['train', '--eval', run/'nothing'])

def test_confusion(run):
    m = torch.tensor(json.loads((run/'summary.json').read_text(encoding='utf-8'))['confusion'])
    assert m.shape == (10, 10) and m.sum() == 64 and (run/'confusion.png').stat().st_size > 1000
    assert m.diagonal().sum().item()/64 == json.loads((run/'summary.json').read_text(encoding='utf-8'))['final_acc']

def test_logger(tmp_path, capsys):
    assert "logger='tb': expected one of csv, tensorboard" in ends(capsys, 2, ['train', *QUICK, '--logger', 'tb', '--out', tmp_path/'r'])
    assert not (tmp_path/'r').exists()
    assert main(['train', *QUICK, '--logger', 'csv', '--out', str(tmp_path/'r')]) == 0
    head, row = (tmp_path/'r/metrics.csv').read_text().splitlines()
    acc = json.loads((tmp_path/'r/metrics.jsonl').read_text(encoding='utf-8'))['test_acc']
    assert float(dict(zip(head.split(','), row.split(',')))['test_acc']) == acc

def changed(run, d, change):
    "A copy of a run whose checkpoint `change` has changed"
    shutil.copytree(run, d/'odd', ignore=shutil.ignore_patterns('best.pt', 'dense.pt', '*.png'))
    ck = torch.load(d/'odd/last.pt', weights_only=True)
    change(ck)
    torch.save(sealed(ck), d/'odd/last.pt')
    return d/'odd'

@pytest.mark.parametrize('change, says', [
    (lambda ck: ck['config'].update(colour='red'), "config has 'colour', which this dsb does not know"),
    (lambda ck: ck['config'].pop('model'), 'config lacks model'),
    (lambda ck: ck['config'].update(lr='fast'), "lr='fast': expected a number"),
    (lambda ck: ck['config'].update(model='ReNet-18'), 'did you mean ResNet18?'),
    (lambda ck: ck['config'].update(model='mlp'), 'the checkpoint does not fit its own config'),
    (lambda ck: ck.update(config=None), 'config is None'),
    (lambda ck: ck['info'].pop('image_size'), 'info.image_size is missing'),
    (lambda ck: ck['info'].update(num_classes='ten'), "info.num_classes is 'ten'"),
    (lambda ck: ck['history'][0].pop('updates'), 'history[0].updates is missing'),
    (lambda ck: ck['history'][0]['updates'][0].pop('net_changed'), 'history[0].updates[0].net_changed is missing'),
    (lambda ck: ck['history'][0].update(train_acc='50 %'), "train_acc is '50 %'"),
    (lambda ck: ck['history'].append(3), 'history[1] is 3, expected an object'),
    (lambda ck: ck.update(history={}), 'history is {}, expected a list'),
    (lambda ck: ck.update(best=dict(acc=.5)), 'best.epoch is missing'),
    (lambda ck: ck.update(start=dict(conv=3)), "start['conv'] is 3, expected a tensor of bytes"),
    (lambda ck: ck.update(step='8'), "step is '8', expected a whole number"),
    (lambda ck: ck['model'].clear(), 'the checkpoint does not fit its own config')])
def test_odd_checkpoint(change, says, run, tmp_path, capsys):
    "An older or a foreign checkpoint ends each command with one line"
    odd = changed(run, tmp_path, change)
    assert says in ends(capsys, 2, ['show', odd]) and says in ends(capsys, 2, ['export', odd])
    err = ends(capsys, 2, ['train', '--resume', odd, '--out', tmp_path/'new/run'])
    assert says in err or 'does not fit this dsb' in err
    assert not (tmp_path/'new').exists() and not (odd/'dense.pt').exists()

def test_validation(tmp_path, capsys):
    "Every report says by what the best epoch was chosen, and shows both accuracies"
    out = str(tmp_path/'v')
    assert main(['train', *QUICK, '--epochs', '3', '--eval_every', '2', '--n_val', '40', '--out', out]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(l) for l in (tmp_path/'v/metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    best = max(rows[1:], key=lambda r: r['val_acc'])
    told = f"{best['epoch']} (validation {best['val_acc']:.2%}, test {best['test_acc']:.2%}), last test {rows[-1]['test_acc']:.2%}, "
    assert lines[-1].startswith(f'best epoch by validation accuracy: {told}')
    assert [f"{r['val_acc']:6.2%}" in l for r, l in zip(rows[1:], lines[-3:-1])] == [True, True] and ' val ' not in lines[-4]
    assert rows[0]['val_acc'] is rows[0]['test_loss'] is None
    for argv in ['show'], ['export'], ['train', '--resume']: assert main([*argv, out]) == 0
    said = capsys.readouterr().out
    assert ' val loss   val acc  test loss  test acc ' in said and f"\nbest epoch by validation accuracy: {best['epoch']}\n" in said
    assert f"after epoch {best['epoch']}, the best by validation accuracy. To load it" in said
    ck = torch.load(tmp_path/'v/last.pt', weights_only=True)
    ck['history'][-1].pop('val_loss'); torch.save(sealed(ck), tmp_path/'v/last.pt')
    assert 'history[2].val_loss is missing' in ends(capsys, 2, ['show', out])

@pytest.mark.parametrize('change, says', [
    (lambda ck: ck['rng'].clear(), 'rng has 0 states'),
    (lambda ck: ck.update(rng=[[torch.zeros(3)]]), 'rng[0][0] is a tensor (3,) of float32'),
    (lambda ck: ck.update(rng=[[torch.zeros(3, dtype=torch.uint8)]]), 'does not fit this dsb or its data'),
    (lambda ck: ck.update(opt={}), 'opt.state is missing'), (lambda ck: ck['opt']['param_groups'][0].update(momentum=-1), 'other settings'),
    (lambda ck: ck['opt']['param_groups'][0].update(weight_decay=None), 'other settings'),
    (lambda ck: ck.update(upd=None), 'upd is None'), (lambda ck: ck['upd'].update(t=math.nan), 'upd.t is nan'),
    (lambda ck: ck.pop('sums'), "it lacks sums"), (lambda ck: ck['info'].update(world=3), 'rng has 1 states, expected 3'),
    (lambda ck: ck['start'].popitem(), 'on one side only'), (lambda ck: ck.update(more=1), 'it has more, which this dsb does not know')])
def test_odd_state(change, says, run, tmp_path, capsys):
    odd = changed(run, tmp_path, change)
    before = {p: p.read_bytes() for p in odd.iterdir()}
    assert says in ends(capsys, 2, ['train', '--resume', odd])
    assert {p: p.read_bytes() for p in odd.iterdir()} == before

def test_falls_back(run, tmp_path, capsys):
    "A folder whose last checkpoint is damaged goes on from the one before, and says so; nothing good is lost by that"
    odd = changed(run, tmp_path, lambda ck: None)
    good = (odd/'last.pt').read_bytes()
    (odd/'last-1.pt').write_bytes(good)
    (odd/'last.pt').write_bytes(good[:3000] + bytes([good[3000] ^ 4]) + good[3001:])
    assert main(['show', str(odd)]) == main(['train', '--resume', str(odd)]) == 0
    err = capsys.readouterr().err
    assert err.count('dsb: warning: ') == 2 and err.count(f"going back to {odd/'last-1.pt'}, step") == 2
    assert 'damaged' in ends(capsys, 2, ['train', '--resume', odd/'last.pt'])
    (odd/'last-1.pt').unlink()
    assert 'damaged' in ends(capsys, 2, ['train', '--resume', odd])
    (odd/'best.pt').write_bytes(b'')
    assert 'best.pt' in ends(capsys, 2, ['export', odd])

def test_export_of_odd_weights(run, tmp_path, capsys):
    for bad in math.nan, math.inf:
        odd = changed(run, tmp_path/str(bad), lambda ck: next(v for v in ck['model'].values() if v.is_floating_point()).view(-1)[:1].fill_(bad))
        for words in ['export'], ['show'], ['train', '--resume']: assert 'expected a tensor of finite numbers' in ends(capsys, 2, [*words, odd])
        assert not (odd/'dense.pt').exists()

@pytest.mark.parametrize('words', (['--resume='], ['--resume', ''], ['--resume', '--'], ['--out='], ['--resume', 'x'*402], ['--resume', 'x/'*999]))
def test_names_nothing(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends(capsys, 2, ['train', *QUICK, *words])
    assert not list(tmp_path.iterdir())

def test_unreadable(run, tmp_path, capsys):
    (tmp_path/'last.pt').symlink_to(tmp_path/'last.pt')               # a link to itself
    for argv in ['show'], ['export'], ['train', '--resume']: assert 'last.pt' in ends(capsys, 2, [*argv, tmp_path])
    assert 'no checkpoint at' in ends(capsys, 2, ['show', tmp_path/('long'*99)])

def test_show_where_nothing_can_be_written(run, capsys, monkeypatch):
    def refuse(*args): raise OSError(30, 'Read-only file system')
    monkeypatch.setattr('dsb.core.os.replace', refuse)
    assert main(['show', str(run)]) == 0
    out = capsys.readouterr().out
    assert 'blocks of 16' in out and f'nothing drawn: {run} cannot be written to (Read-only file system)' in out

@pytest.mark.parametrize('name', ['weights.pt', "it's \"mine\" \\ ×.pt", 'für dich.pt'])
def test_export_prints_a_program(name, run, tmp_path, capsys):
    "The lines that export prints load the network, in a session that has imported nothing"
    assert main(['export', str(run), '--out', str(tmp_path/name)]) == 0
    printed = capsys.readouterr().out
    lines = textwrap.dedent(printed[printed.index('\n')+1:])
    exec(lines + 'assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 10)', {})
    assert f'cannot write to --out {tmp_path}: it is a folder' in ends(capsys, 2, ['export', run, '--out', tmp_path])

def test_export_small_dense(tmp_path, capsys):
    assert main(['train', *QUICK, '--method', 'small-dense', '--sparsity', '.8', '--out', str(tmp_path/'r')]) == 0
    capsys.readouterr()
    assert main(['export', str(tmp_path/'r')]) == 0
    printed = capsys.readouterr().out
    assert 'width=' in printed
    exec(textwrap.dedent(printed[printed.index('\n')+1:]), {})

def test_command(capsys):
    assert main([]) == 0 and 'usage: dsb COMMAND' in capsys.readouterr().out
    assert 'did you mean train?' in ends(capsys, 2, ['trian'])
    assert main(['--version']) == 0

def call(root, *argv, **kwargs):
    "A real process"
    return subprocess.run([sys.executable, *map(str, argv)], cwd=root, capture_output=True, text=True, timeout=120, **kwargs)

def test_help(root):
    "Help names every option, and comes before torch is imported"
    from dsb.cli import option_groups
    alone = "import sys, types; m = types.ModuleType('dsb'); m.__path__ = ['dsb']; sys.modules['dsb'] = m; import dsb.cli as c; " \
            "t = c.train_parser(sys.argv[1]).format_help(); assert 'torch' not in sys.modules; print(t)"
    for recipe, epochs in ('cifar', 160), ('imagenet', 105):
        text = call(root, '-c', alone, recipe).stdout
        assert f'default {epochs}' in text
        for _, options in option_groups():
            for names, *_ in options: assert all(n in text for n in names)
    assert call(root, 'main.py', '--help').returncode == call(root, 'train_imagenet.py', '--help').returncode == 0

def test_error_in_a_process(root, tmp_path):
    p = call(root, 'main.py', '--data_set', 'cifar11', '--out', tmp_path/'r')
    assert p.returncode == 2 and p.stdout == '' and p.stderr.startswith('dsb: error: ') and p.stderr.count('\n') == 1

# Terminals, pipes and languages

HERE = dict(PYTHONPATH=str(Path(__file__).parent.parent))

def python(*argv, cwd=None, **env):
    "Python as a process of its own"
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, env=os.environ | HERE | env, capture_output=True, timeout=120)

def dsb(*argv, **kwargs): return python('-m', 'dsb.cli', *argv, **kwargs)

PLAIN = dict(LC_ALL='C', PYTHONUTF8='0')
TERMINALS = dict(c=PLAIN, c_strict=PLAIN | dict(PYTHONIOENCODING='ascii:strict'),
                 cp1252=dict(PYTHONIOENCODING='cp1252', PYTHONUTF8='0'), koi8=dict(PYTHONIOENCODING='koi8-r'))

@pytest.fixture(scope='module')
def foreign_run(run, tmp_path_factory):
    "The finished run in a folder with spaces and letters of several alphabets"
    folder = tmp_path_factory.mktemp('runs')/'Прогоны für 測試'
    shutil.copytree(run, folder/'rün 1')
    return folder

@pytest.mark.parametrize('terminal', TERMINALS)
def test_terminal(terminal, foreign_run):
    "Every character is shown somehow, and those of ours readably"
    r = dsb('show', 'rün 1', cwd=foreign_run, **TERMINALS[terminal])
    encoding = TERMINALS[terminal].get('PYTHONIOENCODING', 'ascii').partition(':')[0]
    out = r.stdout.decode(encoding, 'replace')
    assert r.returncode == 0 and r.stderr == b'', r.stderr
    assert any(f'100{x}300' in out for x in '×x') and 'dense.pt' not in out and '\\xd7' not in out and '?' not in out
    r = dsb('train', *QUICK, '--model', '×ünï…', cwd=foreign_run, **TERMINALS[terminal])
    assert r.returncode == 2 and r.stderr.startswith(b'dsb: error: ') and r.stderr.count(b'\n') == 1

@pytest.mark.parametrize('command', ['train --help', 'bench layers --help', 'bench gpu --help', 'sweep --help', '--help'])
def test_help_in_ascii(command):
    r = dsb(*command.split(), **TERMINALS['c_strict'])
    assert r.returncode == 0 and r.stderr == b'' and r.stdout.isascii() and b'\\x' not in r.stdout
    if command == 'train --help': assert b'BxB blocks' in r.stdout

def test_train_in_ascii(tmp_path):
    "Trained, exported and loaded under a locale that knows no letter of the folder's name"
    folder = tmp_path/'Ö ñ 日本'; folder.mkdir()
    assert dsb('train', *QUICK, '--method', 'dsb', '--T', 1, '--out', 'läuft', cwd=folder, **PLAIN).returncode == 0
    assert (folder/'läuft/summary.json').exists()
    r = dsb('export', 'läuft', '--out', 'größe.pt', cwd=folder, **TERMINALS['c_strict'])
    lines = textwrap.dedent(r.stdout.decode('ascii', 'surrogateescape').partition('\n')[2])
    for env in PLAIN, {}:
        p = python('-c', lines, cwd=folder, **env)
        assert p.returncode == 0, p.stderr

def shell(line, cwd, *words):
    "A line of the shell in which DSB is the command with its words; (status of the command, stdout, stderr)"
    words = ['sh', '-c', line.replace('DSB', '{ "$@"; echo $? >status; }'), 'sh', sys.executable, '-m', 'dsb.cli', *words]
    r = subprocess.run(words, cwd=cwd, env=os.environ | HERE, capture_output=True, timeout=120)
    return int((Path(cwd)/'status').read_text(encoding='utf-8')), r.stdout, r.stderr

@pytest.mark.parametrize('line, command', [
    *(('DSB | head -1', c) for c in ('train --help', 'show rün_1', 'bench step --help', '--version', 'export rün_1')),
    *((l, 'show rün_1') for l in ('DSB | true', 'DSB | head -c1', 'DSB >&-'))])
def test_closed_pipe(line, command, foreign_run):
    status, _, err = shell(line, foreign_run, *(w.replace('_', ' ') for w in command.split()))
    assert (status, err) == (0, b'')

def test_pictures_are_drawn_for_nobody(foreign_run):
    "The pictures of `dsb show` do not depend on who reads the table"
    (foreign_run/'rün 1/masks.png').unlink()
    assert shell('DSB | true', foreign_run, 'show', 'rün 1')[0] == 0 and (foreign_run/'rün 1/masks.png').exists()

def test_error_for_nobody(tmp_path):
    "The status of an error does not depend on who reads it"
    for line in 'DSB 2>&1 | true', 'DSB >&- 2>&-': assert shell(line, tmp_path, 'train', '--sparsty', '1')[0] == 2

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_full_disk_behind_stdout(tmp_path):
    "The run goes on; that some of its lines are lost is said in the end"
    status, _, err = shell('DSB >/dev/full', tmp_path, 'train', *QUICK, '--out', 'r')
    assert status == 1 and err.count(b'\n') == 1 and b'stdout cannot be written to (No space left on device)' in err
    assert (tmp_path/'r/summary.json').exists()

def test_current_folder_cannot_be_written(tmp_path):
    where = '/proc/self' if os.path.isdir('/proc/self') else pytest.skip('no /proc')
    r = dsb('train', *QUICK, cwd=where)
    assert r.returncode == 2 and b'cannot write to --out runs/digits' in r.stderr and r.stderr.count(b'\n') == 1
    r = dsb('train', *QUICK, '--out', tmp_path/'r', cwd=where)
    assert r.returncode == 0, r.stderr

def head_of(capfd, tmp_path, *options):
    "The headline of a small run without its title, and what stood on stderr"
    out = tmp_path/'run'
    assert main([str(o) for o in ('train', *QUICK, '--out', out, *options)]) == 0
    printed, err = capfd.readouterr()
    return printed.splitlines()[1:printed.splitlines().index(next(l for l in printed.splitlines() if l.startswith('epoch ')))], err

@pytest.mark.parametrize('options, numbers', [((), 'float32'), (('--amp',), 'bfloat16 by autocast')])
def test_headline_says_numbers_and_kernels(options, numbers, capfd, tmp_path):
    "Under --amp too, where `slow` stands if and only if plain torch computes; `dsb show` agrees"
    lines, err = head_of(capfd, tmp_path, '--block_size', '16', *options)
    assert lines[1].startswith(f'Computed in {numbers}: ') and 'plain torch' not in err
    assert ('plain torch, slow' in lines[1]) == any(l.startswith('slow: ') for l in lines)
    assert main(['show', str(tmp_path/'run')]) == 0
    assert lines[1] in capfd.readouterr().out

def test_headline_says_what_is_slow(capfd, tmp_path):
    "A size without kernels is said in the headline, and not warned of again"
    lines, err = head_of(capfd, tmp_path, '--block_size', '4')
    assert 'plain torch, slow (the cpu kernels take blocks of' in lines[1] and lines[2].startswith('slow: ')
    assert 'plain torch' not in err
