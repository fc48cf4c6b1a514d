"""Checks that anchors and RoI extractors have the strides of the maps that they get: if not, a detector trains, but wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from torch import Tensor, nn

from mmman.errors import ConfigError


def check_strides_once(model: nn.Module) -> None:
    """Compare a detector's strides with its feature maps in its next forward pass, which raises :class:`ConfigError`.

    Args:
        model: A model of mmdet. One without strides, or without a neck, isn't checked.
    """
    strides = [*_strides(model)]
    if not strides or not isinstance(getattr(model, 'neck', None), nn.Module):
        return
    size: list[tuple[int, int]] = []

    def read_size(backbone: nn.Module, args: tuple) -> None:
        size[:] = [tuple(args[0].shape[-2:])]

    def check(neck: nn.Module, args: tuple, maps: tuple[Tensor, ...]) -> None:
        before.remove()
        after.remove()
        for option, values in strides:
            for level, (stride, own) in enumerate(zip(values, maps, strict=False)):
                _check_level(option, level, stride, size[0], tuple(own.shape[-2:]))

    before = model.backbone.register_forward_pre_hook(read_size)
    after = model.neck.register_forward_hook(check)


def _strides(model: nn.Module) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Options that hold strides by level, and the strides, (across, down), pixels."""
    for name in ('bbox_head', 'rpn_head'):
        generator = getattr(getattr(model, name, None), 'prior_generator', None)
        if generator is not None:
            yield f'model.{name}: strides of the {type(generator).__name__}', [*generator.strides]
    roi_head = getattr(model, 'roi_head', None)
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        extractors = getattr(roi_head, name, None)
        for extractor in extractors if isinstance(extractors, nn.ModuleList) else [extractors]:
            if strides := getattr(extractor, 'featmap_strides', None):
                yield f'model.roi_head.{name}.featmap_strides', [(stride, stride) for stride in strides]


def _check_level(option: str, level: int, stride: tuple[int, int], image: tuple[int, int], own: tuple[int, int]) -> None:
    expected = tuple(ceil(length / step) for length, step in zip(image, reversed(stride), strict=True))
    if any(abs(mine - other) > 1 for mine, other in zip(own, expected, strict=True)):
        raise ConfigError(
            f'{option}: level {level} has stride {stride[0]}, but its map of {own[0]}x{own[1]} for images of '
            f'{image[0]}x{image[1]} has about {round(image[1] / own[1])}: change the strides, or out_indices of the backbone '
            'and start_level and in_channels of the neck, so that they fit'
        )
