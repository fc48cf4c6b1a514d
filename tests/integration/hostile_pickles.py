"""The parts of hostile checkpoints: pickles that call what they like, and archives that claim what they like."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

REFUSED, CLEANED, NOT_RESUMED = 'refused', 'cleaned', 'not resumed'
Case = tuple[str, str, Callable[[Path], object]]


class Call:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


class Name:
    """Pickles as a call of a name, which needs not exist here."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.module, self.name, self.arguments = module, name, arguments


class NamingPickler(pickle._Pickler):
    """A pickler that writes :class:`Name` as it is told."""

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, Name):
            self.write(f'c{value.module}\n{value.name}\n'.encode())
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


class Naming:
    """A pickle module for ``torch.save``."""

    Pickler = NamingPickler
    __name__ = 'pickle'


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    """Write a zip archive of these records."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, 'w', compression) as file:
            for name, data in records.items():
                file.writestr(name, data)

    return write


def legacy(content: dict, path: Path, share: float) -> None:
    torch.save({'state_dict': content['state_dict']}, path, _use_new_zipfile_serialization=False)
    os.truncate(path, int(path.stat().st_size * share))


def claiming(values: int, shape: tuple[int, ...], offset: int = 0) -> dict[str, bytes]:
    """The records of a checkpoint with one tensor, whose storage of four values claims to have more."""

    def number(value: int) -> bytes:
        return b'\x8a\x09' + value.to_bytes(9, 'little', signed=True)

    storage = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu' + number(values) + b'tQ'
    view = number(offset) + b'(' + b''.join(map(number, shape)) + b't(K\x01t' + b'\x89ccollections\nOrderedDict\n)R'
    tensor = b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + view + b'tR'
    pickled = b'\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00w' + tensor + b'ss.'
    return {'a/data.pkl': pickled, 'a/byteorder': b'little', 'a/data/0': struct.pack('4f', 1, 2, 3, 4), 'a/version': b'3\n'}
