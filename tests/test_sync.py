"Modules are what the notebooks export, and notebooks are clean: exporting and cleaning a copy changes nothing"
import os, shutil, subprocess, sysconfig
from pathlib import Path
from dsb.dev.site import Project

project = Project(os.path.dirname(__file__))

def contents(root):
    "Path -> bytes of every notebook and module"
    def hidden(o): return any(p[0] in '._' for p in o.relative_to(root).parts if p not in ('__init__.py','_modidx.py'))
    found = [o for d in (project.nbs.name, project.lib) for s in ('ipynb','py') for o in (root/d).rglob(f'*.{s}')]
    return {o.relative_to(root).as_posix():o.read_bytes() for o in found if not hidden(o)}

def test_exported_and_clean(tmp_path):
    without = shutil.ignore_patterns('__pycache__', '.*')
    for d in (project.nbs.name, project.lib): shutil.copytree(project.root/d, tmp_path/d, ignore=without)
    shutil.copy(project.root/'settings.ini', tmp_path)
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}   # set, it turns both commands into nothing
    for cmd in ('nbdev_export','nbdev_clean'):
        command = [Path(sysconfig.get_path('scripts'))/cmd]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    ours,made = contents(project.root),contents(tmp_path)
    differ = sorted(k for k in ours.keys()|made.keys() if ours.get(k)!=made.get(k))
    assert not differ, f'run `nbdev_export && nbdev_clean` and commit the result; these would change: {differ}'
    assert len(made)>2
