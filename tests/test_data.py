"Loaders on small files in the true on-disk formats, exact continuation, the cache, and every refusal"
import gzip, hashlib, io, os, pickle, socket, struct, subprocess, sys, tarfile, threading, time, urllib.error, zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from dsb.training.data import (FASHION_FILES, FASHION_RAW, DataError, IdxFile, batch_bounds, cache_dir, dataset_info,
                               dataset_names, load_data)
from dsb.training.glyphs import make_glyphs

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Each test has its own cache, its own current folder, and no data sets of the system's"
    monkeypatch.setenv('DSB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr('dsb.training.data.FASHION_SYSTEM', tmp_path/'system')
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')

def listing(root): return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in Path(root).rglob('*'))

def joined(batches): return tuple(torch.cat(t) for t in zip(*batches))

def normalised(x, name):
    "Pixels (..., C, H, W) in [0,1] less the mean of data set `name`, over its standard deviation"
    mean,std = (torch.tensor(v).view(-1,1,1) for v in (dataset_info(name).mean, dataset_info(name).std))
    return (x-mean)/std

def same(a, b): return len(a)==len(b) and all((x==x2).all() and (y==y2).all() for (x,y),(x2,y2) in zip(a, b))

def refuses(contains, *args, **kwargs):
    "The call raises a one-line `DataError` that says `contains`"
    with pytest.raises(DataError) as e: load_data(*args, **kwargs)
    message = str(e.value)
    assert contains in message and '\n' not in message, message
    return message

# ---------------------------------------------------------------- CIFAR

def write_cifar(root, name, monkeypatch, n=20):
    "A small CIFAR in the format of the real one; torchvision's md5 lists are set to these files"
    cls,rng = dict(cifar10=CIFAR10, cifar100=CIFAR100)[name],np.random.default_rng(0)
    folder,key,k = root/cls.base_folder,('labels' if name=='cifar10' else 'fine_labels'),dataset_info(name).num_classes
    folder.mkdir(parents=True)
    def put(f, obj):
        raw = pickle.dumps(obj, protocol=2)
        (folder/f).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()
    def batch():
        x,y = rng.integers(0, 256, (n,3072), dtype=np.uint8),rng.integers(0, k, n).tolist()
        return {'data': x, key: y, 'batch_label': 'b', 'filenames': ['f']*n}
    for split in ('train_list', 'test_list'):
        monkeypatch.setattr(cls, split, [[f, put(f, batch())] for f,_ in getattr(cls, split)])
    names = [f'class {i}' for i in range(k)]
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': put(cls.meta['filename'], {cls.meta['key']: names})})
    return cls,folder

@pytest.mark.parametrize('name,n_train', [('cifar10',100), ('cifar100',20)])
def test_cifar(name, n_train, tmp_path, monkeypatch):
    cls,folder = write_cifar(tmp_path/'c', name, monkeypatch)
    before = listing(tmp_path/'c')
    d = load_data(name, data_dir=tmp_path/'c', batch_size=16)
    ref,info = cls(str(tmp_path/'c'), train=False),dataset_info(name)
    assert (d.n_train, d.n_test, d.num_classes, d.image_size, d.channels) == (n_train, 20, info.num_classes, 32, 3)
    assert d.classes==ref.classes
    x,y = joined(d.test_batches())
    assert y.tolist()==ref.targets and x.dtype==torch.float32 and y.dtype==torch.int64
    assert torch.allclose(x, normalised(torch.tensor(ref.data).permute(0,3,1,2)/255, name), atol=1e-5)
    assert sum(len(y) for _,y in d.train_batches(0))==n_train
    assert listing(tmp_path/'c')==before
    assert load_data(name, data_dir=folder).n_train==n_train  # the inner folder may be named too

