"""The types that a checkpoint may name besides tensors, each bound to a stand-in that validates its arguments.

``torch.load(weights_only=True)`` reads tensors and plain containers. mmengine's training checkpoints also hold log buffers and
NumPy values. NumPy's own unpickling functions trust their input: a crafted dtype can make them read out of bounds, and a
crafted shape can make them allocate any amount of memory. ``HistoryBuffer.__setstate__`` modifies a table of the class. The
names of these types are therefore bound to the functions and classes below, which build arrays and buffers from checked parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmman.errors import CheckpointError

_SIMPLE_DTYPE = re.compile(r'[biufc]\d{1,2}|[US]\d{1,6}')
_ORDERS = ('<', '>', '|', '=')


class LoadedDtype:
    """A NumPy dtype from a checkpoint: a number, a bool or a string of fixed length."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or not _SIMPLE_DTYPE.fullmatch(code):
            raise CheckpointError(f'holds a NumPy array of dtype {code!r}: only numbers, bools and strings are read')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Set the byte order; reject fields, subarrays and metadata."""
        if not isinstance(state, tuple) or len(state) != 8 or state[1] not in _ORDERS or any(state[2:5]):
            raise CheckpointError('holds a NumPy array of a structured dtype: only numbers, bools and strings are read')
        self.dtype = self.dtype.newbyteorder(state[1])


class LoadedArray(np.ndarray):
    """A NumPy array from a checkpoint. :func:`mmman.runtime.checkpoint.load_from_local` converts it to a plain array."""

    def __new__(cls) -> LoadedArray:
        """Return an empty array, whatever size the file asks for."""
        return super().__new__(cls, (0,), 'b')

    def __setstate__(self, state: tuple) -> None:
        """Fill the array from ``state``: (version, shape, dtype, Fortran order, bytes)."""
        _, shape, dtype, fortran, data = state
        is_shape = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not is_shape or not isinstance(dtype, LoadedDtype) or type(data) is not bytes:
            raise CheckpointError('holds a NumPy array whose shape, dtype or bytes are of the wrong type')
        if prod(shape) * dtype.dtype.itemsize != len(data):
            raise CheckpointError(f'holds a NumPy array of shape {shape} and {dtype.dtype} that has {len(data)} bytes')
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), data))

    def __reduce__(self) -> tuple:
        return np.asarray(self).__reduce__()


class LoadedBuffer(HistoryBuffer):
    """A log buffer from a checkpoint. Becomes an ordinary ``HistoryBuffer``, and doesn't change the class's statistics."""

    def __setstate__(self, state: dict) -> None:
        """Set the values and counts; ignore ``statistics_methods`` of the file."""
        values, counts, length = (state.get(name) for name in ('_log_history', '_count_history', 'max_length'))
        for array in (values, counts):
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in 'biuf':
                raise CheckpointError('holds a log buffer (HistoryBuffer) with other values than numbers')
        if len(values) != len(counts) or type(length) is not int or length < 1:
            raise CheckpointError('holds a log buffer (HistoryBuffer) whose values, counts and length are inconsistent')
        self.__init__(np.array(values), np.array(counts), max_length=max(length, len(values)))
        self.max_length = length
        self.__class__ = HistoryBuffer


def _reconstruct(kind: type, shape: tuple, code: bytes) -> LoadedArray:
    """Stand-in for ``numpy.core.multiarray._reconstruct``: return an empty array, which ``__setstate__`` fills."""
    return LoadedArray()


def _scalar(dtype: LoadedDtype, data: bytes) -> np.generic:
    """Stand-in for ``numpy.core.multiarray.scalar``."""
    if not isinstance(dtype, LoadedDtype) or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise CheckpointError('holds a NumPy scalar whose dtype and bytes are inconsistent')
    return np.frombuffer(data, dtype.dtype)[0]


def _no_bytes(*data: object) -> bytes:
    """Stand-in for ``bytes()``, which is how the content of an empty array is pickled."""
    if data:
        raise CheckpointError('calls bytes() with arguments')
    return b''


def _attribute(owner: type, name: str) -> str:
    """Stand-in for ``getattr``: only returns the name of a statistic of a log buffer."""
    if owner is LoadedBuffer and name in ('min', 'max', 'current', 'mean'):
        return name
    raise CheckpointError(f'contains the attribute {name!r} of {owner!r}: only statistics of a log buffer are allowed')


_BUFFER = f'{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}'
STAND_INS: dict[str, Callable[..., Any]] = {
    _BUFFER: LoadedBuffer,
    'builtins.getattr': _attribute,
    'builtins.bytes': _no_bytes,
    'numpy.ndarray': LoadedArray,
    'numpy.dtype': LoadedDtype,
    **{f'numpy.{core}.multiarray._reconstruct': _reconstruct for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
}
"""The stand-ins, by the name in the file. NumPy 1 and 2 pickle under different module names."""

_TORCH_NAMES = re.compile(
    r'torch\.(Size|device|\w+Storage|storage\.(Untyped|Typed)Storage|nn\.parameter\.Parameter'
    r'|_utils\._rebuild_(parameter|tensor|tensor_v2|tensor_v3)|u?int\d+|float\w*|bfloat16|complex\d+|bool|half|double|long)'
)
_CONTAINERS = {
    'collections.OrderedDict',
    'collections.Counter',
    '_codecs.encode',
    'builtins.set',
    'builtins.bytearray',
    'builtins.complex',
}


def is_allowed(name: str) -> bool:
    """Whether a checkpoint may name this class or function (``module.name``)."""
    return name in STAND_INS or name in _CONTAINERS or _TORCH_NAMES.fullmatch(name) is not None


def allow_training_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the content of mmengine's message hub, with the stand-ins of this module."""
    torch.serialization.add_safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()])
