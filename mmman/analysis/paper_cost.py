"""The paper's cost model, Eq. 8-18: what K local blocks cost in parameters, FLOPs and activations, and which K to choose.

A backbone has L layers, equal where Eq. 8-10 don't say otherwise, split evenly into K blocks of B = L / K, which need not be
whole. Each of the first K-1 blocks has an auxiliary head: a copy of the next block's first layer, and a bias. Nothing else is
counted; what that leaves out, and where the paper errs, is in ``docs/design/cost_model.md``. A layer is what the transfer
copies, here a unit.

Throughout, ``layers`` is L, a whole number from 1; ``num_blocks`` is K, a whole number from 1 (end to end) to L; a ratio is
MAN++ over end to end, both with the same batch. All raise :class:`~mmman.errors.CostError` outside these ranges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mmman.errors import CostError

ROUNDING = 1e-9
"""A bound on K this close to a whole number is that number."""


def _check_num_blocks(layers: int, num_blocks: int) -> None:
    if not isinstance(layers, int) or layers < 1:
        raise CostError(f'layers={layers!r}: a whole number from 1 is needed')
    if not isinstance(num_blocks, int) or not 1 <= num_blocks <= layers:
        raise CostError(f'num_blocks={num_blocks!r} of {layers} layers: choose a whole number from 1 to {layers}')


def _check_sizes(sizes: Sequence[float], num_blocks: int) -> None:
    _check_num_blocks(len(sizes), num_blocks)
    for size in sizes:
        if not 0 < size < math.inf:
            raise CostError(f'a layer of {size!r} parameters: every layer needs a finite number above 0')


def _check_from_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise CostError(f'{name}={value!r}: a finite number from 0 is needed')


@dataclass(frozen=True)
class Bias:
    """What the bias of the transfer costs, each relative to the layer that is copied: finite, from 0.

    Attributes:
        parameters: β, its parameters over the layer's.
        flops: β_F, its forward *and* backward FLOPs over the layer's forward FLOPs.
        activations: β_A, its activations over the layer's.
    """

    parameters: float
    flops: float
    activations: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check_from_0(f'Bias.{name}', value)


CHANNEL = Bias(parameters=0.02, flops=0.02, activations=0.02)
"""The bias of the paper's section V and its worked examples, a value a channel: ``transfer=dict(bias='channel')``."""

UNIT = Bias(parameters=1, flops=2, activations=1)
"""The bias of the paper's experiments, a second copy of the layer: ``bias='unit'``, the default of the transfer."""


def expected_extra_parameters(sizes: Sequence[float], num_blocks: int, bias: Bias = UNIT) -> float:
    """Eq. 8: the parameters that MAN++ adds, (K-1)(1+β)p̄, where the copied layers are of average size.

    Args:
        sizes: p_1 to p_L, the parameters of each layer, above 0.
    """
    _check_sizes(sizes, num_blocks)
    return (num_blocks - 1) * (1 + bias.parameters) * sum(sizes) / len(sizes)


def extra_parameters_bounds(sizes: Sequence[float], num_blocks: int, bias: Bias = UNIT) -> tuple[float, float]:
    """Eq. 9: the fewest and the most parameters that MAN++ adds, (1+β)(K-1)p_min and (1+β)(K-1)p_max, wherever the cuts are.

    Args:
        sizes: p_1 to p_L, the parameters of each layer, above 0.
    """
    _check_sizes(sizes, num_blocks)
    copies = (1 + bias.parameters) * (num_blocks - 1)
    return copies * min(sizes), copies * max(sizes)


def parameter_ratio_bounds(layers: int, num_blocks: int, imbalance: float, bias: Bias = UNIT) -> tuple[float, float]:
    """Eq. 10, with its lower bound put right: 1 + x/R and 1 + Rx with x = (1+β)/B · (1 - 1/K).

    The paper's lower bound is 1 + x, which does not follow from Eq. 9 and is too high where small layers are copied.

    Args:
        imbalance: R (the paper: rho), the parameters of the largest layer over those of the smallest, from 1.
    """
    _check_num_blocks(layers, num_blocks)
    if not 1 <= imbalance < math.inf:
        raise CostError(f'imbalance={imbalance!r}: the largest layer over the smallest is a finite number from 1')
    per_layer = (1 + bias.parameters) * (num_blocks - 1) / layers
    return 1 + per_layer / imbalance, 1 + per_layer * imbalance


def end_to_end_flops(layers: int, layer_flops: float) -> float:
    """Eq. 11: FLOPs of an end-to-end update, 2LF.

    Args:
        layer_flops: F, FLOPs of a layer's forward pass, and of its backward pass as well.
    """
    return local_flops(layers, 1, layer_flops)