def test_cifar_flipped_byte(tmp_path, monkeypatch):
    cls,folder = write_cifar(tmp_path, 'cifar10', monkeypatch)
    f = folder/'data_batch_3'
    raw = bytearray(f.read_bytes()); raw[len(raw)//2] ^= 1; f.write_bytes(raw)
    message = refuses(str(f), 'cifar10', data_dir=tmp_path)
    assert dict(cls.train_list)['data_batch_3'] in message and 'delete it and let it be downloaded again' in message

def test_cifar_default_folders(tmp_path, monkeypatch):
    write_cifar(tmp_path/'here', 'cifar10', monkeypatch)
    assert load_data('cifar10').n_train==100 and not Path('data').exists()
    Path('data').mkdir(); os.rename('cifar-10-batches-py', 'data/cifar-10-batches-py')
    assert load_data('cifar10').n_train==100

def test_cifar_other_files_in_the_current_folder(tmp_path):
    for f in ('train', 'test', 'meta'): Path(f).write_text('mine')
    refuses('was not found', 'cifar100', download=False)

def test_cifar_archive(tmp_path, monkeypatch):
    cls,folder = write_cifar(tmp_path/'c', 'cifar10', monkeypatch)
    archive = tmp_path/'a'/cls.filename
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as t: t.add(folder, cls.base_folder)
    assert 'is damaged' in refuses(str(archive), 'cifar10', data_dir=archive.parent)  # not the archive of the md5 list
    monkeypatch.setattr(cls, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    assert load_data('cifar10', data_dir=archive.parent, download=False).n_train==100
    assert sorted(p.name for p in archive.parent.iterdir())==[cls.base_folder, cls.filename]

@pytest.fixture
def serve():
    "Serve a folder on this machine; returns its address"
    servers = []
    def start(folder):
        class Quiet(SimpleHTTPRequestHandler):
            def __init__(self, *args): super().__init__(*args, directory=str(folder))
            def log_message(self, *args): pass
        servers.append(ThreadingHTTPServer(('127.0.0.1', 0), Quiet))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}/'
    yield start
    for s in servers: s.shutdown(); s.server_close()

def test_cifar_download(tmp_path, monkeypatch, serve):
    "From a server on this machine, into a folder that does not exist yet"
    cls,folder = write_cifar(tmp_path/'c', 'cifar10', monkeypatch)
    archive = tmp_path/cls.filename
    with tarfile.open(archive, 'w:gz') as t: t.add(folder, cls.base_folder)
    monkeypatch.setattr(cls, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cls, 'url', serve(tmp_path)+cls.filename)
    assert load_data('cifar10').n_train==100
    assert [p.name for p in Path('data').iterdir()]==[cls.base_folder]
    os.remove(Path('data')/cls.base_folder/'test_batch')  # a missing file is fetched again
    assert load_data('cifar10').n_test==20

def test_cifar_no_network(tmp_path, monkeypatch):
    def lost(*args, **kwargs): raise urllib.error.URLError('no route')
    monkeypatch.setattr('urllib.request.urlopen', lost)
    message = refuses('no route', 'cifar10')
    for part in ('data and the current folder', CIFAR10.url, '--data_dir', '--data_set digits needs nothing'):
        assert part in message
    refuses('no route', 'cifar100', data_dir=tmp_path/'new')
    assert not Path('data').exists() and not (tmp_path/'new').exists()
    (tmp_path/'mine').mkdir(); refuses('no route', 'cifar10', data_dir=tmp_path/'mine')
    assert list((tmp_path/'mine').iterdir())==[]

def test_cifar_download_cut_short(tmp_path, monkeypatch, serve):
    monkeypatch.setattr(CIFAR10, 'url', serve(tmp_path)+CIFAR10.filename)
    refuses('404', 'cifar10')
    (tmp_path/CIFAR10.filename).write_bytes(b'half of it')
    refuses('the download failed', 'cifar10')
    assert not Path('data').exists()

# ---------------------------------------------------------------- Fashion-MNIST

def idx(x):
    "An array of bytes as an IDX file"
    return struct.pack(f'>{1+x.ndim}I', 0x800+x.ndim, *x.shape) + x.tobytes()

def write_fashion(root, monkeypatch, packed=True, n=(40,20), seed=0):
    "A small Fashion-MNIST in the format of the real one, which it takes the place of; returns the unpacked files"
    rng,raws,known = np.random.default_rng(seed),{},{}
    root.mkdir(parents=True, exist_ok=True)
    for name,real in FASHION_FILES.items():
        shape = (n['t10k' in name], *real.shape[1:])
        raws[name] = idx(rng.integers(0, real.below, shape, dtype=np.uint8))
        known[name] = IdxFile(shape, hashlib.md5(raws[name]).hexdigest(), real.below)
        if packed: (root/f'{name}.gz').write_bytes(gzip.compress(raws[name]))
        else: (root/name).write_bytes(raws[name])
    monkeypatch.setattr('dsb.training.data.FASHION_FILES', known)
    return raws

def fashion_refuses(contains, root, **kwargs):
    message = refuses(contains, 'fashion-mnist', data_dir=root, download=False, **kwargs)
    assert '--data_set digits needs nothing' in message
    return message

@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('place', ['.', 'fashion-mnist', FASHION_RAW])
def test_fashion(place, packed, tmp_path, monkeypatch):
    root = tmp_path/'f'
    raws = write_fashion(root/place, monkeypatch, packed)
    before = listing(root)
    d = load_data('fashion-mnist', data_dir=root, channels=1, batch_size=16)
    assert (d.n_train, d.n_test, d.num_classes, d.image_size, d.channels)==(40, 20, 10, 32, 1)
    x,y = joined(d.test_batches())
    assert y.tolist()==list(raws['t10k-labels-idx1-ubyte'][8:]) and (x.dtype, y.dtype)==(torch.float32, torch.int64)
    pixels = torch.tensor(list(raws['t10k-images-idx3-ubyte'][16:]), dtype=torch.uint8).view(20, 1, 28, 28)
    padded = torch.nn.functional.pad(pixels, (2,2,2,2))
    assert torch.allclose(x, normalised(padded/255, 'fashion-mnist'), atol=1e-5)
    epoch = list(d.train_batches(0))
    assert joined(epoch)[1].bincount().tolist()==np.bincount(list(raws['train-labels-idx1-ubyte'][8:])).tolist()
    assert same(epoch[1:], list(d.train_batches(0, start=1)))
    assert listing(root)==before and list(cache_dir().iterdir())==[]

def test_fashion_like_torchvision(tmp_path, monkeypatch):
    "The same images, labels and classes as torchvision reads from the same files"
    write_fashion(tmp_path/FASHION_RAW, monkeypatch, packed=False)
    d = load_data('fashion-mnist', data_dir=tmp_path/'FashionMNIST', channels=1)
    for (x,y),train in (d.train, True), (d.test, False):
        ref = FashionMNIST(str(tmp_path), train=train)
        assert (x[:,0,2:30,2:30]==ref.data).all() and (y==ref.targets).all() and d.classes==ref.classes

def test_fashion_places(tmp_path, monkeypatch):
    "The given folder, ./data, the current folder, and the system's where none of them has the files"
    raws = write_fashion(tmp_path/'system', monkeypatch)
    for where in (None, tmp_path, tmp_path/'nowhere'): assert load_data('fashion-mnist', data_dir=where).n_train==40
    assert not Path('data').exists() and not (tmp_path/'nowhere').exists()
    for folder in ('.', 'data/fashion-mnist'):             # the later ones are looked at first
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder)/'t10k-labels-idx1-ubyte').write_bytes(b'')
        for name,raw in raws.items(): (Path(folder)/f'{name}.gz').write_bytes(gzip.compress(raw))
        assert load_data('fashion-mnist', download=False).n_test==20
        (Path(folder)/'t10k-labels-idx1-ubyte.gz').unlink()
        fashion_refuses(str(Path(folder)/'t10k-labels-idx1-ubyte is damaged'), None)

