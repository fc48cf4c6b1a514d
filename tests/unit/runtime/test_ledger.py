"""The list of which run wrote which file of a folder: what it takes for a run's own."""

import os
import shutil

import pytest

from mmman.runtime.atomic_files import UNFINISHED, AtomicBackend
from mmman.runtime.ledger import Ledger


@pytest.fixture
def folder(tmp_path):
    AtomicBackend(run='first').put(b'one', tmp_path / 'run' / 'a.pth')
    AtomicBackend(run='second').put(b'two', tmp_path / 'run' / 'b.pth')
    AtomicBackend().put(b'nobody', tmp_path / 'run' / 'c.pth')
    return tmp_path / 'run'


def test_files_are_the_run_s_that_wrote_them(folder):
    runs = {path.name: Ledger(folder).run_of(str(path)) for path in folder.glob('*.pth')}
    assert runs == {'a.pth': 'first', 'b.pth': 'second', 'c.pth': None}
    AtomicBackend(run='second').put(b'one', folder / 'a.pth')
    assert Ledger(folder).run_of(folder / 'a.pth') == 'second'
    assert [*Ledger(folder).unfinished_files('second', UNFINISHED)] == []


def test_a_copy_that_keeps_times_keeps_its_owners_and_others_do_not(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'copy')
    assert Ledger(tmp_path / 'copy').run_of(tmp_path / 'copy' / 'a.pth') == 'first'
    assert Ledger(tmp_path / 'copy').run_of(folder / 'a.pth') is None
    (folder / 'a.pth').write_bytes(b'ONE')
    assert Ledger(folder).run_of(folder / 'a.pth') is None


def test_what_is_no_file_of_the_folder_is_nobodys(folder, tmp_path):
    shutil.copy2(folder / 'a.pth', tmp_path / 'a.pth')
    (folder / 'link').symlink_to(tmp_path)
    shutil.move(folder / 'b.pth', tmp_path / 'b.pth')
    (folder / 'b.pth').symlink_to(tmp_path / 'b.pth')
    outside = [tmp_path / 'a.pth', f'{folder}/../a.pth', f'{folder}/link/a.pth', folder / 'b.pth', folder, folder / 'gone.pth']
    for path in [*outside, '', '.', '\0', 'x' * 10_000, '\udcff', 5, None, b'a.pth', ['a.pth']]:
        assert Ledger(folder).run_of(path) is None, path
    assert Ledger(folder).run_of(f'{folder}/../run/a.pth') == 'first'  # another spelling of the same file
    (tmp_path / 'other_name').symlink_to(folder)
    assert Ledger(tmp_path / 'other_name').run_of(tmp_path / 'other_name' / 'a.pth') == 'first'  # a work folder may be a link


def test_begun_files_are_the_run_s_until_they_are_complete(folder):
    ledger = Ledger(folder)
    for name in ('d.pth', 'e.pth'):
        ledger.path.write_bytes(ledger.with_entry(f'{name}{UNFINISHED}', 'first'))
        (folder / f'{name}{UNFINISHED}').touch()
    (folder / f'f.pth{UNFINISHED}').touch()
    os.unlink(folder / f'e.pth{UNFINISHED}')
    assert [*ledger.unfinished_files('first', UNFINISHED)] == [folder / f'd.pth{UNFINISHED}']
    assert [*ledger.unfinished_files('second', UNFINISHED)] == []


@pytest.mark.parametrize(
    'content', [b'', b'\x80\xff', b'[]', b'{"a.pth": 1, "../a.pth": {"run": "x"}}', b'{"a.pth": {"run": 5}}', b'[' * 100_000]
)
def test_an_unreadable_list_is_an_empty_one(content, folder):
    Ledger(folder).path.write_bytes(content)
    assert Ledger(folder).run_of(folder / 'a.pth') is None
    AtomicBackend(run='first').put(b'one', folder / 'a.pth')
    assert Ledger(folder).run_of(folder / 'a.pth') == 'first'
