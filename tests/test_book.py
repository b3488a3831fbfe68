"The book: pictures are described in words, sentences are short, the tutorials stop nowhere, the first steps come first"
import json, os, re
import pytest
from dsb.dev.site import Project, read_cells, symbols, without_logs

project = Project(os.path.dirname(__file__))
tutorials = sorted((project.nbs/'tutorials').glob('*.ipynb'))
each = pytest.mark.parametrize('nb', tutorials, ids=[o.name for o in tutorials])
book = project.notebooks()
each_of_all = pytest.mark.parametrize('nb', book, ids=[o.relative_to(project.nbs).as_posix() for o in book])

def pictures(nb):
    "The cells of a notebook that show a picture, and the notebook's prose"
    cells = [c for c in read_cells(nb) if not c.hidden]
    return [c for c in cells if any(k.startswith('image/') for o in c.outputs for k in o.get('data', {}))]

def undescribed(cells):
    "Sources of the cells whose picture is not described in words"
    return [c.source for c in cells if len(c.directives.get('fig-alt', '').split())<4]

@each_of_all
def test_pictures_are_described(nb):
    "`#| fig-alt: ...` on top of a cell is what the site puts in the place of a picture that is not seen"
    assert not undescribed(pictures(nb)), undescribed(pictures(nb))

@each_of_all
def test_run_all_leaves_long_cells_alone(nb):
    "Jupyter knows no `eval: false`: a notebook with such cells calls `keep_stored` before the first of them"
    sources = [c['source'] if isinstance(c['source'], str) else ''.join(c['source'])
               for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    long = [i for i,s in enumerate(sources) if s.startswith('#| eval: false') and "__name__=='__main__'" not in s]
    if long:
        assert any('\nkeep_stored()' in s for s in sources[:long[0]]), sources[long[0]][:100]

def test_an_undescribed_picture_is_found(tmp_path):
    shown = dict(output_type='display_data', metadata={}, data={'image/png':''})
    cells = [dict(cell_type='code', source=s, outputs=[shown]) for s in ('plot()', '#| fig-alt: one\nplot()',
                                                                         '#| fig-alt: a line that falls\nplot()')]
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert undescribed(pictures(tmp_path/'x.ipynb'))==['plot()']*2

MOST = 40   # words of a sentence

def paragraphs(text):
    "Prose of Markdown, an item of a list on its own; code, tables, headings, formulas and comments are left out"
    text = re.sub(r'^```.*?^```|<!--.*?-->', '', text, flags=re.M|re.S)
    text = re.sub(r'\$\$.*?\$\$', ' Formula ', text, flags=re.S)
    text = re.sub(r'^(?: {4}.*|\s*\|.*|#+ .*|>? ?)$', '', text, flags=re.M)
    text = re.sub(r'^> |^\s*(?:[-*+]|\d+\.) ', '\n', text, flags=re.M)
    return [' '.join(o.split()) for o in re.split(r'\n\s*\n', text) if o.strip()]

def sentences(text):
    "Sentences of a paragraph; code, a formula and the words of a link are words that may begin one"
    text = re.sub(r'`[^`]*`|\$[^$]*\$', 'Word', text)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', lambda m: m[1][:1].upper()+m[1][1:], text)
    text = re.sub(r'\b(e\.g|i\.e|cf|vs|al)\.', r'\1', text)
    return re.split(r'(?<=[.!?])[)"*_]*\s+(?=[^a-z\s])', text)

def too_long(text):
    "The sentences of Markdown that have more than `MOST` words"
    return [o for p in paragraphs(text) for o in sentences(p) if sum(bool(re.search(r'\w', w)) for w in o.split())>MOST]

@each_of_all
def test_sentences_are_short(nb):
    "In prose, and in the docstrings of exported code"
    cells = read_cells(nb)
    prose = [c.source for c in cells if not c.code] + [s.doc for c in cells if c.exported for s in symbols(c) if s.doc]
    assert not [o for text in prose for o in too_long(text)]

def test_a_long_sentence_is_found():
    word = ' so'*39
    fine = f'Now{word}. `a`{word}.\n\n| a{word*2} |\n\n- one{word}\n- two{word}\n\n```\n{word*2}\n```\n# Title{word*2}'
    assert too_long(fine)==[] and len(too_long(f'{fine}\n\nNow{word}, and so.'))==1
    assert len(too_long(f'> Now{word} and e.g. so'))==len(too_long(f'- Now{word} `a`'))==1

@each_of_all
def test_outputs_tell_nothing_of_the_machine(nb):
    "No lines of torch's loggers, which have the time and a process's number"
    for c in json.loads(nb.read_text(encoding='utf-8'))['cells']: assert without_logs(c.get('outputs', []))==c.get('outputs', [])

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