def test_fashion_parts_and_processes(tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch)
    def load(**kwargs): return load_data('fashion-mnist', data_dir=tmp_path, batch_size=10, **kwargs)
    part = load(n_train=25, n_test=7)
    assert (part.n_train, part.n_test, part.steps_per_epoch, part.channels)==(25, 7, 3, 3)
    refuses('n_train=41: fashion-mnist has only 40 train images', 'fashion-mnist', data_dir=tmp_path, n_train=41)
    whole,ranks = load(),[load(rank=r, world_size=2) for r in (0,1)]
    for (x,y),(x0,y0),(x1,y1) in zip(whole.train_batches(2), *(r.train_batches(2) for r in ranks), strict=True):
        assert (torch.cat([x0,x1])==x).all() and (torch.cat([y0,y1])==y).all()
    assert sum(len(y) for r in ranks for _,y in r.test_batches())==20

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def attempt(root):
    "The data in `root`, or the one line that refuses it"
    try:
        d = load_data('fashion-mnist', data_dir=root, channels=1, download=False)
        return [*d.train, *d.test]
    except DataError as e: return str(e)

@pytest.mark.parametrize('packed', [True, False])
def test_fashion_flipped_bytes(packed, tmp_path, monkeypatch):
    "A changed byte is refused by the name of its file, or changes nothing, as some in gzip's header do"
    write_fashion(tmp_path, monkeypatch, packed)
    files,want = sorted(p for p in tmp_path.iterdir() if p.is_file()),attempt(tmp_path)
    @FEW
    @given(st.sampled_from(files), st.integers(0, 2**20), st.integers(1, 255), st.sampled_from(['any', 'head']))
    def check(file, at, flip, part):
        good = file.read_bytes()
        bad = bytearray(good); bad[at % (len(bad) if part=='any' else 24)] ^= flip; file.write_bytes(bad)
        try: got = attempt(tmp_path)
        finally: file.write_bytes(good)
        if isinstance(got, str): assert got.startswith(f'{file} is damaged: ') and '\n' not in got and 'digits' in got
        else: assert packed and all((a==b).all() for a,b in zip(got, want, strict=True))
    check()

