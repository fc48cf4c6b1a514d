"""Read the number and the size of the training images from a config's own loader and pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

from mmengine.config import Config

from mmman.errors import ConfigError

Size = tuple[int, int]
"""Height and width, pixels."""

DIVISOR = 32
"""Detectors and segmentors are measured on images whose sides are multiples of this."""


def images_per_step(cfg: Config) -> int:
    """The ``batch_size`` of a config's training loader, which is per process.

    Raises:
        ConfigError: The config has no training loader with a ``batch_size``.
    """
    loader = cfg.get('train_dataloader') or {}
    size = loader.get('batch_size') or (loader.get('batch_sampler') or {}).get('batch_size')
    if not isinstance(size, int):
        raise ConfigError('the config has no train_dataloader.batch_size: give the images per step and GPU by --batch')
    return size


def image_size(cfg: Config, scope: str) -> Size:
    """The largest size that the training pipeline and the data preprocessor make of an image.

    Args:
        cfg: The whole config.
        scope: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``.

    Raises:
        ConfigError: Neither of them sets a size.
    """
    size = None
    for step in _pipeline((cfg.get('train_dataloader') or {}).get('dataset') or {}):
        size = _after(step, size, scope)
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    for augment in preprocessor.get('batch_augments') or []:
        if fixed := augment.get('size') or augment.get('random_size_range'):
            size = (max(fixed),) * 2 if 'random_size_range' in augment else tuple(fixed)
    if preprocessor.get('size'):  # a segmentor's, (H, W)
        size = tuple(preprocessor['size'])
    if size is None:
        raise ConfigError('neither the training pipeline nor the data_preprocessor sets an image size: give it by --shape H W')
    if scope == 'mmpretrain':
        return size
    divisor = max(DIVISOR, preprocessor.get('pad_size_divisor') or 1)
    return tuple(ceil(side / divisor) * divisor for side in size)


def _pipeline(dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The transforms of a dataset and of the datasets that it wraps, innermost first."""
    inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or []), None)
    return [*(_pipeline(inner) if inner else []), *(dataset.get('pipeline') or [])]


def _after(step: Mapping[str, Any], size: Size | None, scope: str) -> Size | None:
    """The largest size of an image after one transform."""
    kind = step.get('type')
    kind = (kind if isinstance(kind, str) else getattr(kind, '__name__', '')).rpartition('.')[2]
    if nested := step.get('transforms'):
        branches = nested if isinstance(nested[0], Sequence) else [nested]
        return max((_after_all(branch, size, scope) for branch in branches), key=lambda one: prod(one or (0,)))
    if kind in ('RandomCrop', 'CenterCrop', 'EfficientNetRandomCrop'):
        given = step.get('crop_size') or step.get('scale')
        if given is None or step.get('crop_type', 'absolute') != 'absolute':
            return size
        crop = _size(given, width_first=scope == 'mmdet')
        return crop if size is None or scope == 'mmpretrain' else tuple(map(min, size, crop))
    if kind == 'Pad' and step.get('size'):
        return _size(step['size'], width_first=True)
    if 'Resize' in kind or 'Mosaic' in kind:
        given = [step[key] for key in ('scale', 'scales', 'img_scale') if step.get(key)]
        if not given:
            return size
        several = given[0] if _is_nested(given[0]) or 'scales' in step else [given[0]]
        largest = max((_size(one, width_first=True) for one in several), key=prod)
        if all(isinstance(one, int) for one in several) and step.get('max_size'):  # ResizeShortestEdge
            largest = min(largest[0], step['max_size']), step['max_size']
        ratio = max(step.get('ratio_range') or (1.0,)) if kind == 'RandomResize' else 1.0
        height, width = (round(ratio * side) for side in largest)
        return (min(height, width), max(height, width)) if step.get('keep_ratio') else (height, width)
    return size


def _after_all(steps: Sequence[Mapping[str, Any]], size: Size | None, scope: str) -> Size | None:
    for step in steps:
        size = _after(step, size, scope)
    return size


def _is_nested(value: object) -> bool:
    return isinstance(value, Sequence) and isinstance(value[0], Sequence)


def _size(value: int | Sequence[int], width_first: bool) -> Size:
    if isinstance(value, int):
        return value, value
    return (value[1], value[0]) if width_first else (value[0], value[1])
