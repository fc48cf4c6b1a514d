"""Assign pyramid levels, and so object sizes, to each local detection head, by one rule for every cut and stride."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn


def assign_levels(stride: int, strides: Sequence[int], level_strides: Sequence[int]) -> list[int]:
    """Return the levels of the detector's pyramid that a local head on features of ``stride`` predicts on.

    Each level is assigned to the heads with the largest stride that is not above the level's stride. A level finer than all
    heads is assigned to the finest head. The heads together therefore cover every level. A head without a level (stride 4
    beside a head of stride 8, on a pyramid that starts at 8) gets the finest level that isn't finer than the head, or else the
    coarsest.

    Args:
        stride: This head's stride, in pixels.
        strides: The strides of all local heads, including this one.
        level_strides: The strides of the pyramid's levels, ascending.

    Returns:
        Indices into ``level_strides``, ascending and consecutive.
    """
    owners = [max((s for s in strides if s <= level), default=min(strides)) for level in level_strides]
    own = [i for i, owner in enumerate(owners) if owner == stride]
    if own:
        return own
    return [next((i for i, level in enumerate(level_strides) if level >= stride), len(level_strides) - 1)]


def gt_size_range(levels: Sequence[int], prior_sizes: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The object sizes (square root of the area, pixels) that anchors of ``levels`` can match in the full pyramid.

    An anchor and an object with the same centre and shape have an IoU of at least 0.5 if their sizes differ by at most a factor
    sqrt(2). Beyond this factor, an assigner that gives every object its best anchor (``min_pos_iou=0``, ATSS) would force it
    onto a level that never gets it in the full pyramid. Between two levels that are further apart, the geometric mean is the
    limit. The finest level has no lower and the coarsest no upper limit, so every size belongs to some level.

    Args:
        levels: Consecutive level indices of one head, ascending.
        prior_sizes: For every level of the pyramid, the smallest and the largest anchor size.

    Returns:
        Lower and upper bound, inclusive; 0 and infinity if there is no limit.
    """
    first, last = levels[0], levels[-1]
    low, high = 0.0, math.inf
    if first > 0:
        low = min(prior_sizes[first][0] / math.sqrt(2), math.sqrt(prior_sizes[first][0] * prior_sizes[first - 1][1]))
    if last < len(prior_sizes) - 1:
        high = max(prior_sizes[last][1] * math.sqrt(2), math.sqrt(prior_sizes[last][1] * prior_sizes[last + 1][0]))
    return low, high


_XAVIER = {'type': 'Xavier', 'layer': 'Conv2d', 'distribution': 'uniform'}
_NORMAL = {'type': 'Normal', 'layer': 'Conv2d', 'std': 0.01}


class LevelProjection(BaseModule):
    """Feature maps for the assigned levels from one map: a 1x1 convolution, then steps by a factor of 2.

    Coarser levels come from 3x3 convolutions of stride 2, like an FPN's extra levels; finer levels from nearest upsampling.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of every level.
        stride: The map's stride in pixels.
        level_strides: The strides of the output levels, ascending, each the map's stride times a power of two.
        relu: Put a ReLU after the 1x1 convolution and start all weights from N(0, 0.01), as the authors' code of MAN++ does.
            False: no ReLU and an FPN's initial weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, level_strides: Sequence[int], relu: bool = False
    ) -> None:
        super().__init__(init_cfg=_NORMAL if relu else _XAVIER)
        self.relu = relu
        self.stride = stride
        self.level_strides = tuple(level_strides)
        self.lateral = nn.Conv2d(in_channels, out_channels, 1)
        halvings = max(0, round(math.log2(self.level_strides[-1] / stride)))
        self.down = ModuleList(nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1) for _ in range(halvings))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """From (B, in_channels, H, W) to one (B, out_channels, H * stride / s, W * stride / s) for each level stride s."""
        x = self.lateral(x)
        maps = {self.stride: F.relu(x) if self.relu else x}
        stride = self.stride
        for i, convolution in enumerate(self.down):
            finer = maps[stride]
            stride *= 2
            maps[stride] = convolution(F.relu(finer) if i else finer)
        for level in self.level_strides:
            if level < self.stride:
                maps[level] = F.interpolate(maps[self.stride], scale_factor=self.stride / level)
        return tuple(maps[level] for level in self.level_strides)
