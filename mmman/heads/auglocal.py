"""AugLocal: an auxiliary network built like the layers that follow in the backbone."""

from __future__ import annotations

import copy

from mmengine.model import ModuleList
from torch import Tensor, nn

from mmman.heads.cls import ClsLocalHead
from mmman.local.local_head import INJECTED_ARGS, Boundary
from mmman.local.transfer import MomentumTransfer
from mmman.options import Count, checked
from mmman.partition import Feature
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class AugLocalHead(ClsLocalHead):
    """The local head of Ma et al., "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (2024).

    The network has ``depth`` layers built like units of the backbone, with their own weights. The units are spread evenly over
    those that follow, and include the last one. Pooling and the classifier come after them. Where shapes of consecutive layers
    don't match, a 1x1 convolution with BN, strided as needed, is inserted.

    Args:
        depth: Number of units; fewer if fewer follow.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.
    """

    def __init__(
        self, boundary: Boundary, transfer: MomentumTransfer, head: dict, depth: Count = 2, loss_weight: float = 1.0
    ) -> None:
        shapes = [boundary.feature, *boundary.following_features]
        count = len(boundary.following_units)
        chosen = sorted({(i + 1) * count // depth - 1 for i in range(depth)} - {-1})
        super().__init__(boundary, transfer, head, shapes[chosen[-1] + 1 if chosen else 0].channels, loss_weight)
        self.adapters, self.units = ModuleList(), ModuleList()
        feature = boundary.feature
        for i in chosen:
            self.adapters.append(_Adapter(feature, shapes[i]))
            unit = copy.deepcopy(boundary.following_units[i]).requires_grad_(True)
            for layer in unit.modules():
                if hasattr(layer, 'reset_parameters'):
                    layer.reset_parameters()
            self.units.append(unit)
            feature = shapes[i + 1]
        self.last_feature = feature

    @property
    def unit_copies(self) -> list[nn.Module]:
        return [*super().unit_copies, self.units]

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        size = inputs.shape[-2:]
        for adapter, unit in zip(self.adapters, self.units, strict=True):
            y = adapter(y, size)
            y = unit(y, *self.hw_shape_args(adapter.target, inputs))
        return self.last_feature.pool(y)


class _Adapter(nn.Module):
    """Converts features to the shape that a unit expects. Does nothing if the shapes are equal."""

    def __init__(self, source: Feature, target: Feature) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.project = None
        if source != target:
            stride = max(1, target.stride // source.stride)
            self.project = nn.Sequential(
                nn.Conv2d(source.channels, target.channels, 1, stride, bias=False), nn.BatchNorm2d(target.channels)
            )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.project is None:
            return x
        x = self.project(self.source.as_map(x, size))
        return x if self.target.extra_tokens is None else x.flatten(2).transpose(1, 2)
