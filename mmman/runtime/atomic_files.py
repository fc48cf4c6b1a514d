"""Writes files atomically, so that a file has its name only once it is complete, and describes write errors."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from mmman.errors import CheckpointWriteError
from mmman.runtime.ledger import Ledger

UNFINISHED = '.unfinished'
ATOMIC_BACKEND = 'mmman.atomic'

_REMEDIES = {
    errno.ENOSPC: 'free space on that disk',
    errno.EDQUOT: 'free space within the quota',
    errno.EFBIG: 'raise the limit on file sizes (ulimit -f)',
    errno.EROFS: 'mount the disk writable',
    errno.EACCES: 'make the folder writable',
    errno.EPERM: 'make the folder writable',
    errno.EEXIST: 'remove the file that has the name of the folder',
    errno.ENOTDIR: 'remove the file that has the name of the folder',
    errno.EISDIR: 'remove the folder that has the name of the file',
}


@contextmanager
def converting_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Context that converts an ``OSError`` to an error that names the path, the reason and the remedy.

    Raises:
        CheckpointWriteError: The code inside raised an ``OSError``.
    """
    try:
        yield
    except ConnectionError:  # another process has failed; it is not a write error
        raise
    except OSError as error:
        raise _write_error(path, error) from error


@contextmanager
def converting_full_disk_errors(folder: str | os.PathLike) -> Iterator[None]:
    """Like :func:`converting_write_errors`, but only for a full or read-only disk. For code that does more than write.

    Args:
        folder: The folder to name if the error has no path.

    Raises:
        CheckpointWriteError: A disk or quota is full, or a disk is read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise _write_error(error.filename or folder, error) from error


def _write_error(path: str | os.PathLike, error: OSError) -> CheckpointWriteError:
    remedy = _REMEDIES.get(error.errno, 'check the disk')
    return CheckpointWriteError(
        f'cannot write {os.fspath(path)}: {error.strerror or error}. Earlier checkpoints are unchanged: {remedy} and continue '
        'with --resume, or continue in another work folder: --work-dir FOLDER --resume CHECKPOINT'
    )


def check_folder(folder: str | os.PathLike) -> None:
    """Create a folder if it doesn't exist, and check that files can be written there. Leaves no file.

    Raises:
        CheckpointWriteError: Files can't be written there.
    """
    with converting_write_errors(folder):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_atomically(data: bytes, path: str | os.PathLike) -> None:
    """Write a file atomically: an existing file stays until all of the new one is on the disk.

    Args:
        data: The content of the file.
        path: The path of the file. If it is a symbolic link, the link is replaced and its target stays unchanged.

    Raises:
        CheckpointWriteError: The file can't be written. No partial file is left.
    """
    with converting_write_errors(path):
        _write(data, path)


class AtomicBackend(LocalBackend):
    """mmengine's local file backend with atomic writes.

    Args:
        run: The ID of the run that writes. If given, the folder's :class:`Ledger` records that the files belong to this run.
    """

    def __init__(self, run: str = '') -> None:
        self._run = run

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file atomically.

        Raises:
            CheckpointWriteError: The file can't be written. No partial file is left.
        """
        folder, name = os.path.split(os.path.abspath(filepath))
        ledger, run = Ledger(folder), self._run
        with converting_write_errors(filepath):
            os.makedirs(folder, exist_ok=True)
            if run:
                _write(ledger.with_entry(f'{name}{UNFINISHED}', run), ledger.path)
            _write(obj, filepath, lambda status: run and _write(ledger.with_entry(name, run, status), ledger.path))


def _write(
    data: bytes, path: str | os.PathLike, before_rename: Callable[[os.stat_result], object] = lambda status: None
) -> None:
    unfinished = f'{os.fspath(path)}{UNFINISHED}'
    with suppress(FileNotFoundError):  # removed, not overwritten: it may be a link to another file
        os.unlink(unfinished)
    with open(unfinished, 'xb') as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            before_rename(os.fstat(file.fileno()))
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


register_backend(ATOMIC_BACKEND, AtomicBackend, force=True)
