"""Live tensor bytes, counted exactly and repeatably on any device.

torch's ``MemTracker`` counts the same way, but hooks every parameter for its gradient and so refuses models with frozen ones
(every momentum copy, every stock ``frozen_stages``).
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
    """Counts the bytes of all storages that operators allocate while it is active, each until its last tensor is gone.

    What an operator allocates and frees inside (workspace) isn't seen; autograd's saved tensors are, as they hold storages.

    Args:
        held: What is alive from the start and counts from the start: modules (parameters, gradients, buffers), optimizers
            (state), tensors, data samples, or containers of them.

    Attributes:
        current: Bytes alive now.
        peak: The most that were alive at once.
        flops: FLOPs so far, of matrix products, convolutions and attention. A multiplication and an addition are two.
        operators: How many ran so far, views left out. A GPU has to start about so many kernels, one after the other.

    Raises:
        RuntimeError: The torch is too old to tell when a storage is gone (2.1 is, 2.11 is not).
    """

    def __init__(self, *held: object) -> None:
        super().__init__()
        probe = torch.empty(1)
        if probe.untyped_storage() is not probe.untyped_storage():
            raise RuntimeError(f'torch {torch.__version__} does not keep storage objects, so their lifetime cannot be seen')
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
        self.operators += not func.is_view
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
    """Live bytes, told apart: every storage belongs to one part, by default the one that was running when it was allocated.

    Args:
        held: What is alive from the start, by part. What is in several parts belongs to the first.
        part: The part that runs first.

    Attributes:
        part: The part that is running, to be set: what is allocated from now on belongs to it.
        parts: Bytes alive now, by part; their sum is ``current``.
        peak_parts: The same when ``peak`` was reached first.
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
        """From now on the storage of ``tensor`` belongs to ``part``."""
        self._add(tensor)
        key = tensor.untyped_storage()._cdata
        self._change(self._part_of[key], -self._sizes[key])
        self._part_of[key] = part
        self._change(part, self._sizes[key])

    def curves(self, points: int = 1000) -> dict[str, np.ndarray]:
        """Bytes of every part over time, which is counted in allocations and releases.

        Args:
            points: How many moments at most. Of all moments between two of them the one with the most bytes is kept.

        Returns:
            By part, in the order of their first appearance, int64 arrays of one length.
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
