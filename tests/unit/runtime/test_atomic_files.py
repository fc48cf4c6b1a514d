"""A file has its name only once it is complete, and an error says what to do."""

import errno
import os

import pytest

from mmman.errors import CheckpointWriteError
from mmman.runtime.atomic_files import (
    UNFINISHED,
    AtomicBackend,
    check_folder,
    converting_full_disk_errors,
    converting_write_errors,
    write_atomically,
)
from mmman.runtime.ledger import Ledger


@pytest.fixture
def full_disk(monkeypatch):
    """The disk is full when a file is to be complete on it."""

    def fsync(file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fsync)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / 'a'
    write_atomically(b'first', path)
    with path.open('rb') as reader:
        write_atomically(b'second', path)
        assert reader.read() == b'first'  # who has it open keeps it
    assert path.read_bytes() == b'second' and [*tmp_path.iterdir()] == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, full_disk):
    path = tmp_path / 'a'
    path.write_bytes(b'first')
    with pytest.raises(CheckpointWriteError, match=f'^cannot write {path}: No space left on device.*: free space on that disk'):
        write_atomically(b'second', path)
    assert path.read_bytes() == b'first' and [*tmp_path.iterdir()] == [path]


def test_links_are_replaced_and_never_written_through(tmp_path):
    target = tmp_path / 'target'
    target.write_bytes(b'of another run')
    for name in ('a', f'b{UNFINISHED}'):
        (tmp_path / name).symlink_to(target)
    write_atomically(b'mine', tmp_path / 'a')
    write_atomically(b'mine', tmp_path / 'b')
    assert target.read_bytes() == b'of another run' and not (tmp_path / 'a').is_symlink()


def test_the_backend_makes_folders_and_notes_whose_files_they_are(tmp_path):
    path = tmp_path / 'new' / 'iter_1.pth'
    AtomicBackend(run='mine').put(b'content', path)
    AtomicBackend().put(b'content', path.with_name('iter_2.pth'))
    ledger = Ledger(path.parent)
    assert ledger.run_of(path) == 'mine' and ledger.run_of(path.with_name('iter_2.pth')) is None
    assert path.read_bytes() == b'content'


def test_an_interrupted_file_is_noted_as_the_runs_own(tmp_path, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if str(target).endswith('.pth'):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, 'replace', killed)
    monkeypatch.setattr(os, 'unlink', lambda path: None)  # a killed process removes nothing
    with pytest.raises(KeyboardInterrupt):
        AtomicBackend(run='mine').put(b'content', tmp_path / 'iter_1.pth')
    unfinished = Ledger(tmp_path).unfinished_files('mine', UNFINISHED)
    assert [os.path.basename(path) for path in unfinished] == [f'iter_1.pth{UNFINISHED}']


@pytest.mark.parametrize(
    ('number', 'remedy'),
    [
        (errno.EROFS, 'mount the disk writable'),
        (errno.EACCES, 'make the folder writable'),
        (errno.ENOTDIR, 'remove the file that has the name of the folder'),
        (errno.EIO, 'check the disk'),
    ],
)
def test_the_error_says_what_to_do(number, remedy):
    message = f'^cannot write a/b: {os.strerror(number)}.*: {remedy}'
    with pytest.raises(CheckpointWriteError, match=message), converting_write_errors('a/b'):
        raise OSError(number, os.strerror(number))


def test_other_errors_stay_as_they_are():
    with pytest.raises(ConnectionError), converting_write_errors('a'):
        raise ConnectionResetError
    with pytest.raises(PermissionError), converting_full_disk_errors('a'):
        raise PermissionError(errno.EACCES, 'not the disk')
    with pytest.raises(CheckpointWriteError, match='cannot write b: '), converting_full_disk_errors('a'):
        raise OSError(errno.ENOSPC, 'full', 'b')
    with pytest.raises(CheckpointWriteError, match='cannot write a: '), converting_full_disk_errors('a'):
        raise OSError(errno.ENOSPC, 'full')


def test_a_folder_is_checked_without_a_trace(tmp_path):
    check_folder(tmp_path / 'new')
    assert [*(tmp_path / 'new').iterdir()] == []
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointWriteError, match='remove the file that has the name of the folder'):
        check_folder(tmp_path / 'file')
