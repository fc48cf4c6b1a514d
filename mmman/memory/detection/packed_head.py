"""Run a RetinaNet head on all pyramid levels in two calls: the first level, and one canvas with the others side by side.

The levels share the head's layers, so every layer runs once for each level, mostly on small maps: five times as many kernel
launches as on one map. On the canvas, zeros lie between levels. They are zero again after every layer, as the padding at the
border of a level is, so the results are those of the levels one by one, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from mmcv.cnn import ConvModule

    from mmman.memory.detection.losses import Outputs, Sizes


class Canvas:
    """The places of several levels on one map: the first in a corner, the others in a column beside it.

    Args:
        sizes: Height and width of the levels, from large to small.

    Attributes:
        size: Height and width of the map.
        places: Rows and columns of each level.
    """

    def __init__(self, sizes: Sizes) -> None:
        (height, width), *others = sizes
        self.places = [(slice(height), slice(width))]
        top, left = 0, width + 1
        for rows, columns in others:
            self.places.append((slice(top, top + rows), slice(left, left + columns)))
            top += rows + 1
        self.size = max(height, top - 1), left + max((columns for _, columns in others), default=-1)

    def pack(self, levels: Sequence[Tensor]) -> Tensor:
        """Copy levels, each (B, C, h, w), to a map (B, C, H, W) that is zero elsewhere."""
        return _Pack.apply(self, *levels)

    def gutters(self, device: torch.device) -> Tensor:
        """Where the map belongs to no level, (H, W), bool."""
        found = torch.ones(self.size, dtype=torch.bool, device=device)
        for place in self.places:
            found[place] = False
        return found

    def pack_targets(self, levels: Sequence[Tensor], background: float) -> Tensor:
        """Lay out the targets of anchors as the map's positions are, with ``background`` in the gutters.

        Args:
            levels: Targets of each level's anchors, (B, h * w * A, ...), by row, column and anchor.

        Returns:
            (B, H * W * A, ...).
        """
        (height, width), rest = self.size, levels[0].shape[2:]
        rows, columns = self.places[0]
        anchors = levels[0].shape[1] // (rows.stop * columns.stop)
        packed = levels[0].new_full((len(levels[0]), height, width, anchors, *rest), background)
        for (rows, columns), level in zip(self.places, levels, strict=True):
            part = packed[:, rows, columns]
            part.copy_(level.reshape(part.shape))
        return packed.flatten(1, 3)


class PackedHead:
    """Runs a head that :func:`can_pack` accepts, with all levels but the first on one canvas.

    Args:
        head: The head.
        sizes: Height and width of its feature maps, by level.
        device: Device of the feature maps.
    """

    def __init__(self, head: nn.Module, sizes: Sizes, device: torch.device) -> None:
        self.head, self.canvas = head, Canvas(sizes[1:])
        self._gutters = self.canvas.gutters(device)

    def __call__(self, feature_maps: Sequence[Tensor]) -> Outputs:
        """Compute scores and boxes, each a list of two maps: those of the first level, and of the canvas."""
        first, *others = feature_maps
        head, packed = self.head, self.canvas.pack(others)
        outputs = [head.forward_single(first)]
        scores, boxes = (self._tower(convolutions, packed) for convolutions in (head.cls_convs, head.reg_convs))
        outputs.append((head.retina_cls(scores), head.retina_reg(boxes)))
        return tuple(map(list, zip(*outputs, strict=True)))

    def _tower(self, convolutions: Sequence[ConvModule], x: Tensor) -> Tensor:
        for layer in convolutions:
            x = _ReLUWithZeros.apply(layer.conv(x), self._gutters)
        return x

    def pack_targets(self, levels: Sequence[Tensor], background: float) -> list[Tensor]:
        """Lay out targets by level as :meth:`__call__` lays out the levels. See :meth:`Canvas.pack_targets`."""
        return [levels[0], self.canvas.pack_targets(levels[1:], background)]


def can_pack(head: nn.Module) -> bool:
    """Whether a dense head is mmdet's ``RetinaHead``, or inherits its forward pass, with convolutions and ReLUs alone."""
    from mmcv.cnn import ConvModule
    from mmdet.models.dense_heads import AnchorHead, RetinaHead

    kind = type(head)
    if getattr(kind, 'forward_single', None) is not RetinaHead.forward_single or kind.forward is not AnchorHead.forward:
        return False
    towers = [*head.cls_convs, *head.reg_convs]
    return (
        not any(_is_observed(module) for module in head.modules())
        and all(type(layer) is ConvModule and not layer.with_norm and type(layer.activate) is nn.ReLU for layer in towers)
        and all(_keeps_size(layer) for layer in (*(tower.conv for tower in towers), head.retina_cls, head.retina_reg))
    )


def _is_observed(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or 'forward' in vars(module) or module._compiled_call_impl is not None


def _keeps_size(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that reads one position around each, zeros at the border."""
    if type(layer) is not nn.Conv2d or layer.padding_mode != 'zeros':
        return False
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, canvas: Canvas, *levels: Tensor) -> Tensor:
        ctx.canvas = canvas
        packed = levels[0].new_zeros(*levels[0].shape[:2], *canvas.size)
        for place, level in zip(canvas.places, levels, strict=True):
            packed[(..., *place)] = level
        return packed

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, *(grad[(..., *place)] for place in ctx.canvas.places)


class _ReLUWithZeros(torch.autograd.Function):
    """In-place ReLU that also sets the gutters to zero. Only the result is saved."""

    @staticmethod
    def forward(ctx, x: Tensor, gutters: Tensor) -> Tensor:
        x.relu_().masked_fill_(gutters, 0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, y, 0), None
