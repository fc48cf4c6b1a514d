"""What a wheel and an sdist bring, the installed package in a process of its own, and the index of the models."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

SOURCES = ('mmman', 'configs', 'tools', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'model-index.yml')
TEXTS = ('README.md', 'LICENSE', 'CHANGELOG.md')


def tracked(folder):
    """Files of the checkout below a folder, without what Python and an editable install write there."""
    files = (path for path in (ROOT / folder).rglob('*') if path.is_file() and path.suffix not in ('.pyc', '.pyo'))
    return {path.relative_to(ROOT).as_posix() for path in files if '.mim' not in path.parts}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what the package is built from, because a build writes into its folder."""
    if missing := [name for name in ('setuptools', 'wheel') if importlib.util.find_spec(name) is None]:
        pytest.skip(f'a build needs {", ".join(missing)}')
    folder = tmp_path_factory.mktemp('source')
    names = (*SOURCES, *TEXTS)
    files = sorted(set().union(*(tracked(name) if (ROOT / name).is_dir() else {name} for name in names)))
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / name).chmod((ROOT / name).stat().st_mode)
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    options = '--no-deps', '--no-build-isolation', '--no-index', '--no-cache-dir', '--disable-pip-version-check'
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', *options, '-w', folder, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob('mmman-*.whl')
    return path


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    """The wheel, unpacked as an installation does."""
    folder = tmp_path_factory.mktemp('site')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_a_wheel_brings_the_package_configs_tools_and_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
    below_mim = tracked('configs') - tracked('configs/paper') | tracked('tools') | {'model-index.yml'}
    assert names == {f'mmman/.mim/{name}' for name in below_mim} | tracked('mmman')


def test_an_sdist_brings_what_a_wheel_is_built_from(source, tmp_path):
    code = f'from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))'
    subprocess.run([sys.executable, '-c', code], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob('mmman-*.tar.gz')
    with tarfile.open(path) as archive:
        names = {member.name.partition('/')[2]: member.mode for member in archive if member.isfile()}
    assert (tracked('mmman') | tracked('configs') | tracked('tools') | {*TEXTS, 'setup.py', 'model-index.yml'}) <= names.keys()
    assert names['tools/dist_train.sh'] & 0o111


def test_metadata(site):
    (folder,) = site.glob('mmman-*.dist-info')
    assert 'mmman = mmman.__main__:main' in (folder / 'entry_points.txt').read_text()
    metadata = message_from_string((folder / 'METADATA').read_text())
    required = [line for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line]
    assert sorted(line.split('<')[0].split('>')[0].split('(')[0].strip() for line in required) == ['mmengine', 'torch']


INSTALLED = """
import sys
import mmman
from mmengine.config import Config
from mmman.__main__ import main
from mmman.runtime.stock_config import config_path

child, config = sys.argv[1:]
print(mmman.__file__)
print(config_path(f'mmman::{config}'))
cfg = Config.fromfile(child)
print(cfg.model.backbone.type, cfg.model.backbone.num_blocks, cfg.work_dir)
sys.argv[0] = 'mmman'
main(['fit', '--help'])
"""


def test_the_installed_package_alone(site, tmp_path):
    """Its configs are inherited and its commands run, without the checkout."""
    pytest.importorskip('mmdet')
    config = next(name for name in configs_of_index() if 'retinanet' in name).removeprefix('configs/')
    child = tmp_path / 'child.py'
    folder, _, name = config.rpartition('/')
    child.write_text(f"_base_ = 'mmman::{folder or '_base_/..'}/{name}'\nwork_dir = 'here'\n")
    environment = {**os.environ, 'PYTHONPATH': str(site)}
    command = [sys.executable, '-c', INSTALLED, child, config]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    package, path, backbone, *text = done.stdout.splitlines()
    assert Path(package) == site / 'mmman' / '__init__.py'
    assert Path(path) == site / 'mmman' / '.mim' / 'configs' / config
    assert backbone == 'mmman.LocalBackbone 4 here'
    assert text[0].startswith('usage: mmman fit ')


def configs_of_index():
    files = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    return [model['Config'] for file in files for model in yaml.safe_load((ROOT / file).read_text())['Models']]


def test_every_model_of_the_index_has_a_config_that_mim_finds():
    """mim looks for the file's name below all folders, and refuses one that two files have."""
    names = configs_of_index()
    assert names and [name for name in names if not (ROOT / name).is_file()] == []
    files = [Path(name).name for name in tracked('configs') - tracked('configs/paper')]
    assert [name for name in names if files.count(Path(name).name) != 1] == []


def test_the_index_is_one():
    loader = pytest.importorskip('modelindex.load_model_index')
    index = loader.load(str(ROOT / 'model-index.yml'))
    assert not index.check(silent=True)
    assert {model.config for model in index.models} == {*configs_of_index()}


def test_numbers_of_the_index_are_measured():
    """docs/results.md has each of them."""
    results = (ROOT / 'docs' / 'results.md').read_text().replace(',', '')
    for file in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((ROOT / file).read_text())['Models']:
            for key, value in model.get('Metadata', {}).items():
                if key.endswith('(GB)'):
                    assert f'| {1000 * value:.6g}' in results or f' {1000 * value:.6g} MB' in results, (model['Name'], key)
                elif key.endswith('(%)'):
                    assert f'-{value} %' in results, (model['Name'], key)
