"What the package needs to know of itself is in `settings.ini`: edit there"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
words = lambda key: cfg.get(key, '').split()
readme = here/'README.md'
lib = cfg['lib_path']

def from_elsewhere(text):
    "The README for people who see it elsewhere, as on PyPI: what leads to a file leads to the repository"
    def link(m):
        kind = 'raw' if m[1] else 'blob'
        return f"{m[1]}[{m[2]}]({cfg['git_url']}/{kind}/{cfg['branch']}/{m[3]})"
    blocks = re.split(r'(^```.*?^```$)', text, flags=re.M|re.S)          # code stays as it is
    words = [o if i%2 else re.sub(r'(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)', link, o) for i,o in enumerate(blocks)]
    return ''.join(words)

setup(
    name=cfg['dist_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    long_description=from_elsewhere(readme.read_text(encoding='utf-8')) if readme.exists() else '',
    long_description_content_type='text/markdown',
    license_expression={'apache2':'Apache-2.0'}[cfg['license']], license_files=['LICENSE'],
    classifiers=['Intended Audience :: Science/Research', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 *[f'Programming Language :: Python :: {v}' for v in words('python_versions')]],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(str(here), include=[lib, f'{lib}.*']), include_package_data=True, zip_safe=False,
    install_requires=words('requirements'),
    extras_require={'dev':words('dev_requirements')+words('site_requirements'),
                    **{k:words(f'{k}_requirements') for k in ('site','trainers','formats')}},
    entry_points={'console_scripts':words('console_scripts'), 'nbdev':[f'{lib}={lib}._modidx:d']})
