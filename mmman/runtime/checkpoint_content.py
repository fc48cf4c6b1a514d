"""Checks that a checkpoint holds only weights and plain data of the types that mmengine writes.

``torch.load`` returns whatever the file describes. This module copies the result into new containers, value by value, so that
mmengine gets values of exactly these types: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, dict,
OrderedDict, Counter, torch's Size, device and dtype, dense tensors, NumPy arrays and scalars without objects, log buffers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from mmman.errors import CheckpointError
from mmman.runtime.config_text import plain_config

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.device, torch.dtype)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set, torch.Size)
_MAX_DEPTH, _MAX_VALUES = 50, 5_000_000
_SLACK = 64 * 2**20  # bytes by which views may exceed the file size: expanded buffers, tied weights
LOG = ('log_scalars', 'runtime_info', 'resumed_keys')  # the parts of the state of mmengine's message hub
_CONFIG_TEXTS = (('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg'))


def plain_checkpoint(loaded: Any, size: int) -> tuple[dict | Tensor, list[str]]:
    """Copy a loaded checkpoint, and check that it holds weights and has the structure of a checkpoint.

    Args:
        loaded: The result of ``torch.load(weights_only=True)``.
        size: Size of the file in bytes.

    Returns:
        The checkpoint, a dict, or a tensor if the file holds only one; and what was left out of it, one entry per part.

    Raises:
        CheckpointError: The file holds anything else, or no weights. The message doesn't contain the file's name.
    """
    if torch.is_tensor(loaded):  # mmseg stores embeddings of class names like this
        return _Copy(size).of(loaded, 'the checkpoint', 0), []
    if not isinstance(loaded, dict):
        raise CheckpointError(f'holds a {type(loaded).__name__}, not a dict of weights')
    checkpoint = _Copy(size).of(loaded, 'the checkpoint', 0)
    _check_weights(checkpoint)
    _check_log(checkpoint)
    return checkpoint, _drop_programs(checkpoint)


class _Copy:
    """Copies values into new containers. A value that is referenced twice is copied once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._claimed = self._held = 0
        self._copies: dict[int, tuple[Any, Any, int]] = {}  # by id: the original (kept alive), its copy, its values
        self._open: set[int] = set()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._values = 0

    def of(self, value: Any, where: str, depth: int) -> Any:
        self._values += 1
        if depth > _MAX_DEPTH or id(value) in self._open:
            raise CheckpointError(f'is nested too deeply, or in itself, at {where}')
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._copies:
            _, copied, values = self._copies[id(value)]
            self._values += values  # readers of the copy visit it once per reference
            self._check_number(where)
            return copied
        before = self._values
        self._open.add(id(value))
        copied = self._container(value, kind, where, depth)
        self._open.discard(id(value))
        self._copies[id(value)] = value, copied, self._values - before
        self._check_number(where)
        return copied

    def _check_number(self, where: str) -> None:
        if self._values > _MAX_VALUES:
            raise CheckpointError(f'holds more than {_MAX_VALUES} values, counted at {where}')

    def _container(self, value: Any, kind: type, where: str, depth: int) -> Any:
        if kind in _MAPPINGS:
            copied = kind()
            for key, item in value.items():
                copied[_key(key, where)] = self.of(item, _place(where, key, depth), depth + 1)
            if kind is OrderedDict and '_metadata' in vars(value):
                copied._metadata = _versions(vars(value)['_metadata'], where)
            return copied
        if kind in _SEQUENCES:
            items = [self.of(item, where, depth + 1) for item in value]
            return items if kind is list else kind(items)
        if kind is bytearray:
            return bytearray(value)
        if kind is HistoryBuffer:
            return value  # built by allowed_types.LoadedBuffer
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in 'biufcUS':
            return np.array(value) if isinstance(value, np.ndarray) else value
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, where)
        raise CheckpointError(f'holds a {kind.__module__}.{kind.__qualname__} at {where}')

    def _tensor(self, tensor: Tensor, where: str) -> Tensor:
        """Copy a tensor to a new storage: the loaded one is memory-mapped from a file that may change."""
        odd = tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg() or tensor.device.type == 'meta'
        if tensor.layout is not torch.strided or odd:
            raise CheckpointError(f'holds a tensor at {where} that is not a dense array of numbers')
        self._claimed += tensor.numel() * tensor.element_size()
        storage = self._storage(tensor.untyped_storage())
        if max(self._claimed / 4, self._held) > self._size + _SLACK:
            raise CheckpointError(f'claims tensors of {self._claimed} bytes up to {where}, far more than are in the file')
        copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copied.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        return nn.Parameter(copied, tensor.requires_grad) if type(tensor) is nn.Parameter else copied

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return the copy of a storage. Tensors that share a storage share its copy."""
        key = storage.data_ptr()
        if not key or storage.device.type != 'cpu':
            return storage
        known = self._storages.get(key)
        if known is None or known.nbytes() < storage.nbytes():
            self._held += storage.nbytes()
            if self._held > self._size + _SLACK:
                return storage  # the caller raises
            self._storages[key] = known = storage.clone()
        return known


def _place(where: str, key: Any, depth: int) -> str:
    name = str(key)[:80]
    return f'{where}.{name}' if depth else name


def _key(key: Any, where: str) -> Any:
    if type(key) is str and not key.isprintable():
        raise CheckpointError(f'has a key with control characters in {where}: {key!r}')
    if type(key) not in (str, int, float, bool, type(None), tuple) or (
        type(key) is tuple and any(type(part) not in (str, int, float, bool, type(None)) for part in key)
    ):
        raise CheckpointError(f'has a {type(key).__name__} as a key in {where}')
    return key


def _versions(metadata: Any, where: str) -> OrderedDict:
    """Keep the module versions, which modules need to convert old tensors. Drop entries that control how torch loads."""
    if not isinstance(metadata, dict) or not all(
        type(name) is str and isinstance(entry, dict) and type(entry.get('version')) in (int, type(None))
        for name, entry in metadata.items()
    ):
        raise CheckpointError(f'has _metadata in {where} that are not versions of modules')
    return OrderedDict((name, {'version': entry['version']} if 'version' in entry else {}) for name, entry in metadata.items())


def _check_weights(checkpoint: dict) -> None:
    _check_names(checkpoint, 'the checkpoint')
    if 'state_dict' in checkpoint:
        for name in ('state_dict', 'ema_state_dict'):
            if name in checkpoint:
                _check_state(checkpoint[name], name)
        for name, averaged in checkpoint.get('ema_state_dict', {}).items():
            trained = checkpoint['state_dict'].get(name.removeprefix('module.'))
            if name.startswith('module.') and getattr(trained, 'shape', None) != getattr(averaged, 'shape', None):
                raise CheckpointError(f'has averaged weights (ema_state_dict) for {name}, but no weights of that shape')
    elif not any(torch.is_tensor(value) for part in (checkpoint, *_dicts(checkpoint)) for value in part.values()):
        # init_cfg also accepts weights below other names: 'model', 'teacher'
        found = ', '.join(map(str, [*checkpoint][:3]))
        raise CheckpointError(f'has no weights: it has no state_dict, only {found or "an empty dict"}')
    if not isinstance(checkpoint.get('meta', {}), dict):
        raise CheckpointError(f'has a meta that is not a dict but a {type(checkpoint["meta"]).__name__}')
    _check_names(checkpoint.get('meta', {}), 'meta')


def _check_state(state: Any, name: str) -> None:
    if not isinstance(state, dict) or not any(map(torch.is_tensor, state.values())):
        raise CheckpointError(f'has no weights: its {name} has no tensor')
    _check_names(state, name)
    for key, value in state.items():
        if not torch.is_tensor(value) and not key.endswith('_extra_state'):
            raise CheckpointError(f'has a {type(value).__name__} instead of a tensor: {key} in {name}')


def _check_log(checkpoint: dict) -> None:
    log = checkpoint.get('message_hub')
    if log is None:
        return
    if not isinstance(log, dict):
        raise CheckpointError(f'has a message_hub that is not a dict but a {type(log).__name__}')
    for part in LOG:
        if not isinstance(log.get(part, {}), dict):
            raise CheckpointError(f'has a message_hub whose {part} is not a dict but a {type(log[part]).__name__}')
        _check_names(log.get(part, {}), part)


def _check_names(mapping: dict, where: str) -> None:
    if odd := [name for name in mapping if type(name) is not str]:
        raise CheckpointError(f'has a {type(odd[0]).__name__} as a key in {where}: {odd[0]!r}')


def _drop_programs(checkpoint: dict) -> list[str]:
    """Remove what mmengine would execute, which is the text of configs, except for plain data. Return what was removed."""
    left_out = []
    # runner.resume executes meta.config to compare the number of GPUs, for checkpoints of mmcv of 2021.
    if 'config' in checkpoint.get('meta', {}):
        del checkpoint['meta']['config']
        left_out.append('meta.config')
    for *parents, name in _CONFIG_TEXTS:
        holder = checkpoint
        for parent in parents:
            holder = holder.get(parent) or {}
        if name not in holder:
            continue
        text, reasons = plain_config(holder[name]) if isinstance(holder[name], str) else ('', ['it is not a string'])
        if reasons:
            left_out.append(f'{".".join(parents)}.{name} {"except its plain values" if text else "entirely"}: {reasons[0]}')
        if text:
            holder[name] = text
        else:
            del holder[name]
    return left_out


def _dicts(mapping: dict) -> list[dict]:
    return [value for value in mapping.values() if isinstance(value, dict)]
