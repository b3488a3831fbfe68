"The README and the documentation site: made from a small project, and from this one"
import base64, functools, json, os, re, runpy, shutil, subprocess, sys, threading
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote
import pytest
from browser import Browser, chromium
from dsb.dev.site import Project, build, main, page_name, readme, symbols, read_cells

project = Project(os.path.dirname(__file__))
has_zensical = find_spec('zensical') and find_spec('latex2mathml')
needs_zensical = pytest.mark.skipif(not has_zensical, reason="no zensical here: pip install -e '.[site]'")

PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
def text(source): return dict(cell_type='markdown', metadata={}, source=source)
def code(source, **data):
    "A cell with one output, if `data` is given; `text_plain` stands for text/plain"
    shown = {k.replace('_','/'):v for k,v in data.items()}
    out = dict(output_type='execute_result', metadata={}, execution_count=None, data=shown)
    return dict(cell_type='code', metadata={}, execution_count=None, source=source, outputs=[out]*bool(data))
def write_notebook(f, cells):
    cells = [dict(c, id=f'c{i}') for i,c in enumerate(cells)]
    f.parent.mkdir(exist_ok=True)
    f.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

NOTEBOOKS = {
    'index.ipynb': [
        text('# plane\n\n> Figures and their areas'), code('#| hide\nsecret = 1'),
        text('See [the first steps](tutorials/01_first.ipynb#How-To) and [the licence](../LICENSE). $a^2$'),
        code('circle(1)', text_plain='3.14'),
        code('#| echo: false\n#| fig-alt: a dot\ndraw()', image_png=PNG, text_plain='<Figure>')],
    '01_area.ipynb': [
        text('# area\n\n> Areas'), code('#| default_exp area'),
        text('`circle` uses $\\pi$. Two things:\n- one\n  - half\n- two'),
        code('#| export\ndef circle(\n    r=1., # radius\n): # area\n    "Area of a circle"\n    return 3.14*r*r'),
        code('circle(2)', text_plain='12.56'), code('show()', image_png=PNG), code('#| hide\nhidden_test()')],
    'tutorials/01_first.ipynb': [
        text('# First steps'), text('## How To\n\nCall `circle`, see `plane.area`.'),
        code('from plane.area import circle\nplot()', text_markdown='| a | b |\n|---|---|\n| 1 | 2 |')],
    'explanations/02_why.ipynb': [text('# Why')]}

@pytest.fixture
def small(tmp_path):
    "A project of four notebooks"
    ini = (project.root/'settings.ini').read_text().replace(f'lib_path = {project.lib}', 'lib_path = plane')
    (tmp_path/'settings.ini').write_text(ini)
    shutil.copy(project.root/'zensical.toml', tmp_path)
    without = shutil.ignore_patterns('*.ipynb', 'tutorials', 'explanations', 'images')
    shutil.copytree(project.nbs, tmp_path/'nbs', ignore=without)
    for name,cells in NOTEBOOKS.items(): write_notebook(tmp_path/'nbs'/name, cells)
    return tmp_path

def test_readme_of_a_small_project(small):
    stale = small/'nbs/images/readme-7.png'
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b'old')
    readme(small)
    note,_,words = (small/'README.md').read_text().partition('\n\n')
    assert note=='<!-- Made by `python -m plane.dev.site readme` from nbs/index.ipynb: edit there. -->'
    assert words=='''# plane

> Figures and their areas

See [the first steps](nbs/tutorials/01_first.ipynb#How-To) and [the licence](LICENSE). $a^2$

```python
circle(1)
```

```text
3.14
```

![a dot](nbs/images/readme-1.png)
'''
    assert (small/'nbs/images/readme-1.png').read_bytes()==base64.b64decode(PNG)
    assert not stale.exists()
    times = [o.stat().st_mtime_ns for o in (small/'README.md', small/'nbs/images/readme-1.png')]
    readme(small)
    assert times==[o.stat().st_mtime_ns for o in (small/'README.md', small/'nbs/images/readme-1.png')]

def test_readme_in_sync():
    files = readme(project.root, write=False)
    differ = [f for f,data in files.items() if not f.exists() or f.read_bytes()!=data]
    stale = [f for f in (project.nbs/'images').glob('readme-*') if f not in files]
    wrong = [str(f.relative_to(project.root)) for f in differ+stale]
    assert not wrong, f'run `python -m dsb.dev.site readme` and commit the result; not as the index has it: {wrong}'

