"""What an optimizer's state has to be like, so that a checkpoint's can be compared with it before it is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmman.runtime.compare import Kind, kind, kind_of

IMPLEMENTATION = {'foreach': False, 'fused': None, 'capturable': False, 'differentiable': False}
"""Options that choose how a step is computed, not which step; and what they are for a step on the CPU."""

_SIZES = (2, 3, 5, 7, 11, 13)  # of a parameter to try a step on: distinct, so that a state's sizes tell which they follow


class StateOfAStep:
    """What an optimizer keeps for a parameter that it has stepped.

    A copy of the optimizer steps a small parameter with the same number of dimensions. Sizes of its state that are sizes of
    that parameter follow the parameter's.

    Args:
        optimizer: The optimizer, before its first step; it stays as it is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._tried: dict[tuple, dict[str, Tensor] | None] = {}

    def of(self, parameter: nn.Parameter, options: Mapping[str, Any]) -> dict[str, Kind] | None:
        """The kinds of a parameter's state, by name.

        Args:
            parameter: One of the optimizer's parameters.
            options: The options of the parameter's group.

        Returns:
            The kinds; None where the optimizer can't be copied, or needs more than a gradient to step.
        """
        if made_at_once := self._optimizer.state.get(parameter):
            return {name: kind(value) for name, value in made_at_once.items()}
        key = (id(options), parameter.dim(), parameter.dtype)
        if key not in self._tried:
            self._tried[key] = self._try_step(options, parameter.dim(), parameter.dtype)
        state = self._tried[key]
        sizes = dict(zip(_SIZES, parameter.shape, strict=False))
        return state and {
            name: kind_of(value.dtype, [sizes.get(size, size) for size in value.shape]) for name, value in state.items()
        }

    def _try_step(self, options: Mapping[str, Any], dimensions: int, dtype: torch.dtype) -> dict[str, Tensor] | None:
        small = nn.Parameter(torch.zeros(_SIZES[:dimensions], dtype=dtype))
        if small.dim() != dimensions:
            return None
        small.grad = torch.zeros_like(small)
        chosen = {name: value for name, value in IMPLEMENTATION.items() if name in options}
        copy = type(self._optimizer).__new__(type(self._optimizer))
        try:  # as pickle makes a copy; the optimizer may be anybody's
            groups = [{**options, **chosen, 'params': [small]}]
            copy.__setstate__({'defaults': dict(self._optimizer.defaults), 'state': defaultdict(dict), 'param_groups': groups})
            copy.step()
        except Exception:
            return None
        return {name: value for name, value in copy.state[small].items() if isinstance(value, Tensor)}
