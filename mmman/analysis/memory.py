"""Live tensor bytes, counted exactly and repeatably on any device.

torch's ``MemTracker`` counts the same way, but hooks every parameter for its gradient and so refuses models with frozen ones
(every momentum copy, every stock ``frozen_stages``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate while it is active, each until its last tensor is gone.

    What an operator allocates and frees inside (workspace) isn't seen; autograd's saved tensors are, as they hold storages.

    Args:
        held: What is alive from the start and counts from the start: modules (parameters, gradients, buffers), optimizers
            (state), tensors, or containers of them.

    Attributes:
        current: Bytes alive now.
        peak: The most that were alive at once.

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
        self._sizes: dict[int, int] = {}
        for tensor in _tensors(held):
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.current -= self._sizes.pop(key)


def peak_live_bytes(step: Callable[[], object], *held: object) -> int:
    """The most tensor bytes alive at once while ``step()`` runs.

    Args:
        step: What to measure, e.g. ``lambda: model.train_step(data, optim_wrapper)``.
        held: What is alive before and counts: modules, optimizers, tensors, or containers of them (model, optimizer, batch).

    Returns:
        Bytes.
    """
    with LiveBytes(*held) as live:
        step()
    return live.peak


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
        elif isinstance(leaf, torch.Tensor):
            yield leaf