def test_readme_and_ci_test_alike():
    command = (project.root/'.ci/run').read_text().rstrip().splitlines()[-1]
    told = (project.root/'README.md').read_text()
    assert 'pytest' in command and command in told, f'the README does not tell to run {command!r}, as .ci/run does'

def test_failing_notebook_is_left_as_it_was(small):
    f = small/'nbs/03_bad.ipynb'
    write_notebook(f, [code('1/0', text_plain='old')])
    before = f.read_bytes()
    command = [sys.executable,'-m','dsb.dev.site','refresh',f]
    r = subprocess.run(command, cwd=project.root, capture_output=True, text=True)
    assert r.returncode==1 and 'ZeroDivisionError in' in r.stderr
    assert f.read_bytes()==before

def test_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['readme'])==2
    assert 'run this inside a checkout' in capsys.readouterr().err

class Reader(HTMLParser):
    "Addresses, anchors and text of a page"
    def __init__(self, html):
        super().__init__()
        self.ids,self.twice,self.loads,self.links,self.tags,self.words = set(),[],[],[],set(),[]
        self.tables,self.before = [],{}     # for each table the attributes of the tag before it
        self.pictures = []                  # attributes
        self.feed(html)
        self.text = ''.join(self.words)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag=='table': self.tables.append(self.before)
        if tag=='img': self.pictures.append(attrs)
        self.before = attrs
        if 'id' in attrs:
            if attrs['id'] in self.ids: self.twice.append(attrs['id'])
            self.ids.add(attrs['id'])
        if attrs.get('href') and tag=='a': self.links.append(attrs['href'])
        elif attrs.get('href') or attrs.get('src'): self.loads.append(attrs.get('href') or attrs['src'])
    def handle_data(self, data): self.words.append(data)

def check_site(site):
    "Nothing comes from the network, and what pages of the site link to is there; returns name -> Reader"
    pages = {o.relative_to(site).as_posix():Reader(o.read_text()) for o in site.rglob('*.html')}
    for name,p in pages.items():
        away = [o for o in p.loads if re.match(r'(https?:)?//', o)]
        assert not away, f'{name} loads from elsewhere: {away}'
        for o in p.loads+p.links:
            if re.match(r'[a-z]+:', o): continue
            file,_,anchor = unquote(o).partition('#')
            if name=='404.html': assert o[0] in '/#', f'{o}: a 404 page can be shown anywhere'
            file = file.lstrip('/') or ('index.html' if file else '')
            to = os.path.normpath(os.path.join(os.path.dirname(name), file)) if file else name
            if to in ('.', ''): to = 'index.html'
            if to=='index.html' and not (project.nbs/'index.ipynb').exists(): continue
            assert (site/to).exists(), f'{name} links to {o}, which is not there'
            assert not anchor or to not in pages or anchor in pages[to].ids, f'{name} links to {o}: no such place'
    for css in site.glob('*.css'): assert 'http' not in css.read_text()
    return pages

@needs_zensical
def test_site_of_a_small_project(small):
    build(small/'site', small)
    pages = check_site(small/'site')
    area,index = pages['area.html'],pages['index.html']
    assert {'area.html','index.html','tutorials/first.html','explanations/why.html'} <= pages.keys()
    assert {'math','table','img','details'} <= area.tags and '$' not in area.text
    assert 'circle' in area.ids and '#circle' in area.links
    assert '12.56' in area.text and 'hidden_test' not in area.text and 'secret' not in index.text
    assert 'tutorials/first.html#how-to' in [o.removeprefix('./') for o in index.links]
    assert {'../area.html#circle','../area.html'} <= set(pages['tutorials/first.html'].links)
    order = [index.text.index(o) for o in ('Learn', 'First steps', 'Understand', 'Why', 'Reference', 'area')]
    assert order==sorted(order), 'order of the navigation'
    assert 'Area of a circle' in (small/'site/search.json').read_text()
    assert area.pictures[0]['alt']=='two'
    assert 'draw()' not in index.text and 'a dot' in (small/'site/index.html').read_text()
    nested = r'<li>\s*<p>one</p>\s*<ul>\s*<li>half</li>|<li>one\s*<ul>\s*<li>half</li>'
    assert re.search(nested, (small/'site/area.html').read_text()), 'nested list'

@needs_zensical
def test_build_spares_other_folders(small):
    with pytest.raises(ValueError, match='no site'): build(small/'nbs', small)
    assert (small/'nbs/index.ipynb').exists()

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site of this project"
    folder = tmp_path_factory.mktemp('built')/'site'
    build(folder, project.root)
    return folder

@pytest.fixture(scope='module')
def pages(site): return check_site(site)