def local_flops(layers: int, num_blocks: int, layer_flops: float, bias: Bias = UNIT) -> float:
    """Eq. 12: FLOPs of a MAN++ update, 2LF + (K-1)(2+β_F)F.

    Args:
        layer_flops: F, FLOPs of a layer's forward pass, and of its backward pass as well.
    """
    _check_num_blocks(layers, num_blocks)
    _check_from_0('layer_flops', layer_flops)
    return (2 * layers + (num_blocks - 1) * (2 + bias.flops)) * layer_flops


def flops_ratio(layers: int, num_blocks: int, bias: Bias = UNIT) -> float:
    """Eq. 13: FLOPs ratio, 1 + (K-1)/L · (1 + β_F/2). From 1 at K = 1 to nearly 2 + β_F/2 at K = L."""
    _check_num_blocks(layers, num_blocks)
    return 1 + (num_blocks - 1) / layers * (1 + bias.flops / 2)


def max_blocks(layers: int, overhead: float, bias: Bias = UNIT) -> int:
    """Eq. 14: the largest K with a FLOPs ratio of at most 1 + ε: ⌊1 + εL / (1 + β_F/2)⌋, and no more than L.

    Args:
        overhead: ε, finite, from 0; 0.1 allows 10 % more FLOPs.
    """
    _check_num_blocks(layers, 1)
    _check_from_0('overhead', overhead)
    return min(layers, math.floor(1 + overhead * layers / (1 + bias.flops / 2) + ROUNDING))


def end_to_end_activations(layers: int, layer_activations: float) -> float:
    """Eq. 15: activations of an end-to-end update, LA.

    Args:
        layer_activations: A, what a layer keeps for its backward pass on one batch, in bytes (or another unit, which is then
            the result's).
    """
    return block_activations(layers, 1, layer_activations)


def block_activations(layers: int, num_blocks: int, layer_activations: float, bias: Bias = UNIT) -> float:
    """Eq. 16: activations at the peak of a MAN++ update, those of a block with its head: BA + (1+β_A)A.

    At K = 1 there is no head, so the result is LA, where the paper's formula would add one.

    Args:
        layer_activations: A, what a layer keeps for its backward pass on one batch, in bytes (or another unit, which is then
            the result's).
    """
    _check_from_0('layer_activations', layer_activations)
    return layers * activation_ratio(layers, num_blocks, bias) * layer_activations


def activation_ratio(layers: int, num_blocks: int, bias: Bias = UNIT) -> float:
    """Eq. 17: activation ratio, 1/K + (1+β_A)/L for K from 2; 1 for K = 1.

    It is above 1 where a head weighs more than cutting saves, e.g. L = K = 2.
    """
    _check_num_blocks(layers, num_blocks)
    return 1.0 if num_blocks == 1 else 1 / num_blocks + (1 + bias.activations) / layers


def min_blocks(layers: int, ratio: float, bias: Bias = UNIT) -> int:
    """Eq. 18: the smallest K with an activation ratio of at most r: ⌈1 / (r - (1+β_A)/L)⌉.

    Args:
        ratio: r (the paper: rho again), above 0 and below 1; 0.25 asks for a quarter of the activations.

    Raises:
        CostError: It would take more than L blocks. The paper asks for r > (1+β_A)/L alone, which allows K above L.
    """
    _check_num_blocks(layers, 1)
    if not 0 < ratio < 1:
        raise CostError(f'ratio={ratio!r}: the share of the activations to keep is above 0 and below 1')
    room = ratio - (1 + bias.activations) / layers
    least = math.ceil(1 / room - ROUNDING) if room > 0 else math.inf
    if least > layers:
        lowest = min(1, activation_ratio(layers, layers, bias))
        raise CostError(f'ratio={ratio:g} is out of reach: {layers} layers in as many blocks give {lowest:.4g}; ask for more')
    return least


def choose_blocks(layers: int, ratio: float, overhead: float, bias: Bias = UNIT) -> range:
    """The paper's guideline: every K that Eq. 18 and Eq. 14 allow, fewest blocks first.

    Args:
        ratio: r, the activation ratio not to exceed, above 0 and below 1.
        overhead: ε, the share of FLOPs to add at most, from 0.

    Raises:
        CostError: No K does both.
    """
    least, most = min_blocks(layers, ratio, bias), max_blocks(layers, overhead, bias)
    if least > most:
        needed = flops_ratio(layers, least, bias) - 1
        raise CostError(
            f'no K fits: ratio={ratio:g} takes at least {least} blocks, overhead={overhead:g} at most {most}; '
            f'allow an overhead of {needed:.4g} or a larger ratio'
        )
    return range(least, most + 1)
