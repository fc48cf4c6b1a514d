"""Which outputs a selectively recomputed unit saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

aten = torch.ops.aten
SECOND_FACTOR = {aten.mm.default: 1, aten.bmm.default: 1, aten.addmm.default: 2, aten.baddbmm.default: 2}
"""Index of the argument of a matrix product that is its second factor, (..., summed, channels)."""


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


def save_policy(ctx: SelectiveCheckpointContext, op: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """:func:`should_save` as a policy of torch's selective checkpoint."""
    return CheckpointPolicy.MUST_SAVE if should_save(op, args) else CheckpointPolicy.PREFER_RECOMPUTE
