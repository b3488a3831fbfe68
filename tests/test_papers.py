"Citation, changes, workflows and the mark for type checkers say what settings.ini says"
import re
import pytest
from dsb.dev.site import Project

@pytest.fixture(scope='module')
def settings(root): return Project(root).settings

def read(path):
    "The content of a YAML file"
    return pytest.importorskip('yaml').safe_load(path.read_text(encoding='utf-8'))

def test_citation(root, settings):
    "It parses, has the fields that the format asks for, this version, and the paper as a reference"
    c = read(root/'CITATION.cff')
    assert {'cff-version', 'message', 'title', 'authors'} <= c.keys()
    assert str(c['version']) == settings['version'] and c['authors'] == [dict(name=settings['author'])]
    paper, = c['references']
    assert paper['title'].startswith('Exposing and Exploiting') and paper['year'] == 2022
    assert [a['family-names'] for a in paper['authors']] == ['Jiang', 'Hu', 'Song']

def test_changes_name_this_version(root, settings):
    "Sections are versions, newest first, and the newest is this one"
    found = re.findall(r'^## (.+)$', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert found[0] == settings['version']
    assert found == sorted(found, key=lambda v: [int(n) for n in v.split('.')], reverse=True)

def test_every_python_is_tested(root, settings):
    "The workflow tests the versions that the package claims, and no others"
    job, = read(root/'.github/workflows/test.yml')['jobs'].values()
    assert job['strategy']['matrix']['python'] == settings['python_versions'].split()

@pytest.mark.parametrize('name', ['test', 'site'])
def test_workflow(name, root):
    "Jobs have steps, each does one thing, and what is run exists"
    jobs = read(root/f'.github/workflows/{name}.yml')['jobs']
    steps = [s for j in jobs.values() for s in j['steps']]
    assert steps and all(('uses' in s) != ('run' in s) for s in steps)
    for s in steps:
        for test in re.findall(r'tests/\S+', s.get('run', '')): assert (root/test).is_file()
    assert all(need in jobs for j in jobs.values() for need in [j.get('needs')] if need)

def test_contributing_names_what_exists(root):
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    named = re.findall(r'\b(?:nbs|tests)/[\w/]+\.(?:ipynb|py)', text)
    assert len(named) > 4 and all((root/n).is_file() for n in named)
