"""What an optimizer's state has to be like, so that a checkpoint's can be compared with it before it is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

IMPLEMENTATION = {'foreach': False, 'fused': None, 'capturable': False, 'differentiable': False}
"""Options that choose how a step is computed, not which step; and what they are for a step on the CPU."""

_SIZES = (2, 3, 5, 7, 11, 13)  # of a parameter to try a step on: distinct, so that a state's sizes tell which they follow


def state_of_a_step(optimizer: Optimizer, options: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Tensor] | None:
    """What the optimizer keeps for a parameter that it has stepped.

    A copy of the optimizer steps a small parameter with the same number of dimensions. Sizes of its state that are sizes of
    that parameter are, in the result, those of ``parameter``.

    Args:
        optimizer: The optimizer; it stays as it is.
        options: The options of the parameter's group.
        parameter: One of its parameters.

    Returns:
        Tensors on the meta device by the name of the state; None where the optimizer can't be copied, or needs more than a
        gradient to step.
    """
    if made_at_once := optimizer.state.get(parameter):
        return {name: value.to('meta') for name, value in made_at_once.items() if isinstance(value, Tensor)}
    if parameter.dim() > len(_SIZES):
        return None
    sizes = dict(zip(_SIZES, parameter.shape, strict=False))
    small = nn.Parameter(torch.zeros([*sizes], dtype=parameter.dtype))
    small.grad = torch.zeros_like(small)
    options = {**options, **{name: value for name, value in IMPLEMENTATION.items() if name in options}, 'params': [small]}
    copy = type(optimizer).__new__(type(optimizer))
    try:  # as pickle makes a copy; the optimizer may be anybody's
        copy.__setstate__({'defaults': dict(optimizer.defaults), 'state': defaultdict(dict), 'param_groups': [options]})
        copy.step()
    except Exception:
        return None
    state = {name: value for name, value in copy.state[small].items() if isinstance(value, Tensor)}
    shapes = {name: [sizes.get(size, size) for size in value.shape] for name, value in state.items()}
    return {name: torch.empty(shapes[name], dtype=value.dtype, device='meta') for name, value in state.items()}
