"""Apply the paper's cost model to a real localised backbone: its formulas, and the same sums over the real units."""

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
    """Parameters, FLOPs and activations of one unit.

    Attributes:
        name: Name of the unit in the chain.
        parameters: Number of parameters.
        flops: FLOPs of the forward pass on one batch, as torch counts them: only matrix products, convolutions and attention.
        activations: Bytes saved for the backward pass on one batch, excluding parameters and images.
    """

    name: str
    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class Ratios:
    """Ratios of MAN++ to end-to-end training with the same batch."""

    parameters: float
    flops: float
    activations: float


@dataclass(frozen=True)
class CostPrediction:
    """Predictions of the cost model for a backbone. None of them is a measurement of training.

    Attributes:
        blocks: The units of every block, without the frozen prefix.
        bias: The bias of the transfer. A light bias counts with the paper's 0.02.
        formulas: Eq. 8, 13 and 17, which assume equal units and blocks of equal length.
        summed: The sums behind these equations, over the real units and blocks.
    """

    blocks: tuple[tuple[UnitCounts, ...], ...]
    bias: Bias
    formulas: Ratios
    summed: Ratios


def predict_cost(model: nn.Module, shape: tuple[int, int, int, int]) -> CostPrediction:
    """Apply the cost model to the backbone of ``model``. The units run on meta tensors, so nothing is computed.

    Args:
        model: A localised backbone, or a model that has one. It isn't modified.
        shape: (B, C, H, W) of a batch of float32 images.

    Raises:
        ConfigError: The model has no localised backbone, or several.
        CostError: The transfer has no momentum copy, or copies another unit than the next one, which the cost model assumes.
    """
    backbone = localized_backbone(model)
    plan = backbone.local.plan
    bias = UNIT
    for head in backbone.local.values():
        if head.transfer.momentum is None:
            raise CostError('the cost model assumes a transfer with a momentum copy: set ema=True in transfer')
        if head.source != plan.blocks[head.block][0]:
            raise CostError("the cost model assumes copies of the next block's first unit: set source_unit='next' in transfer")
        bias = _bias(head.transfer)
    costs = {cost.name: cost for cost in unit_counts(backbone, shape)}
    blocks = tuple(tuple(costs[unit.name] for unit in block) for block in plan.blocks)
    return CostPrediction(blocks, bias, formula_ratios(blocks, bias), summed_ratios(blocks, bias))


def unit_counts(backbone: nn.Module, shape: tuple[int, int, int, int]) -> list[UnitCounts]:
    """Count parameters, FLOPs and activations of every unit of a localised backbone, in network order.

    A tensor that several units save counts for the first of them. Operators between two units, such as the norm of an output,
    count for the later unit. Operators after the last unit don't count.

    Args:
        backbone: A localised backbone. It isn't modified.
        shape: (B, C, H, W) of a batch of float32 images.
    """
    plan = backbone.local.plan
    units = [*plan.frozen, *(unit for block in plan.blocks for unit in block)]
    bare = delocalize_(copy.deepcopy(backbone)).to('meta')
    bare.train()  # on the copy; train() of mmpretrain's backbones returns None, so it can't be chained
    images = torch.empty(shape, device='meta')
    kept = {tensor.untyped_storage()._cdata: tensor for tensor in (images, *bare.parameters(), *bare.buffers())}
    activations, totals = 0, [(0, 0)]
    counter = FlopCounterMode(display=False)

    def keep(tensor: Tensor) -> Tensor:
        nonlocal activations
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            kept[storage._cdata] = tensor  # keep it alive so that no other storage reuses the address
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
    """Eq. 8 with the real parameters, Eq. 13 and Eq. 17. These two ignore the units' real FLOPs and activations."""
    sizes = [unit.parameters for block in blocks for unit in block]
    layers, num_blocks = len(sizes), len(blocks)
    return Ratios(
        1 + expected_extra_parameters(sizes, num_blocks, bias) / sum(sizes),
        flops_ratio(layers, num_blocks, bias),
        activation_ratio(layers, num_blocks, bias),
    )


def summed_ratios(blocks: Sequence[Sequence[UnitCounts]], bias: Bias) -> Ratios:
    """The same equations without the assumption of equal units: a head costs as much as the unit that it copies, plus the bias.

    The activation ratio is the largest of all blocks, each with its head, over end-to-end training.
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