@pytest.mark.parametrize('packed', [True, False])
def test_fashion_cut_short(packed, tmp_path, monkeypatch):
    write_fashion(tmp_path, monkeypatch, packed)
    for file in sorted(p for p in tmp_path.iterdir() if p.is_file()):
        good = file.read_bytes()
        short = [good[:n] for n in (0, 1, 9, 17, len(good)//2, len(good)-4, len(good)-1)]
        for bad in (*short, good+b'more', good*2):
            file.write_bytes(bad)
            fashion_refuses(f'{file} is damaged', tmp_path)
        file.write_bytes(good)

def test_fashion_bomb(tmp_path, monkeypatch):
    "A packed file that unpacks to much more than it should is not unpacked to its end"
    raws = write_fashion(tmp_path, monkeypatch)
    name = 'train-labels-idx1-ubyte'
    bomb = gzip.compress(raws[name] + bytes(1_000_000))
    (tmp_path/f'{name}.gz').write_bytes(bomb[:-20])        # at its end is what nobody should come to
    fashion_refuses(f'{name}.gz is damaged: it has more bytes, expected 48', tmp_path)

WRONG = {   # name -> (what the file holds instead, what is said)
    'train-images-idx3-ubyte': (np.zeros((39,28,28), np.uint8), 'it holds 39×28×28, expected 40×28×28'),
    'train-labels-idx1-ubyte': (np.zeros(41, np.uint8), 'it holds 41, expected 40'),
    't10k-images-idx3-ubyte':  (np.zeros((20,32,32), np.uint8), 'it holds 20×32×32, expected 20×28×28'),
    't10k-labels-idx1-ubyte':  (np.full(20, 10, np.uint8), 'it holds label 10, expected 0 to 9')}

@pytest.mark.parametrize('name', WRONG)
def test_fashion_wrong_files(name, tmp_path, monkeypatch):
    "Intact archives of other counts, sizes or labels, files changed for one another, another data set"
    raws,(wrong,says) = write_fashion(tmp_path/'f', monkeypatch),WRONG[name]
    file,good = tmp_path/'f'/f'{name}.gz',gzip.compress(raws[name])
    file.write_bytes(gzip.compress(idx(wrong))); fashion_refuses(f'{file} is damaged: {says}', tmp_path/'f')
    for other in raws.keys()-{name}:
        file.write_bytes(gzip.compress(raws[other])); fashion_refuses(f'{file} is damaged: it ', tmp_path/'f')
    file.write_bytes(good); assert load_data('fashion-mnist', data_dir=tmp_path/'f').n_train==40
    with monkeypatch.context() as m: others = write_fashion(tmp_path/'mnist', m, seed=1)
    file.write_bytes(gzip.compress(others[name])); fashion_refuses('a wrong byte, or another data set', tmp_path/'f')

def test_fashion_no_archive(tmp_path, monkeypatch):
    raws = write_fashion(tmp_path, monkeypatch)
    file = tmp_path/'train-images-idx3-ubyte.gz'
    for raw in raws['train-images-idx3-ubyte'], b'<html>not found</html>':
        file.write_bytes(raw)
        fashion_refuses(f'{file} is damaged: Not a gzipped file', tmp_path)

def fashion_server(folder, raws, monkeypatch, serve):
    "Serve packed files; torchvision's addresses and checksums are set to them"
    folder.mkdir()
    for name,raw in raws.items(): (folder/f'{name}.gz').write_bytes(gzip.compress(raw))
    md5s = [(f'{name}.gz', hashlib.md5((folder/f'{name}.gz').read_bytes()).hexdigest()) for name in raws]
    monkeypatch.setattr(FashionMNIST, 'resources', md5s)
    monkeypatch.setattr(FashionMNIST, 'mirrors', [serve(folder)])

def test_fashion_download(tmp_path, monkeypatch, serve, capfd):
    "Into torchvision's own folder, which both read afterwards; a missing file is fetched again"
    raws = write_fashion(tmp_path/'away', monkeypatch)
    fashion_server(tmp_path/'served', raws, monkeypatch, serve)
    refuses('downloading is off', 'fashion-mnist', download=False)
    want = list(load_data('fashion-mnist', data_dir=tmp_path/'away').test_batches())
    assert same(list(load_data('fashion-mnist').test_batches()), want)
    assert [p.name for p in Path('data').iterdir()]==['FashionMNIST'] and len(FashionMNIST('data'))==40
    for p in Path('data', FASHION_RAW).glob('t10k-labels*'): p.unlink()
    refuses(f'data/{FASHION_RAW} has no t10k-labels-idx1-ubyte.gz; downloading is off', 'fashion-mnist', download=False)
    assert same(list(load_data('fashion-mnist').test_batches()), want)
    assert capfd.readouterr()==('', '')

def test_fashion_no_network(tmp_path, monkeypatch):
    def lost(*args, **kwargs): raise urllib.error.URLError('no route')
    monkeypatch.setattr('urllib.request.urlopen', lost)
    message = refuses('no route', 'fashion-mnist')
    for part in ('data and the current folder', 'dataset-fashion-mnist', 'train-images-idx3-ubyte.gz', '--data_dir',
                 '--data_set digits needs nothing'): assert part in message
    refuses('no route', 'fashion-mnist', data_dir=tmp_path/'new')
    assert not Path('data').exists() and not (tmp_path/'new').exists()

def test_fashion_download_damaged(tmp_path, monkeypatch, serve):
    "Half a file, none at all, and a server that talks nonsense: one line, and nothing is left behind"
    fashion_server(tmp_path/'served', write_fashion(tmp_path/'away', monkeypatch), monkeypatch, serve)
    file = tmp_path/'served'/'t10k-images-idx3-ubyte.gz'
    file.write_bytes(file.read_bytes()[:1000]); refuses('the download failed', 'fashion-mnist')
    file.unlink(); refuses('404', 'fashion-mnist')
    with socket.create_server(('127.0.0.1', 0)) as s:
        def nonsense():
            while True:
                try: c,_ = s.accept()
                except OSError: return
                with c: c.recv(4096); c.sendall(b'nonsense\r\n\r\n')
        threading.Thread(target=nonsense, daemon=True).start()
        monkeypatch.setattr(FashionMNIST, 'mirrors', [f'http://127.0.0.1:{s.getsockname()[1]}/'])
        refuses('the download failed (nonsense', 'fashion-mnist')
    assert not Path('data').exists()

def test_fashion_files():
    "What is known about the real files: as many labels as images, ten classes, four different contents"
    a,b,c,d = FASHION_FILES.values()
    assert (a.shape, b.shape, c.shape, d.shape)==((60000,28,28), (60000,), (10000,28,28), (10000,))
    assert [p.split('.')[0] for p,_ in FashionMNIST.resources]==list(FASHION_FILES)
    assert len({f.md5 for f in FASHION_FILES.values()})==4 and len(FashionMNIST.classes)==b.below==d.below==10

# ---------------------------------------------------------------- Tiny-ImageNet

WNIDS = 'n01443537', 'n01629819', 'n02056570'

def jpeg(rng, size=64, mode='RGB'):
    buf = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size,size,3), dtype=np.uint8)).convert(mode).save(buf, 'JPEG')
    return buf.getvalue()

