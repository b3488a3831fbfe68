"The house stands: arrows point down, private names stay at home, numbers have no gaps, lines fit, places are told"
import ast, json, os, subprocess, sys
import pytest
from dsb.dev.plan import MAP, Plan, lengths, python
from dsb.dev.site import Project

project = Project(os.path.dirname(__file__))
names = [o.relative_to(project.nbs).as_posix() for o in project.notebooks()]
each = pytest.mark.parametrize('name', names)

@pytest.fixture(scope='module')
def plan(): return Plan(project.root)

def pointed(arrows): return [f'{a.at} -> {a.to}' for a in arrows]

def test_private_names_stay_at_home(plan):
    found = plan.trespasses()
    assert not found, f'what another room takes is public, and has no underscore: {found}'

def test_arrows_point_down(plan):
    found = pointed(plan.rising())
    assert not found, f'a room builds on rooms above it; move the thing, the room, or its number: {found}'

def test_no_circle(plan):
    found = plan.circle()
    assert not found, ' -> '.join(found)

def test_numbers_have_no_gaps(plan):
    assert not plan.misnumbered()
    assert (project.nbs/'00_core.ipynb').exists()

def test_every_notebook_is_in_the_plan(plan):
    "What no section shows is read by nobody"
    def hidden(o): return any(part[0] in '._' for part in o.relative_to(project.nbs).parts)
    assert {o.path for o in plan.all.values()}=={o for o in project.nbs.rglob('*.ipynb') if not hidden(o)}

def test_every_module_has_a_room(plan):
    folder = project.root/project.lib
    modules = {o for o in folder.rglob('*.py') if o.name!='_modidx.py' and o.read_text(encoding='utf-8').strip()}
    assert modules=={o.file for o in plan.rooms.values()}

WATCH = '''
import builtins, importlib, json, sys
from importlib.util import resolve_name
plain,seen = builtins.__import__,[]
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    at = (globals or {}).get('__name__', '')
    full = resolve_name('.'*level+name, globals['__package__']) if level else name
    seen.extend((at, o) for o in (full, *(f'{full}.{o}' for o in fromlist or ())))
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = watched
first,then = json.loads(sys.argv[1])
for o in first: importlib.import_module(o)
early = [o for o in then if o in sys.modules]
for o in then: importlib.import_module(o)
print(json.dumps([seen, early]))
'''

@pytest.fixture(scope='module')
def imports(plan):
    "(who, what) of all imports that Python makes; the rooms of Development that come without being asked for"
    first = [k for k,o in plan.rooms.items() if o.floor!='Development']
    then = [k for k in plan.rooms if k not in first]
    command = [sys.executable, '-c', WATCH, json.dumps([first, then])]
    r = subprocess.run(command, cwd=project.root, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    seen,early = json.loads(r.stdout)
    return {(at, to) for at,to in seen if {at, to}<=plan.rooms.keys()},early

def test_arrows_are_pythons(plan, imports):
    "What is read from the sources is what happens when all modules are imported"
    seen,_ = imports
    assert len(seen)>len(plan.rooms)>2
    assert not seen-{(a.at, a.to) for a in plan.arrows}
    assert not {(a.at, a.to) for a in plan.arrows if not a.inner}-seen

def test_development_is_not_imported(plan, imports):
    "Neither in any source nor when everything else has been imported"
    dev = {k for k,o in plan.rooms.items() if o.floor=='Development'}
    found = pointed(a for a in plan.arrows if a.to in dev and a.at not in dev)
    assert dev and not found and not imports[1], (found, imports[1])

@each
def test_lines_fit(name, plan):
    "No line of code over 120 characters, tests included; C++ in strings may have longer ones"
    room = next(o for o in plan.all.values() if o.at==name)
    source = [python(o) for o in room.cells if o.code]
    lines = [(n, s) for o in source for n,s in zip(lengths(o), [s for s in o.splitlines() if s.strip()])]
    found = [f'{n}: {s.strip()[:60]}...' for n,s in lines if n>120]
    assert not found, f'{len(found)} lines over 120 characters:\n' + '\n'.join(found)

def test_every_notebook_knows_its_place(plan):
    wrong = [o.relative_to(project.nbs).as_posix() for o in plan.displaced()]
    assert not wrong, f'run `python -m dsb.dev.plan places` and commit the result; these would change: {wrong}'

def test_the_map_shows_every_room(plan):
    shown = ''.join(str(o) for c in plan.all[MAP].cells for o in c.outputs)
    missing = [o.at for o in plan.rooms.values() if f'](../{o.at})' not in shown]
    assert not missing, f'run `python -m dsb.dev.site refresh {project.nbs.name}/{MAP}`: {missing}'

def unused(file):
    "Names that a module imports at its top and neither uses nor offers"
    tree = ast.parse(file.read_text(encoding='utf-8'))
    brought = {(a.asname or a.name).split('.')[0] for o in tree.body if isinstance(o, (ast.Import, ast.ImportFrom)) for a in o.names}
    used = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)}
    return sorted(brought - used - {o.value for o in ast.walk(tree) if isinstance(o, ast.Constant)})

def test_imports_are_used():
    "What only the tests of a notebook need is imported in a cell that is not exported"
    files = [f for f in (project.root/'dsb').rglob('*.py') if f.name not in ('__init__.py', '_modidx.py')]
    found = {f.name: names for f in files if (names := unused(f))}
    assert len(files) > 40 and not found, found
