"""The paper's cost model (Eq. 8, 13, 14, 17, 18): parameters, FLOPs and activations of K local blocks, and which K to choose.

The model has L layers in K blocks of B = L / K layers; B need not be a whole number. All layers are equal, except in Eq. 8.
Each of the first K-1 blocks has an auxiliary head: a copy of the next block's first layer, and a bias. Nothing else is
counted. ``docs/design/cost_model.md`` lists what the model leaves out, and the paper's errors. A layer is what the transfer
copies, which is a unit here.

In all functions, ``layers`` is L, an integer of at least 1. ``num_blocks`` is K, an integer from 1 (end to end) to L. A ratio
is MAN++ over end-to-end training with the same batch. Outside these ranges all functions raise
:class:`~mmman.errors.CostError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mmman.errors import CostError

ROUNDING = 1e-9
"""Tolerance: a bound on K this close to an integer is rounded to it."""


def _check_num_blocks(layers: int, num_blocks: int) -> None:
    if not isinstance(layers, int) or layers < 1:
        raise CostError(f'layers={layers!r}: must be an integer of at least 1')
    if not isinstance(num_blocks, int) or not 1 <= num_blocks <= layers:
        raise CostError(f'num_blocks={num_blocks!r} of {layers} layers: choose an integer from 1 to {layers}')


def _check_sizes(sizes: Sequence[float], num_blocks: int) -> None:
    _check_num_blocks(len(sizes), num_blocks)
    for size in sizes:
        if not 0 < size < math.inf:
            raise CostError(f'a layer of {size!r} parameters: every layer must have a finite number above 0')


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise CostError(f'{name}={value!r}: must be a finite number of at least 0')


@dataclass(frozen=True)
class Bias:
    """Cost of the transfer's bias relative to the copied layer. All values are finite and at least 0.

    Attributes:
        parameters: β, parameters of the bias over those of the layer.
        flops: β_F, forward *and* backward FLOPs of the bias over forward FLOPs of the layer.
        activations: β_A, activations of the bias over those of the layer.
    """

    parameters: float
    flops: float
    activations: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check_not_negative(f'Bias.{name}', value)


CHANNEL = Bias(parameters=0.02, flops=0.02, activations=0.02)
"""The bias of the paper's section V and of its examples, one value per channel: ``transfer=dict(bias='channel')``."""

UNIT = Bias(parameters=1, flops=2, activations=1)
"""The bias of the paper's experiments, a second copy of the layer: ``bias='unit'``, the transfer's default."""


def expected_extra_parameters(sizes: Sequence[float], num_blocks: int, bias: Bias = UNIT) -> float:
    """Eq. 8: the number of parameters that MAN++ adds if the copied layers have average size, (K-1)(1+β)p̄.

    Args:
        sizes: p_1 to p_L, the number of parameters of each layer, above 0.
        num_blocks: K.
        bias: Cost of the transfer's bias.
    """
    _check_sizes(sizes, num_blocks)
    return (num_blocks - 1) * (1 + bias.parameters) * sum(sizes) / len(sizes)


def flops_ratio(layers: int, num_blocks: int, bias: Bias = UNIT) -> float:
    """Eq. 13: FLOPs ratio, 1 + (K-1)/L · (1 + β_F/2). It is 1 at K = 1, and almost 2 + β_F/2 at K = L."""
    _check_num_blocks(layers, num_blocks)
    return 1 + (num_blocks - 1) / layers * (1 + bias.flops / 2)


def max_blocks(layers: int, overhead: float, bias: Bias = UNIT) -> int:
    """Eq. 14: the largest K with a FLOPs ratio of at most 1 + ε, ⌊1 + εL / (1 + β_F/2)⌋, limited to L.

    Args:
        overhead: ε, finite, at least 0; 0.1 allows 10 % more FLOPs.
    """
    _check_num_blocks(layers, 1)
    _check_not_negative('overhead', overhead)
    return min(layers, math.floor(1 + overhead * layers / (1 + bias.flops / 2) + ROUNDING))


def activation_ratio(layers: int, num_blocks: int, bias: Bias = UNIT) -> float:
    """Eq. 17: activation ratio, 1/K + (1+β_A)/L for K of at least 2, and 1 for K = 1.

    The ratio is above 1 if a head adds more than the cuts save, e.g. for L = K = 2. For K = 1 the paper's formula would add a
    head to the only block, which has none.
    """
    _check_num_blocks(layers, num_blocks)
    return 1.0 if num_blocks == 1 else 1 / num_blocks + (1 + bias.activations) / layers


def min_blocks(layers: int, ratio: float, bias: Bias = UNIT) -> int:
    """Eq. 18: the smallest K with an activation ratio of at most r, ⌈1 / (r - (1+β_A)/L)⌉.

    Args:
        ratio: r (called rho in the paper), above 0 and below 1; 0.25 asks for a quarter of the activations.

    Raises:
        CostError: The ratio needs more than L blocks. The paper only requires r > (1+β_A)/L, which allows K above L.
    """
    _check_num_blocks(layers, 1)
    if not 0 < ratio < 1:
        raise CostError(f'ratio={ratio!r}: the share of activations to keep must be above 0 and below 1')
    room = ratio - (1 + bias.activations) / layers
    least = math.ceil(1 / room - ROUNDING) if room > 0 else math.inf
    if least > layers:
        lowest = min(1, activation_ratio(layers, layers, bias))
        raise CostError(
            f'ratio={ratio:g} is out of reach: {layers} layers in {layers} blocks give {lowest:.4g}; choose a larger ratio'
        )
    return least


def choose_blocks(layers: int, ratio: float, overhead: float, bias: Bias = UNIT) -> range:
    """The paper's guideline: every K that satisfies both Eq. 14 and Eq. 18, in ascending order.

    Args:
        ratio: r, the largest activation ratio allowed, above 0 and below 1.
        overhead: ε, the largest share of additional FLOPs allowed, at least 0.

    Raises:
        CostError: No K satisfies both.
    """
    least, most = min_blocks(layers, ratio, bias), max_blocks(layers, overhead, bias)
    if least > most:
        needed = flops_ratio(layers, least, bias) - 1
        raise CostError(
            f'no K fits: ratio={ratio:g} needs at least {least} blocks, overhead={overhead:g} allows at most {most}; '
            f'allow an overhead of {needed:.4g}, or choose a larger ratio'
        )
    return range(least, most + 1)