def write_tiny(root, per_class=6, n_val=9):
    rng,top = np.random.default_rng(0),root/'tiny-imagenet-200'
    (top/'val'/'images').mkdir(parents=True)
    (top/'test'/'images').mkdir(parents=True)
    (top/'test'/'images'/'test_0.JPEG').write_bytes(jpeg(rng))
    (top/'wnids.txt').write_text('\n'.join(WNIDS[::-1]) + '\n')
    (top/'words.txt').write_text('\n'.join(f'{w}\tname of {w}' for w in WNIDS))
    for w in WNIDS:
        (top/'train'/w/'images').mkdir(parents=True)
        for i in range(per_class):
            (top/'train'/w/'images'/f'{w}_{i}.JPEG').write_bytes(jpeg(rng, mode='L' if i==0 else 'RGB'))
        (top/'train'/w/f'{w}_boxes.txt').write_text(f'{w}_0.JPEG\t0\t10\t63\t58\n')
    labels = [WNIDS[i*2 % 3] for i in range(n_val)]
    for i in range(n_val): (top/'val'/'images'/f'val_{i}.JPEG').write_bytes(jpeg(rng))
    rows = [f'val_{i}.JPEG\t{w}\t0\t32\t44\t62\n' for i,w in enumerate(labels)]
    (top/'val'/'val_annotations.txt').write_text(''.join(rows))
    return top,labels

def test_tinyimagenet(tmp_path):
    top,labels = write_tiny(tmp_path/'t')
    before = listing(tmp_path/'t')
    d = load_data('tinyimagenet', data_dir=tmp_path/'t', batch_size=5)
    assert (d.n_train, d.n_test, d.num_classes, d.image_size)==(18, 9, 3, 64)
    x,y = joined(d.test_batches())
    assert y.tolist()==[WNIDS.index(w) for w in labels]
    first = torch.tensor(np.asarray(Image.open(top/'val'/'images'/'val_0.JPEG'))).permute(2,0,1)/255
    assert torch.allclose(x[0], normalised(first, 'tinyimagenet'), atol=1e-5)
    again = load_data('tinyimagenet', data_dir=top, batch_size=5)  # the folder itself, this time from the cache
    assert same(list(d.train_batches(1)), list(again.train_batches(1)))
    assert same(list(d.train_batches(1))[2:], list(d.train_batches(1, start=2)))
    assert listing(tmp_path/'t')==before and len(list(cache_dir().iterdir()))==1

def test_tinyimagenet_zip(tmp_path):
    top,_ = write_tiny(tmp_path/'t')
    (tmp_path/'z').mkdir()
    with zipfile.ZipFile(tmp_path/'z'/'tiny-imagenet-200.zip', 'w') as z:
        for p in sorted(top.rglob('*')): z.write(p, p.relative_to(tmp_path/'t'))
    before = listing(tmp_path/'z')
    a,b = load_data('tinyimagenet', data_dir=tmp_path/'z'),load_data('tinyimagenet', data_dir=tmp_path/'t')
    assert same(list(a.train_batches(0)), list(b.train_batches(0)))
    assert same(list(a.test_batches()), list(b.test_batches()))
    assert listing(tmp_path/'z')==before
    assert load_data('tinyimagenet', data_dir=tmp_path/'z'/'tiny-imagenet-200.zip').n_train==18

def test_tinyimagenet_zip_flipped_byte(tmp_path):
    top,_ = write_tiny(tmp_path/'t')
    file = tmp_path/'tiny-imagenet-200.zip'
    with zipfile.ZipFile(file, 'w') as z:
        for p in sorted(top.rglob('*')): z.write(p, p.relative_to(tmp_path/'t'))
        where = z.getinfo(f'tiny-imagenet-200/train/{WNIDS[0]}/images/{WNIDS[0]}_3.JPEG')
    raw = bytearray(file.read_bytes()); raw[where.header_offset+500] ^= 1; file.write_bytes(raw)
    refuses(f'{WNIDS[0]}_3.JPEG is damaged (Bad CRC-32', 'tinyimagenet', data_dir=tmp_path)

def test_tinyimagenet_changed_file_is_noticed(tmp_path):
    top,_ = write_tiny(tmp_path)
    old = list(load_data('tinyimagenet', data_dir=tmp_path).test_batches())
    (top/'val'/'images'/'val_0.JPEG').write_bytes(jpeg(np.random.default_rng(9)))
    assert not same(old, list(load_data('tinyimagenet', data_dir=tmp_path).test_batches()))

