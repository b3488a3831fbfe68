"How sources are put together and where kernels are built: users without a home, folders of others, damaged files, strange compilers, languages"
import os, re, shutil, signal, stat, subprocess, sys, time, warnings
from pathlib import Path
import pytest
from dsb.dev.site import read_cells
from dsb.kernels import build, cpu, norm, packing, vectors

CXX = next(filter(None, map(shutil.which, ('c++','g++','clang++'))), None)
pytestmark = pytest.mark.skipif(CXX is None, reason='no C++ compiler')
SOURCE = 'extern "C" int answer(){ return 41; }'
here = Path(__file__).resolve().parent.parent

def made(name='t', source=SOURCE):
    "(answer of the library or None, reason why there is none), with the warnings there were"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        build._warn.cache_clear()
        lib,reason = build.library.__wrapped__(name, source)
    assert [reason in str(o.message) for o in w]==[True]*bool(reason)      # one warning, or none
    return lib and lib.answer(),reason

def start(code, **env):
    "Python code in a process of its own"
    env = {k:v for k,v in (os.environ | dict(PYTHONPATH=str(here)) | env).items() if v is not None}
    pipes = dict.fromkeys(('stdin','stdout','stderr'), subprocess.PIPE)
    return subprocess.Popen([sys.executable,'-c',code], env=env, **pipes)

def end(p):
    "(exit status, stdout, stderr)"
    out,err = p.communicate(timeout=240)
    return p.returncode,out.decode(errors='replace').strip(),err.decode(errors='replace')

LOAD = f'from dsb.kernels.build import library; lib,why = library("t", {SOURCE!r}); print(lib and lib.answer(), why)'

# ---------------------------------------------------------------- pieces

rooms = [m.cpp for m in (vectors, packing, cpu, norm)]
own = [(o, name) for o in rooms for name,piece in o.known.items() if piece.place==o.place]

@pytest.mark.parametrize('room', rooms, ids=[o.place for o in rooms])
def test_pieces_are_where_they_say(room):
    "The notebook that a compiler's error names is there, and has a cell for each of its pieces"
    cells = [c.source for c in read_cells(here/room.place) if c.code and c.exported]
    added = [m for c in cells for m in re.findall(r"^cpp\('(\w+)', '", c, re.M)]
    assert added==[name for o,name in own if o is room]

def alone(room, name):
    "A piece with all that it says it needs, in a namespace of its own; and the headers among that"
    lines = room.source(name).splitlines()
    headers = {o for o in lines if o.startswith('#include')}
    body = '\n'.join('' if o in headers else o.replace('extern "C" ', '') for o in lines)
    return f'namespace alone_{Path(room.place).stem}_{name} {{\n{body}\n}}\n',headers

def test_pieces_say_what_they_need():
    "Each of them compiles with what it names and nothing else; one compiler looks at all of them, for the sake of time"
    texts,headers = zip(*(alone(*o) for o in own))
    x86 = '#include <immintrin.h>'
    top = '\n'.join(sorted(set().union(*headers)-{x86}) + ['#if defined(__x86_64__) || defined(__i386__)', x86, '#endif\n'])
    cxx,flags,_ = build.command()
    r = subprocess.run([*cxx,*flags,'-fsyntax-only','-x','c++','-'], input=top+''.join(texts), capture_output=True, encoding='utf-8')
    assert r.returncode==0, [o for o in r.stderr.splitlines() if 'error' in o][:5]

def test_pieces_include_what_they_use():
    library = re.compile(r'\bstd::|\bmem(cpy|set|cmp)\(|\bu?int\d+_t\b')
    bare = [name for (room,name) in own if library.search(room.known[name].text) and not alone(room, name)[1]]
    assert not bare, bare

def test_errors_name_the_piece(cache):
    "Through the whole way: the reason why there is no library says where to look, and shows no folder of this machine"
    room,piece = build.Pieces(packing.cpp.place, packing.cpp),packing.cpp.known['tiled']
    lines = piece.text.splitlines()
    room('tiled', ' '.join(piece.needs), '\n'.join([*lines[:3], '  this is no C++', *lines[3:]]))
    value,reason = made(source=room.source('tiled'))
    assert value is None and 'nbs/kernels/04_packing.ipynb#tiled:4:' in reason
    assert not re.search(r'(^|[ :])/', reason), reason

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder"
    monkeypatch.setenv('DSB_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

# ---------------------------------------------------------------- folders

nobody = 'import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n'

@pytest.mark.parametrize('home', [None, '', '/proc/self', 'relative'])
def test_no_home(home, tmp_path):
    "Without a home, and without an account, libraries lie in a folder of the user's own among the temporary files"
    if home and home[0]=='/' and not os.path.isdir(home): pytest.skip('no /proc')
    tmp = tmp_path/'tmp'; tmp.mkdir()
    env = dict(HOME=home, DSB_CACHE=None, XDG_CACHE_HOME=None, TMPDIR=str(tmp))
    for building in (1, 0):
        status,out,err = end(start(nobody+LOAD, **env))
        assert (status, out, err.count('building'), err.count('Warning'))==(0, '41', building, 0), err
    folder, = tmp.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode)==0o700 and [o.suffix for o in folder.iterdir()]==['.so']

