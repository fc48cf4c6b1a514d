"""Adapt configs of mmdet's dense heads to a local head: reject or replace unsuitable heads, and select pyramid levels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.dry_run import describe_error
from mmman.registry import MODELS

UNSUPPORTED_HEADS = {
    'FSAFHead': "it chooses an object's level by comparing the losses of all levels",
    'RepPointsHead': "its point assigner needs the levels' scales to start at the pyramid's",
}
"""Dense heads that build and run on a subset of the levels, but train something different there."""
_REPLACEMENTS = {
    'LDHead': ('GFLHead', 'the same head without its teacher'),
    'LADHead': ('PAAHead', 'the same head without its teacher'),
    'CondInstBboxHead': ('FCOSHead', 'the same head without the predictions for the mask head'),
    'BoxInstBboxHead': ('FCOSHead', 'the same head without the predictions for the mask head'),
}
"""Heads whose loss involves another network, the head that replaces them without that network, and how the two differ."""
_BOX_CLASSES = (
    ('bbox_head', 'num_classes'),
    ('roi_head', 'bbox_head', 'num_classes'),
    ('mask_head', 'num_classes'),
    ('panoptic_head', 'num_things_classes'),
)
"""Where detectors set the number of classes that have boxes: without the classes of stuff in panoptic segmentation."""
_LEVEL_COUNTS = ('num_ins',)
"""Options that hold the number of levels."""
_GENERATOR_OPTIONS = {'strides', 'base_sizes', 'centers'}
"""Options of generators that may have one value per level."""


def find_box_classes(model: Mapping[str, Any] | nn.Module) -> tuple[str, int] | None:
    """Find the number of a detector's classes that have boxes. Of a cascade of heads the first counts.

    Args:
        model: The detector, or its config.

    Returns:
        Its place in the model, e.g. ``roi_head.bbox_head[0].num_classes``, and the number. None if the model sets none, or the
        number is the length of a text whose words boxes are matched with (Grounding DINO before fine-tuning).
    """
    for path in _BOX_CLASSES:
        value, owner, place = model, model, []
        for name in path:
            owner, value = value, _option(value, name)
            is_cascade = isinstance(value, (list, tuple, nn.ModuleList))
            place.append(f'{name}[0]' if is_cascade else name)
            value = value[0] if is_cascade else value
        words = (_option(owner, 'contrastive_cfg') or {}).get('max_text_len')
        if isinstance(value, int) and value > 0 and value != words:
            return '.'.join(place), value
    return None


def _option(owner: Mapping[str, Any] | nn.Module | None, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def unsupported_message(kind: str | type, reason: str) -> str:
    """Error message: why a dense head, named as in a config, can't be a local head, and what to set instead."""
    name = kind.rpartition('.')[-1] if isinstance(kind, str) else kind.__name__
    others = [head for head in ('RetinaHead', 'FCOSHead', 'ATSSHead', 'GFLHead') if head != name]
    return (
        f'{name} cannot be a local detection head: {reason}; set local_head.bbox_head to another, e.g. {", ".join(others)}, or '
        "set local_head.num_classes instead, which selects RetinaNet's"
    )


def without_other_networks(config: dict) -> dict:
    """Return the config itself or, if the head's loss involves another network, that of the head that does without it."""
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(config['type']) if isinstance(config['type'], str) else config['type']
    if cls is None or cls.__name__ not in _REPLACEMENTS:
        return config
    from mmdet.models import dense_heads

    name, why = _REPLACEMENTS[cls.__name__]
    options = _default_options(getattr(dense_heads, name))
    print_log(f'Local heads use {name} in place of {cls.__name__}: {why}', logger='current')
    return {**{key: value for key, value in config.items() if key in options}, 'type': f'mmdet.{name}'}


def build_temporary(config: dict) -> nn.Module:
    """Build a temporary head on the whole pyramid, on the CPU, so that its values are available even when building on meta."""
    try:
        with torch.device('cpu'):
            return MODELS.build(copy.deepcopy(config))
    except Exception as error:  # a third party's constructor may fail in any way
        raise ConfigError(unsupported_message(config['type'], f'it cannot be built ({describe_error(error)})')) from error


def _default_options(cls: type) -> dict[str, object]:
    """The options of a class by name with their defaults, including those that it passes to base classes."""
    found: dict[str, object] = {}
    for base in cls.__mro__:
        for name, option in inspect.signature(base.__init__).parameters.items():
            found.setdefault(name, option.default)
    return {name: default for name, default in found.items() if name not in ('self', 'args', 'kwargs')}


def anchors_by_level(full_head: nn.Module) -> list[Tensor] | None:
    """Base anchors of every level, (A, 4), if objects are assigned to anchors; None if they are assigned to points."""
    generators = [
        full_head.prior_generator,
        *(value for name, value in vars(full_head).items() if name.endswith('prior_generator')),
    ]
    return next((generator.base_anchors for generator in generators if hasattr(generator, 'base_anchors')), None)


def select_levels(config: dict, full_head: nn.Module, levels: list[int]) -> dict:
    """The dense head's config with every per-level option, set or default, restricted to ``levels``."""
    count = len(full_head.prior_generator.strides)
    options = _default_options(type(full_head))
    own = {name: value for name, value in vars(full_head).items() if name in options and _is_per_level(value, count)}
    generators = {name: default for name, default in options.items() if _has_strides(default)}
    config = copy.deepcopy({**own, **generators, **config})
    parts = [(value, _GENERATOR_OPTIONS) for value in config.values() if _has_strides(value)]
    for part, names in ((config, options.keys()), *parts):
        for name in names & part.keys():
            if _is_per_level(part[name], count):
                part[name] = [part[name][i] for i in levels]
    return config | {name: len(levels) for name in _LEVEL_COUNTS if name in options}


def downsample_config(config: dict, factor: int) -> dict:
    """The dense head's config for grids ``factor`` times coarser, with anchors of the same sizes."""
    if factor == 1:
        return config
    generators = [value for value in config.values() if _has_strides(value)]
    for generator in generators:
        if generator.get('base_sizes') is None and 'base_sizes' in _default_options(_generator_class(generator)):
            generator['base_sizes'] = [min(_pair(stride)) for stride in generator['strides']]
    for part in (config, *generators):
        if 'strides' in part:
            part['strides'] = [_scaled(stride, factor) for stride in part['strides']]
    return config


def _generator_class(config: dict) -> type:
    from mmdet.registry import TASK_UTILS

    return TASK_UTILS.get(config['type']) if isinstance(config['type'], str) else config['type']


def _scaled(stride: int | tuple[int, int], factor: int) -> int | tuple[int, int]:
    return tuple(side * factor for side in stride) if isinstance(stride, (list, tuple)) else stride * factor


def _pair(stride: int | tuple[int, int]) -> tuple[int, int]:
    return stride if isinstance(stride, (list, tuple)) else (stride, stride)


def _has_strides(value: object) -> bool:
    """Whether an option is the config of a generator of anchors or points."""
    return isinstance(value, dict) and isinstance(value.get('strides'), (list, tuple))


def _is_per_level(value: object, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count
