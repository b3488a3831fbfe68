"The wheel works outside the checkout, without what only developers have"
import configparser, email, os, re, shutil, subprocess, sys, tarfile, zipfile
import pytest

BLOCKER = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'nbdev','execnb','ghapi','IPython','pytest','hypothesis','zensical','latex2mathml',
                                  'setuptools'}:
            raise ModuleNotFoundError(f'{name} is not there for users', name=name)
sys.meta_path.insert(0, Block())
'''

def package(root): return [o for o in (root/'dsb').rglob('*') if o.is_file() and '__pycache__' not in o.parts]

@pytest.fixture(scope='module')
def wheel(root, tmp_path_factory):
    "The wheel of the checkout, built without network"
    out = tmp_path_factory.mktemp('wheel')
    src = out/'src'
    # a copy, so that the checkout gets no build folder and old build folders do not leak into the wheel
    for o in [*root.iterdir(), *package(root)]:
        if not o.is_file(): continue
        to = src/o.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(o.read_bytes())
    command = [sys.executable,'-m','pip','wheel','.','-q','--no-deps','--no-build-isolation','-w',out]
    subprocess.run(command, cwd=src, check=True)
    return next(out.glob('*.whl'))

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "Run Python code that sees the wheel's content and not the checkout"
    site = tmp_path_factory.mktemp('site')
    zipfile.ZipFile(wheel).extractall(site)
    def run(code):
        env = {**os.environ, 'PYTHONPATH':str(site)}
        cwd = tmp_path_factory.mktemp('elsewhere')
        head = BLOCKER + f'import dsb; assert dsb.__file__.startswith({str(site)!r}), dsb.__file__\n'
        return subprocess.run([sys.executable,'-c',head+code], cwd=cwd, env=env, capture_output=True, text=True)
    return run

def test_holds_every_file_of_the_package(root, wheel):
    have = {o for o in zipfile.ZipFile(wheel).namelist() if o.startswith('dsb/')}
    want = {o.relative_to(root).as_posix() for o in package(root)}
    assert have==want and 'dsb/py.typed' in have   # type checkers read the annotations of packages that say so

def test_metadata(wheel):
    z = zipfile.ZipFile(wheel)
    info = next(o for o in z.namelist() if o.endswith('METADATA'))
    meta = email.message_from_bytes(z.read(info))
    assert meta['Name']=='dsb-train'   # on PyPI, dsb is something else
    assert meta['License-Expression']=='Apache-2.0'
    assert b'Apache License' in z.read(info.replace('METADATA', 'licenses/LICENSE'))
    assert meta['Requires-Python']=='>=3.10'
    needs = [o for o in meta.get_all('Requires-Dist') if 'extra' not in o]
    assert 'fastcore>=1.7' in needs and not any(o.startswith(('nbdev','pytest')) for o in needs), needs

def test_links_lead_to_the_repository(root, wheel):
    "On PyPI, where only the README is; each link of it leads to a file that is there"
    z, ini = zipfile.ZipFile(wheel), configparser.ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini')
    home, branch = (ini['DEFAULT'][o] for o in ('git_url','branch'))
    words = z.read(next(o for o in z.namelist() if o.endswith('METADATA'))).decode()
    links = re.findall(r'(!?)\[[^\]]*\]\(([^)\s]+)\)', words)
    odd = [o for _,o in links if not o.startswith(('https:','#'))]
    assert len(links)>20 and not odd, odd
    for bang, to in links:
        kind = f"{home}/{'raw' if bang else 'blob'}/{branch}/"
        if to.startswith(home): assert to.startswith(kind) and (root/to[len(kind):].partition('#')[0]).exists(), to

NO_SOURCE = '.git*', '.venv*', '*venv*', '__pycache__', '*.egg-info', 'runs', 'data', 'build', 'dist', '_*', '.*_cache', '.hypothesis'

def test_source_holds_its_tests(root, tmp_path):
    "Whoever has the source distribution can run its tests: notebooks, tests, commands and settings are in it"
    src = tmp_path/'src'
    shutil.copytree(root, src, ignore=lambda d, fs: shutil.ignore_patterns(*NO_SOURCE)(d, fs) - {'__init__.py','_modidx.py'})
    if (root/'.github').exists(): shutil.copytree(root/'.github', src/'.github')
    code = 'from setuptools import build_meta; print(build_meta.build_sdist(".."))'
    r = subprocess.run([sys.executable,'-c',code], cwd=src, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as t:
        have = {o.name.partition('/')[2] for o in t if o.isfile()}
        safe = dict(filter='data') if hasattr(tarfile, 'data_filter') else {}   # Python has it from 3.10.12 and 3.11.4 on
        t.extractall(tmp_path/'unpacked', **safe)
    kept = [o for d in ('tests','nbs','dsb','.ci','.github') for o in (src/d).rglob('*')] + [*src.glob('*.*')]
    want = {o.relative_to(src).as_posix() for o in kept if o.is_file()}
    assert len(want)>100 and not want-have, sorted(want-have)[:9]
    top, = (tmp_path/'unpacked').iterdir()
    few = 'tests/test_sync.py', 'tests/test_papers.py', 'tests/test_density.py', 'tests/test_wheel.py::test_metadata'
    r = subprocess.run([sys.executable,'-m','pytest','-q','-n0',*few], cwd=top, capture_output=True, text=True,
                       env=os.environ | dict(PYTHONPATH=str(top)))
    assert r.returncode==0 and ' passed' in r.stdout, r.stdout[-2000:]

def test_version(root, installed, wheel):
    r = installed('print(dsb.__version__)')
    assert r.returncode==0 and f'-{r.stdout.strip()}-' in wheel.name, r.stderr

def test_every_module_imports(installed):
    r = installed('''
import importlib, pkgutil
names = [o.name for o in pkgutil.walk_packages(dsb.__path__, 'dsb.')]
for o in names: importlib.import_module(o)
print(len(names))
''')
    assert r.returncode==0, r.stderr
    assert int(r.stdout)>2

def test_command_answers(installed):
    r = installed('from dsb.cli import main; main(["--help"])')
    assert r.returncode==0 and 'usage' in r.stdout.lower(), r.stderr
