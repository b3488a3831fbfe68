"The tutorials: every picture is described in words, every part of the sidebar is there, the first steps come first"
import json, os, re
import pytest
from dsb.dev.site import Project, read_cells

project = Project(os.path.dirname(__file__))
tutorials = sorted((project.nbs/'tutorials').glob('*.ipynb'))
each = pytest.mark.parametrize('nb', tutorials, ids=[o.name for o in tutorials])

def pictures(nb):
    "The cells of a notebook that show a picture, and the notebook's prose"
    cells = [c for c in read_cells(nb) if not c.hidden]
    return [c for c in cells if any(k.startswith('image/') for o in c.outputs for k in o.get('data', {}))]

def undescribed(cells):
    "Sources of the cells whose picture is not described in words"
    return [c.source for c in cells if len(c.directives.get('fig-alt', '').split())<4]

@each
def test_pictures_are_described(nb):
    "`#| fig-alt: ...` on top of a cell is what the site puts in the place of a picture that is not seen"
    assert not undescribed(pictures(nb)), undescribed(pictures(nb))

def test_an_undescribed_picture_is_found(tmp_path):
    shown = dict(output_type='display_data', metadata={}, data={'image/png':''})
    cells = [dict(cell_type='code', source=s, outputs=[shown]) for s in ('plot()', '#| fig-alt: one\nplot()',
                                                                         '#| fig-alt: a line that falls\nplot()')]
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert undescribed(pictures(tmp_path/'x.ipynb'))==['plot()']*2

@each
def test_directives_stand_on_top(nb):
    "A directive below the first line of code is not seen by Jupyter's tools"
    for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
        lines = ''.join(c['source']).splitlines() if c['cell_type']=='code' else []
        first = next((i for i,s in enumerate(lines) if not s.startswith('#|')), len(lines))
        assert not [s for s in lines[first:] if s.startswith('#|')], ''.join(c['source'])

@each
def test_stops_nowhere(nb):
    "Run All in Jupyter runs every cell: none may end the process, or be kept from running by a directive alone"
    for c in read_cells(nb):
        if c.code: assert c.directives.get('eval')!='false' and not re.search(r'\bsys\.exit\(|\bexit\(\)', c.source)

def test_first_tutorial_comes_first():
    "The index and the README lead to the first tutorial before any other notebook"
    for text in ((project.root/'README.md').read_text(), '\n'.join(c.source for c in read_cells(project.nbs/'index.ipynb'))):
        assert re.findall(r'\(([\w/]+\.ipynb)', text)[0].endswith('tutorials/01_first.ipynb')
