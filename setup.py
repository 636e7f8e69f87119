from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = dict(ini['DEFAULT'])
lib = Path(cfg['lib_path'])
data = [p.relative_to(lib).as_posix() for p in lib.rglob('*') if p.is_file() and p.suffix not in ('.py','.pyc')]   # recipes and such

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'], url=cfg['git_url'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', license_files=['LICENSE', 'settings.ini'],   # the sdist needs settings.ini to build
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path']+'*']), package_data={cfg['lib_path']: data}, zip_safe=False,
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]),
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                 *(f'Programming Language :: Python :: 3.{v}' for v in range(10, 14)), 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