@needs_zensical
def test_site_of_this_project(pages):
    for nb in project.notebooks():
        name = page_name(nb.relative_to(project.nbs).as_posix()).replace('.md', '.html')
        names = [s.name for c in read_cells(nb) if c.exported for s in symbols(c) if s.public]
        missing = [o for o in names if o.lower() not in pages[name].ids]
        twins = {o for o in set(names) if sum(n.lower()==o.lower() for n in set(names))>1}
        wanting = [o for o in {n.lower() for n in twins} if f'{o}-2' not in pages[name].ids]
        assert not wanting and not pages[name].twice, (name, wanting, pages[name].twice)
        assert not missing, f'{name} lacks {missing}'
        for o in nb.parent.glob('*.html'): pytest.fail(f'{o}: built pages do not belong beside notebooks')

@needs_zensical
def test_tables_scroll(pages):
    for name,p in pages.items():
        for o in p.tables:
            assert (o.get('class'), o.get('tabindex'), o.get('role')) == ('scroll','0','region'), name
            assert o['aria-label'], f'{name}: a table without a label'
    assert sum(len(p.tables) for p in pages.values()) > 100
    assert 'cpu-layers-4.json' in pages['explanations/cpu.html'].text, 'a break inside of a word'
    rules = re.findall(r'[^{}]*(?:code|pre|td)[^{}]*\{[^}]*nowrap', (project.nbs/'styles.css').read_text())
    assert not rules, f'code in cells must wrap: {rules}'

@needs_zensical
def test_pictures_have_words(pages):
    bare = [(name, o.get('src', '')[:60]) for name,p in pages.items() for o in p.pictures if not o.get('alt')]
    assert not bare, f'no alt text: {bare}'
    words = [o['alt'] for p in pages.values() for o in p.pictures]
    assert len(words)>60 and not [o for o in words if re.search(r'[`$*\]\[]|^#', o)], 'Markdown in the alt text'

def luminance(color):
    "By the definition of WCAG 2, from #rrggbb"
    parts = [int(color[i:i+2], 16)/255 for i in (1,3,5)]
    return sum(w*(c/12.92 if c<=.04045 else ((c+.055)/1.055)**2.4) for w,c in zip((.2126,.7152,.0722), parts))

def contrast(a, b):
    dark,light = sorted((luminance(a), luminance(b)))
    return (light+.05)/(dark+.05)

def test_active_entry_can_be_read():
    assert round(contrast('#000000', '#ffffff'), 6)==21
    pairs = re.findall(r'--here: (#\w{6}); --here-bg: (#\w{6})', (project.nbs/'styles.css').read_text())
    assert len(pairs)==2 and all(contrast(*o)>=4.5 for o in pairs), [(o, contrast(*o)) for o in pairs]

@needs_zensical
def test_formulas(site):
    words = (site/'kernels/cpu.html').read_text()
    assert words.count('<mo>+=</mo>')>=3 and '<mo>&#x02032;</mo>' in words and '<mi>&#x02032;</mi>' not in words

@needs_zensical
def test_page_for_wrong_addresses(pages):
    lost = pages['404.html']
    assert 'Search' in lost.text and '404 - ' not in lost.text
    ways = lost.text.partition('There is no such page')[2]
    at = [ways.index(o) for o in ('Start', 'Learn', 'Understand', 'Reference', 'All names')]
    assert at==sorted(at) and {'/tutorials/first.html', '/init.html', '/names.html'} <= set(lost.links)

@needs_zensical
def test_all_names(pages):
    modules = runpy.run_path(project.root/project.lib/'_modidx.py')['d']['syms']
    names = {k.removeprefix(f'{m}.') for m,names in modules.items() for k in names}
    public = {o for o in names if not re.search(r'(^|\.)_', o)}
    assert len(public)>500
    words = set(re.findall(r'[\w.]+', pages['names.html'].text))
    missing = [o for o in sorted(public) if o not in words and o.rpartition('.')[2] not in words]
    assert not missing, f'not in the table of all names: {missing}'
    assert not [o for o in words if re.match(r'_[A-Z]\w*\.', o)], 'methods of private classes'

@needs_zensical
def test_api_is_first_and_linked(pages):
    import dsb
    api,start = pages['init.html'],pages['index.html'].links
    assert not re.search(r'(?<!_)_all_(?!_)', api.text) and api.text.count('API')>1
    missing = [o for o in dsb.__all__ if not [k for k in api.links if re.search(rf'#{o.lower()}(-\d)?$', k)]]
    assert not missing, f'not linked: {missing}'
    at = [next(i for i,o in enumerate(start) if o.endswith(k)) for k in ('init.html','names.html','core.html')]
    assert at==sorted(at)