def test_pictures_without_home(tmp_path):
    "matplotlib fails at its import where there is no home; here it gets one"
    code = nobody+'import os; from dsb.training.plot import plot_lr\nplot_lr({"a": [1., 2.]}).savefig("/dev/null", format="png")\n' \
                  'print(os.environ["MPLCONFIGDIR"])'
    for home in (None, '/proc/self'):
        tmp = tmp_path/str(len(home or '')); tmp.mkdir()
        env = dict.fromkeys(('MPLCONFIGDIR','DSB_CACHE','XDG_CACHE_HOME','XDG_CONFIG_HOME'))
        status,out,err = end(start(code, **env, HOME=home, TMPDIR=str(tmp)))
        assert (status, err)==(0, '') and Path(out).parent.parent==tmp

def test_data_cache_without_home(tmp_path, monkeypatch):
    from dsb.training.data import cached
    import torch
    (tmp_path/'tmp').mkdir()
    for k in ('DSB_CACHE','XDG_CACHE_HOME'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', '/proc/self'); monkeypatch.setattr('tempfile.tempdir', str(tmp_path/'tmp'))
    for _ in range(2): assert torch.equal(cached('x', lambda: (torch.arange(3),))[0], torch.arange(3))
    assert [o.name for o in (tmp_path/'tmp').rglob('*.pt')]==['x.pt']

evil = SOURCE + '\n#include <unistd.h>\n__attribute__((constructor)) static void run(){ _exit(99); }'

@pytest.mark.parametrize('mode', [0o777, 0o775, 0o1777])
def test_folder_of_others(mode, cache):
    "What lies where others can write is not loaded, however whole it is"
    cache.mkdir(); cache.chmod(0o700)
    build.compile_library(evil, cache/build._file_name('t', SOURCE, *build.command()), *build.command())
    assert end(start(LOAD))[0]==99                         # so much for a folder that is closed
    cache.chmod(mode)
    status,out,err = end(start(LOAD))
    assert status==0 and out.startswith('None') and err.count('Warning')==1
    assert f'others can write to {cache}' in err and 'DSB_CACHE' in err

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()!=0, reason='only root can give files away')
def test_file_of_another_user(cache):
    assert made()[0]==41
    file, = cache.iterdir()
    os.chown(file, 12345, -1); assert not build._intact(file)
    os.chown(file, 0, -1); os.chown(cache, 12345, -1); assert not build._intact(file)
    value,reason = made()
    assert value is None and f'others can write to {cache}' in reason

def test_unwritable_but_whole(cache, monkeypatch):
    "A library that is there is loaded from a folder that can only be read"
    assert made()[0]==41
    monkeypatch.setattr(build, 'private_folder', lambda folder: pytest.fail('nothing needs to be written'))
    assert made()==(41, '')

# ---------------------------------------------------------------- damaged and killed

damages = dict(empty=lambda b: b'', header=lambda b: b[:64], half=lambda b: b[:len(b)//2], last=lambda b: b[:-1],
               flipped=lambda b: b[:999]+bytes([b[999]^1])+b[1000:], zeros=lambda b: bytes(len(b)), text=lambda b: b'no library',
               longer=lambda b: b+b'x', foreign=lambda b: b[:18]+b'\xb7'+b[19:])       # byte 18: the architecture

@pytest.mark.parametrize('damage', damages)
def test_damaged(damage, cache, capsys):
    "Found before it is loaded, which would end the process, and built again"
    assert made()==(41, '') and 'once, a few seconds' in capsys.readouterr().err
    file, = cache.iterdir()
    data = file.read_bytes(); file.unlink(); file.write_bytes(damages[damage](data)); file.chmod(0o755)
    assert made()==(41, '') and 'damaged' in capsys.readouterr().err
    assert made()==(41, '') and capsys.readouterr().err=='' and [o.name for o in cache.iterdir()]==[file.name]

def test_not_loaded(cache):
    "Whole, and still no library: the message doesn't blame the compiler"
    cache.mkdir(mode=0o700)
    (cache/build._file_name('t', SOURCE, *build.command())).write_bytes(build._sealed(b'no library'))
    value,reason = made()
    assert value is None and 'could not be loaded' in reason and 'could not be built' not in reason

def test_folder_in_its_place(cache):
    (cache/build._file_name('t', SOURCE, *build.command())).mkdir(parents=True); cache.chmod(0o700)
    value,reason = made()
    assert value is None and 'could not be built' in reason
    assert [o.suffix for o in cache.iterdir()]==['.so']                                          # nothing else is left

def compiler(folder, text):
    "A shell script that can be called as a compiler; it may call the real one, `$REAL`"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'c++').write_bytes(f'#!/bin/sh\nREAL={CXX}\n'.encode()+text)
    (folder/'c++').chmod(0o755)
    return str(folder/'c++')

