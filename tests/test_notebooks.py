"Every notebook runs, under nbdev's rules for which cells to skip, and is fit to be read"
import os, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest
from dsb.dev.site import Project, read_cells, symbols

project = Project(os.path.dirname(__file__))
notebooks = project.notebooks()
names = [o.relative_to(project.nbs).as_posix() for o in notebooks]
each = pytest.mark.parametrize('nb', notebooks, ids=names)

RUN = '''
import sys
from pathlib import Path
from nbdev.test import test_nb
from dsb.dev.site import seed_everything
seed_everything()
nb,root,skip,force = sys.argv[1:]
sys.exit(not test_nb(Path(nb), skip_flags=skip.split(), force_flags=force.split(), basepath=root)[0])
'''

def run(nb):
    "Run one notebook in a process of its own, so that none sees what another has imported or set"
    args = [nb, project.root, project.settings['tst_flags'], os.environ.get('NB_FLAGS', '')]
    return subprocess.run([sys.executable,'-c',RUN,*map(str,args)], capture_output=True, text=True, timeout=900)

def files(): return {o for o in project.nbs.rglob('*') if o.is_file() and '__pycache__' not in o.parts}
before = files()

@pytest.fixture(scope='session')
def runs(request):
    "The wanted notebooks, started together on as many processes as there are cores"
    wanted = [o.callspec.params['nb'] for o in request.session.items if o.originalname=='test_runs']
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {nb:pool.submit(run, nb) for nb in wanted}
        pool.shutdown(cancel_futures=True)

@each
def test_runs(nb, runs):
    r = runs[nb].result()
    assert r.returncode==0, f'{r.stdout}{r.stderr}'

def test_leaves_no_files(runs):
    "Runs after all notebooks: what they make belongs in temporary folders"
    for o in runs.values(): o.result()
    new = sorted(str(o.relative_to(project.root)) for o in files()-before)
    assert not new, f'notebooks left files behind: {new}'

def _text(outputs):
    for o in outputs:
        yield from o.get('text', [])
        for k,v in o.get('data', {}).items():
            if k.startswith('text/'): yield ''.join(v)

@each
def test_shows_no_machine(nb):
    "No path of the machine a notebook was written on, in code, prose or outputs"
    path = re.compile(r'/(root|work|home|tmp|opt|Users)/[\w.]+')
    found = [m[0] for c in read_cells(nb) for s in (c.source, *_text(c.outputs)) for m in path.finditer(s)]
    assert not found, found

@each
def test_shows_no_errors(nb):
    found = [f"{o['ename']}: {o['evalue']}" for c in read_cells(nb) for o in c.outputs if o['output_type']=='error']
    assert not found, f'stored outputs hold errors: {found}'

@each
def test_links_lead_somewhere(nb):
    "A link to another notebook names one that is there"
    prose = '\n'.join(c.source for c in read_cells(nb) if not c.code)
    lost = [to for to in re.findall(r'\]\(([\w./-]+\.ipynb)', prose) if not (nb.parent/to).exists()]
    assert not lost, f'no such notebooks: {lost}'

@each
def test_plots_are_stored(nb):
    "A cell that ends in a plot has the plot in it"
    plots = re.compile(r'^(?:plt\.\w|\w*\.?(?:show|plot)\w*\(|\w+\.(?:plot|imshow|bar|hist)\()')
    seen = [c for c in read_cells(nb) if c.code and not c.hidden and not c.exported]
    shown = [c for c in seen if plots.match(c.source.splitlines()[-1])]
    bare = [c.source for c in shown if not any('image/png' in o.get('data', {}) for o in c.outputs)]
    assert not bare, f'no picture stored; run `python -m dsb.dev.site refresh {nb.name}`: {bare}'

INHERITED = 'forward','extra_repr'   # torch says what these are

def undocumented(nb):
    "What is missing, one line each"
    public = [s for c in read_cells(nb) if c.exported for s in symbols(c) if s.public]
    for s in [s for s in public if s.name.split('.')[-1] not in INHERITED]:
        if not s.doc: yield f'{s.name}: no docstring'
        elif '\n' in s.doc.strip(): yield f'{s.name}: docstring of more than one line'
        for n,_,_,details in s.params:
            if not details and n[0]!='*': yield f'{s.name}: nothing said of parameter {n}'

@each
def test_documents_what_it_exports(nb):
    "One line of docstring and a comment on each parameter, for every public function and class"
    found = list(undocumented(nb))
    assert not found, '\n'.join(found)
