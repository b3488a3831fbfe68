"The modules are what the notebooks export, and the notebooks are clean: on a scratch copy, exporting and cleaning change nothing"
import os, shutil, subprocess, sysconfig
from pathlib import Path
from dsb.dev.site import Project

project = Project(os.path.dirname(__file__))

def contents(root):
    "Path -> bytes of every notebook and module"
    found = [o for d in (project.nbs.name, project.lib) for s in ('ipynb','py') for o in (root/d).rglob(f'*.{s}')]
    return {o.relative_to(root).as_posix():o.read_bytes() for o in found if not any(p[0] in '._' and p!='__init__.py' and p!='_modidx.py' for p in o.relative_to(root).parts)}

def test_exported_and_clean(tmp_path):
    for d in (project.nbs.name, project.lib): shutil.copytree(project.root/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    shutil.copy(project.root/'settings.ini', tmp_path)
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}   # set, it turns both commands into nothing
    for cmd in ('nbdev_export','nbdev_clean'):
        subprocess.run([Path(sysconfig.get_path('scripts'))/cmd], cwd=tmp_path, env=env, check=True, capture_output=True)
    ours,made = contents(project.root),contents(tmp_path)
    differ = sorted(k for k in ours.keys()|made.keys() if ours.get(k)!=made.get(k))
    assert not differ, f'run `nbdev_export && nbdev_clean` and commit the result; these files would change: {differ}'
    assert len(made)>2