@needs_zensical
def test_notebooks_and_sources_are_there(site, pages):
    for nb in project.notebooks():
        name = nb.relative_to(project.nbs)
        page = page_name(name.as_posix()).replace('.md', '.html')
        assert name.name in pages[page].links and (site/name).read_bytes()==nb.read_bytes(), page
    assert '../dsb/structure/blocks.py' in pages['structure/blocks.html'].links
    assert (site/'dsb/structure/blocks.py').read_bytes()==(project.root/'dsb/structure/blocks.py').read_bytes()
    assert not [(k,o) for k,p in pages.items() for o in p.links+p.loads if 'dsb.example' in o]

@needs_zensical
def test_contents_for_programs(site, pages):
    words = (site/'llms.txt').read_text()
    assert words.startswith('# dsb\n\n> ')
    assert set(re.findall(r'\]\((\S+)\)', words)) == pages.keys()-{'404.html','names.html','index.html'}

@needs_zensical
def test_build_tells(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    assert main(['build'])==0
    out = capsys.readouterr().out
    assert re.fullmatch(rf'6 pages and 2 pictures in {re.escape(str(small))}/_site, \d+ s; begin with index.html\n', out), out

# In a browser

needs_chromium = pytest.mark.skipif(not chromium(), reason='no Chromium here: apt-get install chromium')

# what a page is like after its programs have run
LOOK = """(() => {
  const inside = document.querySelector('article'), here = location.href.split('#')[0];
  const words = [...inside.querySelectorAll(':scope > :not(div.highlight, details)')].map(o => o.innerText).join('\\n');
  const ids = [...document.querySelectorAll('[id]')].map(o => o.id);
  return {ids, words, twice: ids.filter((o, i) => ids.indexOf(o) < i), over: document.documentElement.scrollWidth - innerWidth,
    links: [...new Set([...document.querySelectorAll('a[href]')].map(o => o.href))],
    broken: [...document.images].filter(o => o.complete && !o.naturalWidth).map(o => o.src)}})()"""

# texts with less contrast than WCAG 2 asks for: 4.5, or 3 if they are large
PALE = """(() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  const rgba = s => { context.clearRect(0, 0, 1, 1); context.fillStyle = s; context.fillRect(0, 0, 1, 1);
                      return [...context.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v/255); };
  const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1 - a[3]));
  const ground = e => e ? over(rgba(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255];
  const light = c => c.map(v => v/255 <= .04045 ? v/255/12.92 : ((v/255 + .055)/1.055)**2.4)
                      .reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0);
  const kinds = new Map(), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, box = e.getBoundingClientRect();
    const kind = [e, e.parentElement, e.parentElement?.parentElement].map(o => o && o.tagName + '.' + o.className).join(' < ');
    if (kinds.has(kind) || !texts.currentNode.data.trim() || !box.width || !e.checkVisibility({opacityProperty: true})) continue;
    const s = getComputedStyle(e), b = ground(e), both = [light(over(rgba(s.color), b)), light(b)].sort((p, q) => q - p);
    const size = parseFloat(s.fontSize), large = size >= 24 || size >= 18.66 && +s.fontWeight >= 700;
    kinds.set(kind, [(both[0] + .05)/(both[1] + .05), large ? 3 : 4.5, texts.currentNode.data.trim()]);
  }
  return {seen: kinds.size, pale: [...kinds].filter(([k, [is, least]]) => is < least)}})()"""

class Handler(SimpleHTTPRequestHandler):
    "Files of a folder; if the server is `bare`, the search has nothing to find"
    def log_message(self, *_): pass
    def do_GET(self):
        if not (self.server.bare and self.path=='/search.json'): return super().do_GET()
        index = json.loads(Path(self.translate_path(self.path)).read_text()) | dict(items=[])
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps(index).encode())

@contextmanager
def serving(site, bare=False):
    "Address of the site on this machine"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(site)))
    server.bare = bare
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown(); server.server_close()

def from_elsewhere(browser, base):
    return [o for o in browser.requests() if not o.startswith((base,'data:','blob:'))]