def test_killed_build(tmp_path, cache):
    "A build that is killed leaves nothing that could be loaded, and later ones don't wait for it"
    (tmp_path/'go').mkdir()
    slow = compiler(tmp_path, b'[ "$1" = --version ] || { touch started; sleep 60; }\nexec $REAL "$@"')
    p = start(LOAD, CXX=slow)
    end_of = time.monotonic()+60
    while not list(cache.glob('*/started')): time.sleep(.02); assert time.monotonic()<end_of and p.poll() is None
    p.send_signal(signal.SIGKILL); p.communicate()
    assert not list(cache.glob('*.so'))
    ps = [start(LOAD) for _ in range(2)]
    assert [end(p)[:2] for p in ps]==[(0, '41')]*2 and len(list(cache.glob('*.so')))==1

def test_damaged_for_two_at_once(cache):
    made()
    file, = cache.iterdir()
    file.unlink(); file.write_bytes(b'\x7fELF'); file.chmod(0o755)
    ps = [start(LOAD) for _ in range(2)]
    assert [end(p)[:2] for p in ps]==[(0, '41')]*2 and build._intact(file)

# ---------------------------------------------------------------- compilers and languages

def test_strange_compilers(tmp_path, cache, monkeypatch):
    for name,text,says in [('latin1', b'printf "erreur \\351trange\\n" >&2; exit 1', 'erreur'),
                           ('german', b'[ "$LC_ALL" = C ] && echo "error: in English" >&2 || echo "Fehler" >&2; exit 1', 'in English'),
                           ('silent', b'exit 3', 'exit status 3')]:
        monkeypatch.setenv('CXX', compiler(tmp_path/name, text))
        value,reason = made()
        assert value is None and says in reason and '\n' not in reason
    for cxx,says in [('no-such-compiler', 'cannot be run (No such file or directory); install g++ or set CXX'),
                     (str(tmp_path/'latin1'), 'Permission denied'), ('g++ "', 'No closing quotation')]:
        monkeypatch.setenv('CXX', cxx)
        value,reason = made()
        assert value is None and says in reason
    assert not list(cache.glob('*.so'))

def test_compiler_that_reads(cache):
    "A compiler that waits for its input gets none"
    p = start(LOAD, CXX="sh -c 'cat; exit 1'")
    p.wait(timeout=120)
    assert 'exit status 1' in end(p)[1]

plain = dict(LC_ALL='C', PYTHONUTF8='0')

@pytest.mark.parametrize('locale', [plain, dict(LC_ALL='C.UTF-8'), plain | dict(PYTHONIOENCODING='ascii:strict')])
def test_languages(locale, tmp_path):
    "Comments, folders and compilers in any language, under any locale"
    folder = tmp_path/'Ünï 測試'
    cxx = compiler(folder/'the compiler', b'exec $REAL "$@"')
    source = '// 大きい µ\n'+SOURCE
    code = f'from dsb.kernels.build import library; print(library("t", {ascii(source)})[0].answer())'
    status,out,err = end(start(code, CXX=cxx, DSB_CACHE=str(folder/'cache'), **locale))
    assert (status, out)==(0, '41') and 'Warning' not in err, err

def test_compiler_on_a_path_with_spaces(tmp_path, cache, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    compiler(tmp_path/'my tools', f'PATH={os.environ["PATH"]!r} exec $REAL "$@"'.encode())
    monkeypatch.setenv('PATH', str(tmp_path/'my tools'))
    assert made()==(41, '')

def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); tmp_path.chmod(0o700)
    monkeypatch.setenv('DSB_CACHE', '.')
    assert made()==(41, '') and [o.suffix for o in tmp_path.iterdir()]==['.so']

def test_closed_stderr(cache):
    "Nobody hears that something is built; it is, all the same"
    code = 'import os,sys; sys.stderr.close(); ' + LOAD
    assert end(start(code))[:2]==(0, '41')
