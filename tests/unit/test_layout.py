"""Unit tests mirror the code: a test file for each module, or a line in the table of tests/README.md."""

import ast
import re

from tests.conftest import ROOT

PACKAGE, TESTS = ROOT / 'mmman', ROOT / 'tests'
WHOLE_PACKAGE = {'test_layout.py', 'test_package.py'}
"""Unit tests that are about no single module."""


def is_pure_data(path):
    """Whether a module defines no function and no class."""
    return not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(ast.parse(path.read_text())))


def modules():
    paths = (path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py' and not is_pure_data(path))
    return {path.relative_to(PACKAGE).as_posix() for path in paths}


def table():
    """The lines of the table, from the module to the test that covers it."""
    return dict(re.findall(r'^\| `([\w/]+\.py)` \| `([\w/]+\.py)` \|$', (TESTS / 'README.md').read_text(), re.MULTILINE))


def file_of(module):
    folder, _, name = module.rpartition('/')
    return TESTS / 'unit' / folder / f'test_{name}'


def test_every_module_has_its_test_file_or_a_line_in_the_table():
    without = {module for module in modules() if not file_of(module).is_file()}
    assert without == table().keys(), 'write the missing test file, or change the table of tests/README.md'


def test_the_table_names_tests_that_there_are():
    assert [test for test in table().values() if not (TESTS / test).is_file()] == []


def test_no_unit_test_is_named_after_nothing():
    """It is named after a module, or a package, of ``mmman`` or of ``tools``."""
    files = (path.relative_to(TESTS / 'unit') for path in (TESTS / 'unit').rglob('test_*.py'))
    tested = {path.with_name(path.stem.removeprefix('test_')) for path in files if path.as_posix() not in WHOLE_PACKAGE}
    there = {path for path in tested for root in (PACKAGE, ROOT) if is_module_or_package(root / path)}
    assert sorted(tested - there) == []


def is_module_or_package(path):
    return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


def test_folders_of_tests_are_packages():
    """Test files of one name in two folders can't both be imported otherwise."""
    assert [path for path in TESTS.rglob('test_*.py') if not path.with_name('__init__.py').is_file()] == []
