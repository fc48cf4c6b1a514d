"""Derives the expected types and shapes of an optimizer's state, to check a checkpoint against them before loading it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmman.runtime.compare import Kind, kind, kind_of

IMPLEMENTATION = {'foreach': False, 'fused': None, 'capturable': False, 'differentiable': False}
"""Options that select the implementation of a step, not its result, and their values for a step on the CPU."""

_SIZES = (2, 3, 5, 7, 11, 13)  # sizes of the dummy parameter: distinct, so that state sizes can be attributed


class ExpectedState:
    """The state that an optimizer has for a parameter after a step.

    A copy of the optimizer steps a small parameter with the same number of dimensions. State sizes that equal a size of the
    small parameter are taken to equal the same size of the real parameter.

    Args:
        optimizer: The optimizer, before its first step. It is not changed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._cache: dict[tuple, dict[str, Tensor] | None] = {}

    def of(self, parameter: nn.Parameter, options: Mapping[str, Any]) -> dict[str, Kind] | None:
        """Return the kinds of a parameter's state, by name.

        Args:
            parameter: One of the optimizer's parameters.
            options: The options of the parameter's group.

        Returns:
            The kinds; None if the optimizer can't be copied, or needs more than a gradient to step.
        """
        if initial_state := self._optimizer.state.get(parameter):
            return {name: kind(value) for name, value in initial_state.items()}
        key = (id(options), parameter.dim(), parameter.dtype)
        if key not in self._cache:
            self._cache[key] = self._try_step(options, parameter.dim(), parameter.dtype)
        state = self._cache[key]
        sizes = dict(zip(_SIZES, parameter.shape, strict=False))
        return state and {
            name: kind_of(value.dtype, [sizes.get(size, size) for size in value.shape]) for name, value in state.items()
        }

    def _try_step(self, options: Mapping[str, Any], dimensions: int, dtype: torch.dtype) -> dict[str, Tensor] | None:
        dummy = nn.Parameter(torch.zeros(_SIZES[:dimensions], dtype=dtype))
        if dummy.dim() != dimensions:
            return None
        dummy.grad = torch.zeros_like(dummy)
        forced = {name: value for name, value in IMPLEMENTATION.items() if name in options}
        copy = type(self._optimizer).__new__(type(self._optimizer))
        try:  # copied the way pickle does; a third-party optimizer can raise any error
            groups = [{**options, **forced, 'params': [dummy]}]
            copy.__setstate__({'defaults': dict(self._optimizer.defaults), 'state': defaultdict(dict), 'param_groups': groups})
            copy.step()
        except Exception:
            return None
        return {name: value for name, value in copy.state[dummy].items() if isinstance(value, Tensor)}
