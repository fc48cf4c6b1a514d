"""Which parameters a step really trains: a gradient that is rounding isn't one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEAST = 1e-13  # relative to the largest gradient; rounding in double precision makes up to 1e-15 of nothing


def without_gradient(gradients: Mapping[str, Tensor | None]) -> list[str]:
    """Names of parameters whose gradient is missing, isn't finite, or is nothing but rounding.

    Args:
        gradients: By name, in double precision: in single precision rounding can't be told from a small gradient.
    """
    largest = {name: 0.0 if gradient is None else float(gradient.abs().max()) for name, gradient in gradients.items()}
    assert {gradient.dtype for gradient in gradients.values() if gradient is not None} == {torch.float64}
    least = LEAST * max(largest.values())
    return [name for name, value in largest.items() if not least < value < torch.inf]
