"""AugLocal: an auxiliary network built like the layers that follow in the backbone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from mmengine.model import ModuleList
from torch import Tensor, nn

from mmman.heads.cls import ClsLocalHead
from mmman.local.local_head import INJECTED_ARGS, Boundary
from mmman.local.transfer import MomentumTransfer
from mmman.options import Count, Range, checked
from mmman.partition import Feature
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class AugLocalHead(ClsLocalHead):
    """The local head of Ma et al., "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (2024).

    The network has up to ``depth`` layers built like units of the backbone, with their own weights: the units are sampled
    uniformly from those that follow, and include the last one. Pooling and the classifier come after them. Where the input of a
    layer has another shape than in the backbone, the layer is built like the unit that changes the shape, the first of its
    stage. If that doesn't fit either, average pooling and a 1x1 convolution with BN come before it.

    Args:
        depth: Number of units at the first local head; fewer if fewer follow.
        pyramid: Pyramidal depth: the share of ``depth - 1`` by which the number of units falls from the first local head to the
            last, linearly in the block's index. 0: the same depth everywhere.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.
    """

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        depth: Count = 2,
        pyramid: Annotated[float, Range(0, 1)] = 0.5,
        loss_weight: float = 1.0,
    ) -> None:
        shapes = [boundary.feature, *boundary.following_features]
        chosen = _sampled_units(boundary.position, len(boundary.following_units), _depth_at(boundary, depth, pyramid))
        super().__init__(boundary, transfer, head, shapes[chosen[-1] + 1 if chosen else 0].channels, loss_weight)
        self.adapters, self.units = ModuleList(), ModuleList()
        feature = boundary.feature
        for i in chosen:
            model = _unit_to_copy(feature, i, shapes)
            self.adapters.append(_Adapter(feature, shapes[model]))
            self.units.append(new_unit_like(boundary.following_units[model]))
            feature = shapes[i + 1]
        self.last_feature = feature

    @property
    def unit_copies(self) -> list[nn.Module]:
        return [*super().unit_copies, self.units]

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        size = inputs.shape[-2:]
        for adapter, unit in zip(self.adapters, self.units, strict=True):
            y = adapter(y, size)
            y = unit(y, *self.hw_shape_args(y, adapter.target, inputs))
        return self.last_feature.pool(y)


def new_unit_like(unit: nn.Module) -> nn.Module:
    """A trainable unit built like ``unit``, with weights that are drawn anew."""
    unit = copy.deepcopy(unit).requires_grad_(True)
    for layer in unit.modules():
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()
    return unit


def _depth_at(boundary: Boundary, depth: int, pyramid: float) -> int:
    """Number of units at this block, rounded as in the authors' code."""
    share = pyramid * (boundary.block - 1) / max(1, boundary.num_blocks - 2)
    return max(1, round(depth * (1 - share) + share))


def _sampled_units(position: int, count: int, depth: int) -> list[int]:
    """Indices of ``depth`` of the ``count`` units that follow, at equal distances up to the last one.

    As in the authors' code, positions in the whole chain are rounded: of two equally near ones, the even one is sampled.
    """
    if depth >= count:
        return [*range(count)]
    return [round(position + count / depth * i) - position - 1 for i in range(1, depth + 1)]


def _unit_to_copy(feature: Feature, i: int, shapes: Sequence[Feature]) -> int:
    """Index of the unit to copy for unit ``i`` on an input of shape ``feature``; ``shapes[k]`` is the input of unit k."""
    alike = [k for k in range(i + 1) if shapes[k + 1] == shapes[i + 1]]
    if feature == shapes[i]:
        return i
    return next((k for k in alike if shapes[k] == feature), alike[0])


class _Adapter(nn.Module):
    """Converts features to the shape that a unit expects. Does nothing if the shapes are equal."""

    def __init__(self, source: Feature, target: Feature) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.stride = max(1, target.stride // source.stride)
        self.project = None
        if source != target:
            self.project = nn.Sequential(
                nn.Conv2d(source.channels, target.channels, 1, bias=False), nn.BatchNorm2d(target.channels)
            )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.project is None:
            return x
        x = self.source.as_map(x, size)
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        x = self.project(x)
        return x if self.target.extra_tokens is None else x.flatten(2).transpose(1, 2)
