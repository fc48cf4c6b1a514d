"""Count live tensor bytes, exactly and reproducibly, on any device.

torch's ``MemTracker`` counts the same bytes, but it hooks the gradient of every parameter. So it refuses models with frozen
parameters, which every momentum copy and every stock ``frozen_stages`` has.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmman.analysis.flops import flops_of


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operators allocate while this mode is active, until each storage is freed.

    Tensors saved by autograd count. Workspace that an operator allocates and frees internally doesn't.

    Args:
        held: Objects that are alive, and count, from the start: modules (parameters, gradients, buffers), optimizers (state),
            tensors, data samples, or containers of them.

    Attributes:
        current: Bytes alive now.
        peak: Largest value of ``current`` so far.
        flops: FLOPs so far, of matrix products, convolutions and attention. A multiplication and an addition are two.
        operators: Number of operators run so far, without views. This is about the number of kernel launches on a GPU.

    Raises:
        RuntimeError: This torch version is too old to report when a storage is freed (2.1 is, 2.11 isn't).
    """

    def __init__(self, *held: object) -> None:
        super().__init__()
        probe = torch.empty(1)
        if probe.untyped_storage() is not probe.untyped_storage():
            raise RuntimeError(f'torch {torch.__version__} does not keep storage objects, so their lifetime cannot be tracked')
        self.current = 0
        self.peak = 0
        self.flops = 0
        self.operators = 0
        self._sizes: dict[int, int] = {}
        for tensor in _tensors(held):
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, result)
        self.operators += not func.is_view and func.namespace != 'prim'  # a fake tensor is asked for its device
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._grow(key, storage.nbytes())
            weakref.finalize(storage, self._remove, key)

    def _grow(self, key: int, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)

    def _remove(self, key: int) -> None:
        self.current -= self._sizes.pop(key)


class LiveParts(LiveBytes):
    """Count live bytes by part of the step. A storage belongs to the part that was running when it was allocated.

    Args:
        held: Objects that are alive from the start, by part. An object in several parts belongs to the first.
        part: The part that runs first.

    Attributes:
        part: The part that is running. Set it when another part starts; new storages belong to it.
        parts: Bytes alive now, by part. Their sum is ``current``.
        peak_parts: ``parts`` at the first moment at which ``peak`` was reached.
    """

    def __init__(self, held: Mapping[str, object], part: str = 'rest') -> None:
        self.part = part
        self.parts: dict[str, int] = {}
        self.peak_parts: dict[str, int] = {}
        self._part_of: dict[int, str] = {}
        self._changes: list[tuple[str, int]] = []
        super().__init__()
        for self.part, what in held.items():
            for tensor in _tensors(what):
                self._add(tensor)
        self.part = part
        self._start = dict(self.parts)
        self._changes.clear()

    def claim(self, tensor: Tensor, part: str) -> None:
        """Move the storage of ``tensor`` to ``part``."""
        self._add(tensor)
        key = tensor.untyped_storage()._cdata
        self._change(self._part_of[key], -self._sizes[key])
        self._part_of[key] = part
        self._change(part, self._sizes[key])

    def curves(self, points: int = 1000) -> dict[str, np.ndarray]:
        """Bytes of every part over time. Time is counted in allocations and releases.

        Args:
            points: Largest number of moments to return. Of each span of moments the one with the most bytes is returned.

        Returns:
            An int64 array for every part, all of the same length, in the order in which the parts first appeared.
        """
        names = [*dict.fromkeys([*self._start, *(part for part, _ in self._changes)])]
        rows = {name: row for row, name in enumerate(names)}
        values = np.zeros((len(names), 1 + len(self._changes)), dtype=np.int64)
        values[:, 0] = [self._start.get(name, 0) for name in names]
        for moment, (part, change) in enumerate(self._changes, start=1):
            values[rows[part], moment] = change
        values = values.cumsum(axis=1)
        total = values.sum(axis=0)
        spans = np.array_split(np.arange(len(total)), min(points, len(total)))
        kept = [span[total[span].argmax()] for span in spans]
        return dict(zip(names, values[:, kept], strict=True))

    def _grow(self, key: int, size: int) -> None:
        self._part_of[key] = self.part
        self._change(self.part, size)
        before = self.peak
        super()._grow(key, size)
        if self.peak > before:
            self.peak_parts = dict(self.parts)

    def _remove(self, key: int) -> None:
        self._change(self._part_of.pop(key), -self._sizes[key])
        super()._remove(key)

    def _change(self, part: str, size: int) -> None:
        self.parts[part] = self.parts.get(part, 0) + size
        self._changes.append((part, size))


def _tensors(held: object) -> Iterator[Tensor]:
    for leaf in tree_flatten(held)[0]:
        if isinstance(leaf, nn.Module):
            yield from leaf.buffers()
            for parameter in leaf.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
        elif isinstance(leaf, Optimizer):
            yield from _tensors([*map(dict, leaf.state.values())])
        elif isinstance(leaf, BaseDataElement):
            yield from _tensors([value for _, value in leaf.all_items()])
        elif isinstance(leaf, Tensor):
            yield leaf
