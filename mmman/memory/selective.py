"""Which outputs a selectively recomputed unit saves, and the dispatch modes that save them and return them again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmman.errors import ConfigError

aten = torch.ops.aten
SECOND_FACTOR = {aten.mm.default: 1, aten.bmm.default: 1, aten.addmm.default: 2, aten.baddbmm.default: 2}
"""Index of the argument of a matrix product that is its second factor, (..., summed, channels)."""

SavedOutputs = deque[tuple[Callable, Any, list[int]]]
"""Operators in the order they ran, with their outputs and the version counters of these."""


def should_save(op: Callable, args: Sequence[Any]) -> bool:
    """Whether the output of an operator is expensive to recompute for its size.

    True for attention, and for a convolution or matrix product that sums at least as many values per output element as the
    output has channels. It is therefore false for a 1x1 convolution or a linear layer that widens, and for a depthwise
    convolution over many channels.
    """
    rule = _rule(op)
    return rule is not None and rule(args)


@cache
def _rule(op: Callable) -> Callable[[Sequence[Any]], bool] | None:
    """:func:`should_save` as a function of the arguments of ``op``; None if it is never true."""
    if op is aten.convolution.default:
        return lambda args: not args[6] and args[1].shape[1:].numel() >= args[1].shape[0]
    if (index := SECOND_FACTOR.get(op)) is not None:
        return lambda args: args[index].shape[-2] >= args[index].shape[-1]
    return (lambda _: True) if '_scaled_dot_product' in op.name() else None


class CachingMode(TorchDispatchMode):
    """Saves the outputs of operators for which :func:`should_save` is true."""

    def __init__(self, saved: SavedOutputs) -> None:
        super().__init__()
        self.saved = saved

    @classmethod
    def ignore_compile_internals(cls) -> bool:  # so that compiled layers may run in this mode
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if should_save(op, args):
            own = alias(out) if isinstance(out, Tensor) else tree_map_only(Tensor, alias, out)
            self.saved.append((op, own, versions(own)))
        return out


class CachedMode(CachingMode):
    """Returns the saved outputs, in the same order, instead of computing them."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not should_save(op, args):
            return op(*args, **kwargs or {})
        if not self.saved:
            raise ConfigError(
                'a selectively recomputed unit was back-propagated twice, which is not supported: list it in recompute instead'
            )
        saved_op, own, saved_versions = self.saved.popleft()
        if saved_op is not op or saved_versions != versions(own):
            raise ConfigError(
                f'a unit of selective_recompute changes the output of {saved_op} in place, or runs {op} when it is recomputed: '
                'put it into recompute'
            )
        return own


def alias(tensor: Tensor) -> Tensor:
    """Return the tensor detached from its graph, sharing its version counter, also inside a dispatch mode."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def versions(tensors: Any) -> list[int]:
    """Version counters of the tensors in a tensor, list, tuple or dict."""
    leaves = [tensors] if isinstance(tensors, Tensor) else tree_leaves(tensors)
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
