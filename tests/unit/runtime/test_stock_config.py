"""Where a stock config is found, and the lines by which a child inherits from it."""

import pytest
from mmengine.config import Config

from mmman.errors import ConfigError
from mmman.runtime.stock_config import StockConfig, read_text

STOCK = 'model = dict(depth=18)\n'
PURE_PYTHON = 'from mmengine.config import read_base\n\nwith read_base():\n    from .base import *\n'


@pytest.fixture
def folder(tmp_path):
    """A stock config, and a pure Python one, in a folder of their own."""
    folder = tmp_path / 'configs'
    folder.mkdir()
    (folder / 'stock.py').write_text(STOCK)
    (folder / 'base.py').write_text(STOCK)
    (folder / 'pure.py').write_text(PURE_PYTHON)
    return folder


def test_a_file_is_inherited_by_its_relative_path(folder):
    source = StockConfig.read(str(folder / 'stock.py'))
    assert not source.is_new_style and source.cfg.model.depth == 18
    children = folder.parent / 'children'
    children.mkdir()
    assert source.inheritance_lines(children) == "_base_ = '../configs/stock.py'"
    assert source.inheritance_lines(None) == f"_base_ = '{folder / 'stock.py'}'"
    assert read_text(source.inheritance_lines(children), children).model.depth == 18
    assert [*children.iterdir()] == []  # the temporary file is gone


def test_a_pure_python_config_is_inherited_by_an_import(folder):
    source = StockConfig.read(str(folder / 'pure.py'))
    assert source.is_new_style and source.cfg.model.depth == 18
    for child, module in ((folder, '.pure'), (folder / 'a' / 'b', '...pure'), (folder.parent, '.configs.pure')):
        child.mkdir(parents=True, exist_ok=True)
        lines = source.inheritance_lines(child)
        assert f'from {module} import *' in lines
        (child / 'child.py').write_text(f'{lines}\n\nmodel.depth = 34\n')
        assert Config.fromfile(child / 'child.py').model.depth == 34
    with pytest.raises(ConfigError, match=r'set the path of the child \(-o\)'):
        source.inheritance_lines(None)
    odd = folder.rename(folder.with_name('odd-name'))
    with pytest.raises(ConfigError, match="'odd-name' in the path is not a Python name"):
        StockConfig.read(str(odd / 'pure.py')).inheritance_lines(odd.parent)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('none.py', None, '^no config at .*none.py; give the path of a file, or library::path'),
        ('text.txt', 'a = 1', r'text.txt is not a config: mmengine reads \.py'),
        ('broken.py', 'a = 1 / 0', 'broken.py cannot be read as a config: ZeroDivisionError: division by zero$'),
        ('broken.py', 'a = (', 'broken.py cannot be read as a config: '),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, folder):
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        StockConfig.read(str(folder / name))
    assert '\n' not in str(caught.value)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An installed library with two configs, one in a folder that mmengine takes for no name."""
    configs = tmp_path / 'mmtoy' / '.mim' / 'configs'
    for path in ('resnet/stock.py', 'gn+ws/stock.py'):
        (configs / path).parent.mkdir(parents=True)
        (configs / path).write_text(STOCK)
    (tmp_path / 'mmtoy' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    return configs


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('mmtoy::resnet/stok.py', "mmtoy has no config 'resnet/stok.py'; did you mean mmtoy::resnet/stock.py"),
        ('mmtoy::x', "mmtoy has no config 'x'; its configs are below"),
        ('mmnone::a.py', "there is no installed library 'mmnone' with configs"),
        ('a b::c.py', "there is no installed library 'a b' with configs"),
    ],
)
def test_names_of_a_library_are_checked(name, message, library):
    with pytest.raises(ConfigError, match=message):
        StockConfig.read(name)


@pytest.mark.parametrize(
    ('name', 'base'),
    [
        ('mmtoy::resnet/stock.py', 'mmtoy::resnet/stock.py'),
        ('mmtoy::resnet/stock', 'mmtoy::resnet/stock.py'),
        ('mmtoy::gn+ws/stock.py', 'mmtoy::_base_/../gn+ws/stock.py'),
    ],
)
def test_a_librarys_config_is_inherited_by_the_name_that_mmengine_resolves(name, base, library):
    path = library / name.partition('::')[2].removesuffix('.py')
    source = StockConfig(name, path.with_suffix('.py'), Config(), is_new_style=False)
    assert source.inheritance_lines(None) == f'_base_ = {base!r}'
