"""The paper's cost model on a real localised backbone: its formulas, and the same sums over the units as they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mmman.analysis.paper_cost import CHANNEL, UNIT, Bias, activation_ratio, expected_extra_parameters, flops_ratio
from mmman.errors import CostError
from mmman.local import delocalize_
from mmman.local.blocks import localized_backbone


@dataclass(frozen=True)
class UnitCounts:
    """What a unit costs.

    Attributes:
        name: Its name in the chain.
        parameters: Its parameters.
        flops: FLOPs of its forward pass on one batch, as torch counts them: matrix products, convolutions and attention alone.
        activations: Bytes that it keeps for its backward pass on one batch, its parameters and the images not counted.
    """

    name: str
    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class Ratios:
    """MAN++ over end to end, both with the same batch."""

    parameters: float
    flops: float
    activations: float


@dataclass(frozen=True)
class CostPrediction:
    """What the cost model says of a backbone. None of it is a measurement of training.

    Attributes:
        blocks: The units of every block, a frozen prefix left out.
        bias: The bias of its transfer. A light bias counts with the paper's 0.02.
        formulas: Eq. 8, 13 and 17: all units equal, all blocks of the same length.
        summed: The sums behind these equations, with every unit as it is and the blocks as they are cut.
    """

    blocks: tuple[tuple[UnitCounts, ...], ...]
    bias: Bias
    formulas: Ratios
    summed: Ratios


def predict_cost(model: nn.Module, shape: tuple[int, int, int, int]) -> CostPrediction:
    """Apply the cost model to the backbone of ``model``. Nothing is computed: the units run on meta tensors.

    Args:
        model: A localised backbone, or a model that has one. It stays as it is.
        shape: (B, C, H, W) of a batch of images, float32.

    Raises:
        MisuseError: It has no localised backbone, or several.
        CostError: Its transfer has no momentum copy, which the cost model is about.
    """
    backbone = localized_backbone(model)
    plan = backbone.local.plan
    bias = UNIT
    for head in backbone.local.values():
        if head.transfer.momentum is None:
            raise CostError('the cost model is of a transfer with a momentum copy: set ema=True in transfer')
        bias = _bias(head.transfer)
    costs = {cost.name: cost for cost in unit_counts(backbone, shape)}
    blocks = tuple(tuple(costs[unit.name] for unit in block) for block in plan.blocks)
    return CostPrediction(blocks, bias, formula_ratios(blocks, bias), summed_ratios(blocks, bias))


def unit_counts(backbone: nn.Module, shape: tuple[int, int, int, int]) -> list[UnitCounts]:
    """The cost of every unit of a localised backbone, in the order in which they run.

    A tensor that several units keep counts for the first. What runs between two units, such as the norm of an output, counts
    for the later one, and what runs behind the last for none.

    Args:
        shape: (B, C, H, W) of a batch of images, float32.
    """
    plan = backbone.local.plan
    units = [*plan.frozen, *(unit for block in plan.blocks for unit in block)]
    bare = delocalize_(copy.deepcopy(backbone)).to('meta')
    bare.train()  # which mmpretrain's backbones return nothing from
    images = torch.empty(shape, device='meta')
    kept = {tensor.untyped_storage()._cdata: tensor for tensor in (images, *bare.parameters(), *bare.buffers())}
    activations, totals = 0, [(0, 0)]
    counter = FlopCounterMode(display=False)

    def keep(tensor: Tensor) -> Tensor:
        nonlocal activations
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            kept[storage._cdata] = tensor  # alive, so that no other storage gets its address
            activations += storage.nbytes()
        return tensor

    def mark(*_) -> None:
        totals.append((counter.get_total_flops(), activations))

    for unit in units:
        bare.get_submodule(unit.output).register_forward_hook(mark)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        bare(images)
    return [
        UnitCounts(unit.name, sum(p.numel() for p in unit.parameters(bare)), flops - flops_before, kept_bytes - kept_before)
        for unit, ((flops_before, kept_before), (flops, kept_bytes)) in zip(units, pairwise(totals), strict=True)
    ]


def formula_ratios(blocks: Sequence[Sequence[UnitCounts]], bias: Bias) -> Ratios:
    """Eq. 8 over the parameters there are, Eq. 13 and Eq. 17: of the activations and FLOPs of the units they know nothing."""
    sizes = [unit.parameters for block in blocks for unit in block]
    layers, num_blocks = len(sizes), len(blocks)
    return Ratios(
        1 + expected_extra_parameters(sizes, num_blocks, bias) / sum(sizes),
        flops_ratio(layers, num_blocks, bias),
        activation_ratio(layers, num_blocks, bias),
    )


def summed_ratios(blocks: Sequence[Sequence[UnitCounts]], bias: Bias) -> Ratios:
    """What these equations say before all units are taken for equal: a head costs what the unit that it copies does, and β.

    The activation ratio is that of the largest block with its head, of all blocks.
    """
    units = [unit for block in blocks for unit in block]
    copied = [block[0] for block in blocks[1:]]
    peaks = [sum(unit.activations for unit in block) for block in blocks]
    for j, unit in enumerate(copied):
        peaks[j] += (1 + bias.activations) * unit.activations
    return Ratios(
        1 + (1 + bias.parameters) * sum(unit.parameters for unit in copied) / sum(unit.parameters for unit in units),
        1 + (1 + bias.flops / 2) * sum(unit.flops for unit in copied) / sum(unit.flops for unit in units),
        max(peaks) / sum(unit.activations for unit in units),
    )


def _bias(transfer: nn.Module) -> Bias:
    if transfer.bias is not None:
        return UNIT
    light = transfer.channel_bias is not None or transfer.depthwise_bias is not None
    return CHANNEL if light else Bias(0, 0, 0)