def tiny_refuses(contains, root): refuses(contains, 'tinyimagenet', data_dir=root)

def test_tinyimagenet_damage(tmp_path):
    top,_ = write_tiny(tmp_path)
    f = top/'train'/WNIDS[1]/'images'/f'{WNIDS[1]}_2.JPEG'
    raw = f.read_bytes()
    f.write_bytes(raw[:200]); tiny_refuses(f'{WNIDS[1]}_2.JPEG is damaged', tmp_path)
    f.write_bytes(jpeg(np.random.default_rng(0), size=32)); tiny_refuses('32×32 pixels, expected 64×64', tmp_path)
    f.write_bytes(raw)
    (tmp_path/'z').mkdir(); (tmp_path/'z'/'tiny-imagenet-200.zip').write_bytes(b'PK half')
    tiny_refuses('zip: the archive is damaged', tmp_path/'z')

def test_tinyimagenet_incomplete(tmp_path):
    top,_ = write_tiny(tmp_path)
    one,notes,images = top/'val'/'images'/'val_4.JPEG',top/'val'/'val_annotations.txt',top/'train'/WNIDS[0]/'images'
    one.rename(top/'away'); tiny_refuses('has no val/images/val_4.JPEG', tmp_path); (top/'away').rename(one)
    images.rename(top/'away'); tiny_refuses(f'has no train/{WNIDS[0]}', tmp_path); (top/'away').rename(images)
    notes.write_text('val_0.JPEG\tn99\t0\t0\t9\t9\n'); tiny_refuses('has no class n99 of val_0.JPEG', tmp_path)
    notes.unlink(); tiny_refuses('has no val/val_annotations.txt', tmp_path)

# ---------------------------------------------------------------- ImageNet

def write_imagenet(root, classes=('n01','n02','n03'), train=5, val=2):
    rng = np.random.default_rng(0)
    for split,n in (('train',train), ('val',val)):
        for c in classes:
            (root/split/c).mkdir(parents=True)
            for i in range(n): (root/split/c/f'{c}_{i}.JPEG').write_bytes(jpeg(rng, 80+20*i, 'L' if i==1 else 'RGB'))
    return root

def test_imagenet(tmp_path):
    write_imagenet(tmp_path/'imagenet')
    before = listing(tmp_path)
    torch.manual_seed(1); state = torch.get_rng_state()
    d = load_data('imagenet', data_dir=tmp_path, batch_size=4)
    assert (d.n_train, d.n_test, d.num_classes, d.image_size, d.classes)==(15, 6, 3, 224, ['n01','n02','n03'])
    full = list(d.train_batches(2))
    assert [len(y) for _,y in full]==[4,4,4,3] and full[0][0].shape==(4,3,224,224)
    x,y = joined(d.test_batches())
    assert y.tolist()==[0,0,1,1,2,2] and x.shape==(6,3,224,224)
    assert (torch.get_rng_state()==state).all() and listing(tmp_path)==before
    workers = load_data('imagenet', data_dir=tmp_path/'imagenet', batch_size=4, workers=2)
    for w in (d, workers):
        assert same(full, list(w.train_batches(2))) and same(full[1:], list(w.train_batches(2, start=1)))
    assert (torch.get_rng_state()==state).all()
    assert not same(full, list(d.train_batches(3)))
    ranks = [load_data('imagenet', data_dir=tmp_path, batch_size=4, rank=r, world_size=2) for r in (0,1)]
    for (x,_),(x0,_),(x1,_) in zip(full, *(r.train_batches(2) for r in ranks)):
        assert (torch.cat([x0,x1])==x[:2*len(x0)]).all()
    assert load_data('imagenet', data_dir=tmp_path, n_train=7, n_test=3, channels=1).steps_per_epoch==1

def test_imagenet_damage(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path/'train'/'n02'/'n02_3.JPEG').write_bytes(b'no picture')
    for workers in (0,1):
        d = load_data('imagenet', data_dir=tmp_path, workers=workers)
        with pytest.raises(DataError) as e: list(d.train_batches(0))
        assert 'n02_3.JPEG cannot be read as an image' in str(e.value) and '\n' not in str(e.value)
    for p in (tmp_path/'val'/'n03').iterdir(): p.unlink()
    refuses('n03', 'imagenet', data_dir=tmp_path)
    (tmp_path/'val'/'n03').rmdir(); refuses('only one has n03', 'imagenet', data_dir=tmp_path)

def test_imagenet_empty(tmp_path):
    for s in ('train','val'): (tmp_path/s).mkdir()
    refuses('one folder of images for each class', 'imagenet', data_dir=tmp_path)

# ---------------------------------------------------------------- validation

def write_any(name, root, monkeypatch):
    "A small data set of that name, where it is one of files"
    if name in ('cifar10', 'cifar100'): write_cifar(root, name, monkeypatch)
    if name=='fashion-mnist': write_fashion(root, monkeypatch)
    if name=='tinyimagenet': write_tiny(root)