@needs_zensical
@needs_chromium
def test_walk(site):
    "Every page in a browser, on a desk and on a phone; bare, since an index made anew for each takes most of the time"
    found = {}
    with serving(site, bare=True) as served, Browser() as b:
        for name in sorted(o.relative_to(site).as_posix() for o in site.rglob('*.html')):
            b.screen(1280)
            b.go(served+name)
            found[name] = b.js(LOOK)
            b.screen(390)
            phone = b.js('document.documentElement.scrollWidth - innerWidth')
            away,errors = from_elsewhere(b, served),b.errors()
            wrong = dict(away=away, errors=errors, wide=phone>0 or found[name]['over']>0,
                         broken=found[name]['broken'], twice=found[name]['twice'])
            assert not any(wrong.values()), (name, wrong)
    assert len(found)>60 and sum(len(o['links']) for o in found.values())>4000
    for name,page in found.items():
        raw = re.findall(r'^\s*#\|.*|Traceback \(most.*|^:::.*|\$\$.*|\\(?:frac|mathbb|text)\b.*', page['words'], re.M)
        assert not raw, f'{name} shows {raw[0]!r}'
        for o in page['links']:
            if not o.startswith(served): continue
            to,_,anchor = unquote(o.removeprefix(served)).partition('#')
            to = to or 'index.html'
            assert (site/to).exists(), f'{name} links to {o}, which is not there'
            assert not anchor or anchor in found[to]['ids'], f'{name} links to {o}: no such place'

@needs_zensical
@needs_chromium
def test_both_colour_schemes_can_be_read(site):
    with serving(site, bare=True) as served, Browser() as b:
        for dark,scheme in (False,'default'), (True,'slate'):
            b.screen(390 if dark else 1280, dark)
            for name in 'index.html', 'explanations/cpu.html', 'structure/blocks.html', 'init.html', '404.html':
                b.go(served+name)
                b.wait(f'document.body.dataset.mdColorScheme=={scheme!r}')
                seen = b.js(PALE)
                assert seen['seen']>5 and not seen['pale'], (name, scheme, seen['pale'][:3])
        b.js("document.querySelector('article p').style.color = '#444'")
        assert len(b.js(PALE)['pale'])==1, 'pale text is seen'

@needs_chromium
def test_page_of_a_run_plays(tmp_path):
    "From its file alone, to the last epoch, without a word to the console"
    from dsb.training.config import TrainConfig
    from dsb.training.folder import load_checkpoint
    from dsb.training.report import write_report
    from dsb.training.train import Trainer
    run, few = tmp_path/'run', dict(epochs=3, T=2, n_train=128, n_test=64, rule='columns')
    Trainer(TrainConfig('lenet300-100', 'digits', **few), run, verbose=False).fit()
    page = write_report(run, load_checkpoint(run)[1]).as_uri()
    def by(name): return f"document.getElementById('{name}')"
    for width,dark in (1280,False), (390,True):
        with Browser() as b:
            b.screen(width, dark)
            b.go(page)
            b.js(f"{by('moment')}.value = 0; {by('moment')}.dispatchEvent(new Event('input'))")
            first = b.js(f"{by('mask0')}.toDataURL()")
            assert b.js(f"{by('when')}.textContent")=='step 0, the start'
            b.js(f"{by('play')}.click()")
            b.wait(f"{by('when')}.textContent.endsWith(', epoch 3')", 60)
            assert b.js(f"{by('mask0')}.toDataURL()")!=first, 'nothing moves'
            assert b.js('document.documentElement.scrollWidth')<=width and not b.js(PALE)['pale']
            assert not b.errors() and not from_elsewhere(b, page)

@needs_zensical
@needs_chromium
@pytest.mark.parametrize('how', ['server','file'])
def test_search(site, how):
    "With a server, and from the folder without one"
    box = "[...document.querySelectorAll('*')].find(o => o.shadowRoot)?.shadowRoot"
    with serving(site) as served, Browser() as b:
        base = served if how=='server' else site.as_uri()+'/'
        b.screen(1280)
        b.go(base+'index.html')
        b.js("document.querySelector('.md-search__button').click()")
        b.wait(f"{box}?.activeElement?.tagName=='INPUT'")
        b.call('Input.insertText', text='sparsify')
        b.wait(f"{box}.querySelector('a')")
        hits = b.js(f"[...{box}.querySelectorAll('a')].map(o => o.href)")
        assert not b.errors() and not from_elsewhere(b, base)
    assert hits[0]==f'{base}sparsify.html?h=sparsify#sparsify'

@needs_zensical
def test_search_leads_to_places_that_are_there(site, pages):
    found = json.loads((site/'search.json').read_text())['items']
    places = [unquote(o['location']).partition('#')[::2] for o in found]
    assert len(places)>1000
    wrong = [(f,a) for f,a in places if a and a not in pages[f or 'index.html'].ids]
    assert not wrong, wrong[:5]
