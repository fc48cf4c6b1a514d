"""Record the allocations of a small run, and extrapolate them to a larger batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import accumulate

import numpy as np
from torch import Tensor

from mmman.analysis.gpu_work import Kernel, kernel_of
from mmman.analysis.memory import LiveBytes
from mmman.analysis.roofline import Device

WINDOW = 200
"""Number of storages, or kernels, to search for the point from which two runs match again."""


class Trace(LiveBytes):
    """Record every allocation and release, FLOPs and operators, since :meth:`begin`. Marks name moments in between.

    Args:
        held: Objects that are alive from the start. They count only if they are released.

    Attributes:
        named: Index i of every storage that has a name.
        allocated_by: For every storage the operator that allocated it; '' for a storage that existed before and is released.
        sizes: For every storage its bytes.
        events: i + 1 for the allocation of storage i, -(i + 1) for its release, in order.
        kernels: The operators that a GPU would run as kernels, with their names.
        marks: For every mark the numbers of events, of operators and of kernels before it.
    """

    def __init__(self, *held: object) -> None:
        self._operator = ''
        self.begin()
        super().__init__(*held)
        self.begin()

    def begin(self) -> None:
        """Discard the record and start again. What is alive now counts as alive from the start."""
        self.allocated_by: list[str] = []
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.operators = 0
        self.kernels: list[tuple[str, Kernel]] = []
        self.marks: dict[Hashable, tuple[int, int, int]] = {'start': (0, 0, 0)}
        self.named: dict[Hashable, int] = {}
        self._index: dict[int, int] = {}

    def mark(self, name: Hashable) -> None:
        """Name this moment. If a name is used again, its first moment counts."""
        self.marks.setdefault(name, (len(self.events), self.operators, len(self.kernels)))

    def name(self, name: Hashable, tensor: Tensor) -> None:
        """Name the storage of a tensor that was allocated since :meth:`begin`."""
        self.named[name] = self._index[tensor.untyped_storage()._cdata] - 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._operator = str(func)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        kernel = kernel_of(func, args, kwargs or {}, result)
        if kernel is not None:
            self.kernels.append((self._operator, kernel))
        return result

    def _grow(self, key: int, size: int) -> None:
        super()._grow(key, size)
        self.events.append(self._number(key, self._operator, size))

    def _remove(self, key: int) -> None:
        if key not in self._index:
            self._number(key, '', self._sizes[key])
        super()._remove(key)
        self.events.append(-self._index.pop(key))

    def _number(self, key: int, operator: str, size: int) -> int:
        self.allocated_by.append(operator)
        self.sizes.append(size)
        self._index[key] = len(self.sizes)
        return self._index[key]


class Extrapolation:
    """Predict a run on a larger batch from two runs on small batches: every storage and kernel is linear in the batch's pixels.

    The predicted peak may be at another moment than in the small runs. Storages and kernels of the two runs are paired in the
    order of their operators. Unpaired ones of the larger run keep their size; there are few (assigners loop over matches).

    Args:
        small, large: The two runs.
        pixels: Pixels of their two batches and of the requested batch.
        device: The GPU whose time is predicted. None: no time is.
    """

    def __init__(self, small: Trace, large: Trace, pixels: tuple[int, int, int], device: Device | None = None) -> None:
        self._traces = (small, large)
        sizes = np.array(large.sizes, dtype=float)
        for i, j in _matching_pairs(small.allocated_by, large.allocated_by):
            sizes[j] = linear((small.sizes[i], large.sizes[j]), pixels)
        self._sizes, self._moves = sizes, np.array(large.events, dtype=int)
        self._alive = np.concatenate([[0.0], np.cumsum(np.sign(self._moves) * sizes[np.abs(self._moves) - 1])])
        kernels = [kernel for _, kernel in large.kernels]
        for i, j in _matching_pairs(*([name for name, _ in trace.kernels] for trace in self._traces)):
            own = small.kernels[i][1], kernels[j]
            numbers = {
                key: linear((getattr(own[0], key), getattr(own[1], key)), pixels) for key in ('flops', 'moved', 'launches')
            }
            kernels[j] = replace(own[1], **numbers)
        self._flops = [0, *accumulate(kernel.flops for kernel in kernels)]
        seconds = (
            0.0 if device is None else max(kernel.launches * device.launch, device.seconds(kernel)) for kernel in kernels
        )
        self._seconds = [0.0, *accumulate(seconds)]

    def __contains__(self, moment: Hashable) -> bool:
        return moment in self._traces[1].marks

    def alive(self, moment: Hashable) -> int:
        """Bytes alive at a mark, above those alive at the start."""
        return round(self._alive[self._traces[1].marks[moment][0]])

    def peak(self, start: Hashable, end: Hashable, held: Hashable | None = None) -> int:
        """Peak bytes between two marks, above those alive at the start.

        Args:
            start, end: The marks.
            held: Name of a storage that is assumed to stay alive until the end of the run. Default: none.
        """
        first, last = (self._traces[1].marks[moment][0] for moment in (start, end))
        alive = self._alive[first : last + 1]
        if held is not None:
            i = self._traces[1].named[held]
            is_released = np.concatenate([[0], np.cumsum(self._moves == -(i + 1))])
            alive = alive + self._sizes[i] * is_released[first : last + 1]
        return round(alive.max())

    def flops(self, moment: Hashable) -> int:
        """FLOPs before a mark."""
        return self._flops[self._traces[1].marks[moment][2]]

    def nanoseconds(self, moment: Hashable) -> int:
        """Nanoseconds before a mark, if every kernel takes at least as long as its launch. 0 without a device."""
        return round(1e9 * self._seconds[self._traces[1].marks[moment][2]])

    def operators(self, moment: Hashable) -> int:
        """Number of operators before a mark."""
        return self._traces[1].marks[moment][1]

    def size(self, name: Hashable) -> int:
        """Bytes of the storage with this name."""
        return round(self._sizes[self._traces[1].named[name]])


def _matching_pairs(first: list[str], second: list[str]) -> Iterator[tuple[int, int]]:
    """Yield index pairs of equal elements of two sequences, in order. Assumes that the sequences differ only in short runs."""
    i = j = 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            yield i, j
            i, j = i + 1, j + 1
            continue
        matcher = SequenceMatcher(None, first[i : i + WINDOW], second[j : j + WINDOW], False)
        end = (WINDOW, WINDOW)
        for a, b, count in matcher.get_matching_blocks()[:-1]:
            yield from zip(range(i + a, i + a + count), range(j + b, j + b + count), strict=True)
            end = a + count, b + count
        i, j = i + end[0], j + end[1]


def linear(values: tuple[int, int], pixels: tuple[int, int, int]) -> int:
    """Extrapolate two values linearly to ``pixels[2]`` pixels. A value that doesn't grow with the pixels stays constant."""
    small, large = values
    first, second, asked = pixels
    return round(small + (large - small) * (asked - first) / (second - first)) if large > small else large