@pytest.mark.parametrize('name,n_val', [('cifar10',15), ('cifar100',7), ('fashion-mnist',9), ('digits',100), ('tinyimagenet',6)])
def test_validation(name, n_val, tmp_path, monkeypatch):
    "Training and validation images are the training images of before, each in one of the two; nothing moves the latter"
    write_any(name, tmp_path/'d', monkeypatch)
    def load(**kwargs): return load_data(name, data_dir=tmp_path/'d', batch_size=4, eval_batch_size=5, **kwargs)
    plain,d = load(),load(n_val=n_val)
    last = list(range(plain.n_train))[-n_val:]
    if name=='tinyimagenet':      # 18 images, class after class, of which every third is the end of a sixth
        last = [2,5,8,11,14,17]
        assert d.val[1].bincount().tolist()==[2,2,2]
    left = [i for i in range(plain.n_train) if i not in last]
    for a,b in zip(plain.train, d.train): assert torch.equal(a[left], b)
    for a,b in zip(plain.train, d.val): assert torch.equal(a[last], b)
    assert (d.n_train, d.n_val, plain.n_val)==(plain.n_train-n_val, n_val, 0)
    x,y = joined(d.val_batches())
    assert torch.allclose(x, normalised(plain.train[0][last]/255, name).expand_as(x), atol=1e-5) and torch.equal(y, plain.train[1][last])
    assert same(list(plain.test_batches()), list(d.test_batches())) and list(plain.val_batches())==[]
    for seed in 0,1:              # a part of what is left, and the same validation images
        few = load(n_val=n_val, n_train=len(left)//2, seed=seed)
        assert len(few.train[0])==len(left)//2 and same([few.val], [d.val])
        pictures = set(map(bytes, few.train[0].numpy()))
        assert pictures <= set(map(bytes, d.train[0].numpy())) and not pictures & set(map(bytes, d.val[0].numpy()))
    ranks = [load(n_val=n_val, rank=r, world_size=2) for r in (0,1)]
    shares = [joined(r.val_batches())[1] for r in ranks]
    assert torch.equal(shares[0], y[::2]) and torch.equal(shares[1], y[1::2])
    refuses(f'n_val={plain.n_train}: {name} has {plain.n_train} training images, and some must be left', name, data_dir=tmp_path/'d', n_val=plain.n_train)
    refuses(f'has only {len(left)} train images beside the {n_val} of n_val', name, data_dir=tmp_path/'d', n_val=n_val, n_train=len(left)+1)

def test_validation_glyphs(monkeypatch):
    "The last of all 50 000, beside the same first ones as without them"
    calls = []
    def numbered(n, seed, split, progress):       # an image that is nothing but its number
        calls.append((n, split))
        return torch.arange(n).view(-1,1,1,1).expand(-1,3,1,1),torch.arange(n) % 47
    monkeypatch.setattr('dsb.training.data.make_glyphs', numbered)
    monkeypatch.setattr('dsb.training.data.cached', lambda name, make: make())
    d,plain = (load_data('glyphs', n_train=1000, n_test=10, **kwargs) for kwargs in (dict(n_val=500), {}))
    assert torch.equal(d.train[0], plain.train[0]) and d.val[0][:,0,0,0].tolist()==list(range(49_500, 50_000))
    assert calls==[(50_000,'train'), (10,'test'), (1000,'train'), (10,'test')]
    assert len(load_data('glyphs', n_test=10, n_val=500).train[0])==49_500
    refuses('n_train=49501: glyphs has only 49500 train images beside the 500 of n_val', 'glyphs', n_train=49_501, n_test=10, n_val=500)

def test_validation_imagenet(tmp_path):
    "Every class gives as many, seen like test images, by any number of workers"
    from torchvision import transforms as T
    write_imagenet(tmp_path)
    plain,d = (load_data('imagenet', data_dir=tmp_path, batch_size=4, eval_batch_size=4, **kwargs) for kwargs in ({}, dict(n_val=6)))
    train,val = plain.images.train,d.images.held['val']
    assert [y for _,y in val]==[0,0,1,1,2,2] and sorted(val+d.images.train)==train and d.images.held['test']==plain.images.held['test']
    assert (d.n_train, d.n_val, d.n_test)==(9, 6, 6)
    x,y = joined(d.val_batches())
    info = dataset_info('imagenet')
    tfm = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(info.mean, info.std)])
    assert torch.allclose(x, torch.stack([tfm(Image.open(p).convert('RGB')) for p,_ in val]), atol=1e-5) and y.tolist()==[y for _,y in val]
    workers = load_data('imagenet', data_dir=tmp_path, eval_batch_size=4, workers=2, n_val=6, seed=5)
    assert same(list(d.val_batches()), list(workers.val_batches()))
    few = load_data('imagenet', data_dir=tmp_path, n_val=6, n_train=5)
    assert few.images.held['val']==val and set(few.images.train) < set(d.images.train)
    refuses('n_val=15: imagenet has 15 training images, and some', 'imagenet', data_dir=tmp_path, n_val=15)

# ---------------------------------------------------------------- embedded data

