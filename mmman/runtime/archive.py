"""Checks, without loading anything, that a file is a complete checkpoint written by ``torch.save``.

``torch.load`` verifies no checksum and trusts the sizes that a file states. This module checks the structure of the archive as
``torch.save`` writes it, and the classes and functions that its pickle names.
"""

from __future__ import annotations

import io
import os
import pickletools
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mmman.errors import CheckpointError
from mmman.runtime.allowed_types import is_allowed

_ZIP = b'PK\x03\x04'
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the pickled magic number at the start of files of torch < 1.6
_MAX_OPCODES = 10_000_000


def check_archive(path: str | os.PathLike) -> bool:
    """Check a file's checksums, record names and sizes, and the classes and functions that its pickle names.

    Returns:
        True for an archive; False for a file of torch < 1.6, which has no checksums, so that damaged weights can't be detected.

    Raises:
        CheckpointError: The file is no complete checkpoint. The message doesn't contain the file's name.
    """
    if not os.path.isfile(path):
        kind = 'is not a file' if os.path.exists(path) else 'does not exist'
        raise CheckpointError(kind)
    with open(path, 'rb') as file:
        start = file.read(len(_LEGACY))
        file.seek(0)
        if not start:
            raise CheckpointError('is empty')
        if start == _LEGACY and not tarfile.is_tarfile(path):
            for _ in range(5):  # magic number, protocol, system, object, keys of storages
                _check_names(_pickled_names(file))
            return False
    if not start.startswith(_ZIP):
        raise CheckpointError('is truncated, damaged or not a checkpoint: it does not begin like a file of torch.save')
    try:
        _check_zip(path)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f'is truncated, damaged or not a checkpoint: {error}') from error
    return True


def _check_zip(path: str | os.PathLike) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        _check_records(records, os.path.getsize(path))
        if damaged := archive.testzip():
            raise CheckpointError(f'is damaged: the checksum of its record {damaged} is wrong')
        root = records[0].filename.partition('/')[0]
        _check_names(_pickled_names(io.BytesIO(archive.read(f'{root}/data.pkl'))))


def _check_records(records: list[zipfile.ZipInfo], size: int) -> None:
    """Check that names and sizes are as ``torch.save`` writes them, so that every zip reader finds the same records."""
    names = [record.orig_filename for record in records]
    roots = {name.partition('/')[0] for name in names}
    if len(roots) != 1 or f'{next(iter(roots))}/data.pkl' not in names:
        raise CheckpointError(f'is a zip archive, but not a checkpoint: {", ".join(names[:3]) or "it is empty"}')
    if any(name.endswith('/constants.pkl') for name in names):
        raise CheckpointError('is a TorchScript archive, not a checkpoint')
    for name in names:
        if not name.isprintable() or '\\' in name or '..' in name.split('/') or name.startswith('/'):
            raise CheckpointError(f'is not an archive of torch.save: it has a record named {name!r}')
    if len({name.lower() for name in names}) < len(names):
        raise CheckpointError('is not an archive of torch.save: two of its records have the same name')
    if any(record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size for record in records):
        raise CheckpointError('is not an archive of torch.save: its records are compressed')
    if min(record.header_offset for record in records) != 0 or sum(record.file_size for record in records) > size:
        raise CheckpointError('is not an archive of torch.save: its records overlap, or do not begin at the start of the file')


def _pickled_names(file: BinaryIO) -> Iterator[str]:
    """Yield the classes and functions that a pickle names, as ``module.name``. Disassembles the pickle up to its end."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == 'GLOBAL':
            name = argument.replace(' ', '.')
            yield f'builtins.{name.removeprefix("__builtin__.")}' if name.startswith('__builtin__.') else name
        elif count > _MAX_OPCODES:
            raise CheckpointError(f'has a pickle of more than {_MAX_OPCODES} operations')


def _check_names(names: Iterator[str]) -> None:
    for name in names:
        if not is_allowed(name):
            raise CheckpointError(f'contains {name}, which is not needed for weights or logs: loading it could run code')


def format_path(path: str | os.PathLike) -> str:
    """Format a path for a message: on one line, whatever characters the path contains."""
    text = os.fspath(Path(path))
    return text if text.isprintable() else repr(text)