def test_digits():
    d = load_data('digits', batch_size=64)
    assert (d.n_train, d.n_test, d.num_classes, d.image_size, d.channels)==(1437, 360, 10, 32, 3)
    full = list(d.train_batches(5))
    def epoch(seed, **kwargs): return list(load_data('digits', batch_size=64, seed=seed).train_batches(5, **kwargs))
    assert same(full, epoch(0)) and same(full[9:], epoch(0, start=9)) and not same(full, epoch(1))
    train,test = (set(map(bytes, t[0][:,0].numpy())) for t in (d.train, d.test))
    assert len(train & test)==0
    assert load_data('digits', n_train=100, n_test=50).n_test==50

CODE = """
import hashlib, sys, torch
from dsb.training.glyphs import make_glyphs
torch.set_num_threads(int(sys.argv[1]))
x,y = make_glyphs(500, 3, 'test')
print(hashlib.md5(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest())
"""

def test_glyphs_same_in_every_process():
    x,y = make_glyphs(500, 3, 'test')
    here = hashlib.md5(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    for threads in '1','2':
        r = subprocess.run([sys.executable, '-c', CODE, threads], env=env, capture_output=True, text=True, check=True)
        assert r.stdout.strip()==here

def test_glyphs_cache():
    d = load_data('glyphs', n_train=300, n_test=50)
    assert (d.n_train, d.n_test, d.num_classes)==(300, 50, 47)
    file, = cache_dir().iterdir()
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good)//2] ^= 255
    for bad in (b'', good[:1000], good[:-500], flipped, pickle.dumps(print, 2)):
        file.write_bytes(bad)
        assert same(list(d.train_batches(0)), list(load_data('glyphs', n_train=300, n_test=50).train_batches(0)))
        assert file.read_bytes()==good and [file]==list(cache_dir().iterdir())
    stamp = file.stat().st_mtime_ns
    load_data('glyphs', n_train=300, n_test=50)
    assert file.stat().st_mtime_ns==stamp
    load_data('glyphs', n_train=301, n_test=50)
    assert len(list(cache_dir().iterdir()))==2

def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('in the way')
    monkeypatch.setenv('DSB_CACHE', str(tmp_path/'file'/'cache'))
    with pytest.warns(UserWarning, match='cannot be written'): d = load_data('glyphs', n_train=10, n_test=10)
    assert d.n_train==10

def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv('DSB_CACHE'); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'x'))
    assert cache_dir()==tmp_path/'x'/'dsb'
    monkeypatch.delenv('XDG_CACHE_HOME'); monkeypatch.setenv('HOME', str(tmp_path))
    assert cache_dir()==tmp_path/'.cache'/'dsb'

# ---------------------------------------------------------------- sharing and refusing

@pytest.mark.parametrize('n', [2, 3, 17, 64, 65, 100])
@pytest.mark.parametrize('batch_size,world', [(1,1), (2,1), (16,1), (16,2), (16,8), (64,4)])
def test_batch_bounds(n, batch_size, world):
    bounds = batch_bounds(n, batch_size, world)
    flat = [i for a,b in bounds for i in range(a, b)]
    assert flat==list(range(len(flat))) and n-len(flat)<2*world
    assert all((b-a)%world==0 and (b-a>=2*world or b-a==batch_size) for a,b in bounds)

REFUSED = [
    (dict(name='cifr10'), 'did you mean cifar10?'), (dict(name='mnist'), 'did you mean fashion-mnist?'),
    (dict(name=''), 'expected one of'), (dict(batch_size=0), 'batch_size=0'), (dict(batch_size=-5), 'batch_size=-5'),
    (dict(batch_size=1.5), 'batch_size=1.5'), (dict(eval_batch_size=0), 'eval_batch_size=0'),
    (dict(n_train=0), 'n_train=0'), (dict(n_test=0), 'n_test=0'), (dict(n_test=361), 'has only 360 test images'),
    (dict(n_train=1), 'at least 2'), (dict(n_val=-1), 'n_val=-1: expected a whole number, at least 0'),
    (dict(n_val=1436), 'at least 2'), (dict(n_val=.5), 'n_val=0.5'), (dict(workers=-1), 'workers=-1'), (dict(channels=2), 'channels=2'),
    (dict(world_size=3), 'multiple of world_size=3'), (dict(world_size=2, rank=2), 'rank=2')]

@pytest.mark.parametrize('kwargs,message', REFUSED)
def test_refusals(kwargs, message): refuses(message, **{'name':'digits', **kwargs})

@pytest.mark.parametrize('name', ['cifar10','cifar100','tinyimagenet','imagenet','fashion-mnist'])
def test_missing(name, tmp_path):
    t = time.time()
    for where in (tmp_path/'nowhere', None):
        message = refuses('needs nothing', name, data_dir=where, download=False)
        assert (str(where) if where else 'current folder') in message and '--data_dir' in message
    assert time.time()-t<5 and not (tmp_path/'nowhere').exists() and not Path('data').exists()

def test_info():
    assert dataset_names()==['cifar10','cifar100','tinyimagenet','imagenet','fashion-mnist','digits','glyphs']
    assert [dataset_info(n).num_classes for n in dataset_names()]==[10,100,200,1000,10,10,47]
