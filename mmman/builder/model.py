"""``mmman.LocalModel``: builds a model whose local heads take their options from the model's own head."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import ConfigDict
from mmengine.model import BaseModel

from mmman.builder.backbone import LocalBackbone
from mmman.errors import ConfigError
from mmman.options import checked
from mmman.registry import MODELS, resolve_type


@MODELS.register_module()
@checked('model')
def LocalModel(model_type: str | type, backbone: dict, **options) -> BaseModel:  # noqa: N802  named as a config writes it
    """Build a stock detector, segmentor or classifier whose local heads take their options from the model's own head.

    In a config that inherits a stock one::

        model = dict(
            type='mmman.LocalModel',
            model_type=_base_.model.type,
            backbone=dict(
                _delete_=True,
                type='mmman.LocalBackbone',
                backbone=_base_.model.backbone,
                num_blocks=4,
                local_head=dict(type='mmman.DetLocalHead'),
            ),
        )

    The local head uses the ``bbox_head`` and ``train_cfg`` (detectors), ``num_classes`` (two-stage detectors), ``decode_head``
    (segmentors) or ``head`` (classifiers) of the final model config, including changes made by a config that inherits this
    one. Keys set in ``local_head`` override them.

    Args:
        model_type: The stock model's own ``type``.
        backbone: Config of a ``mmman.LocalBackbone``.
        **options: The stock model's options.

    Returns:
        The model, an instance of the stock class.

    Raises:
        ConfigError: ``backbone`` is not a ``mmman.LocalBackbone``.
    """
    backbone = _with_derived_options({**options, 'backbone': backbone})
    return MODELS.build(ConfigDict({**options, 'type': model_type, 'backbone': backbone}))


def _with_derived_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the localised backbone, with the options that local heads take from the model's own head."""
    backbone = model['backbone']
    if resolve_type(backbone.get('type')) is not LocalBackbone:
        raise ConfigError(f"model.backbone.type={backbone.get('type')!r}: mmman.LocalModel requires 'mmman.LocalBackbone'")
    local_head = backbone.get('local_head')
    if not isinstance(local_head, Mapping) or 'type' not in local_head:  # LocalBackbone raises
        return dict(backbone)
    derive = getattr(resolve_type(local_head['type']), 'derive_options', None)
    derived = derive(model, local_head) if derive else {}
    return {**backbone, 'local_head': _merged(copy.deepcopy(derived), local_head)}


def mismatched_options(model: Mapping[str, Any]) -> list[str]:
    """Return the options in which the local heads differ from the model's own head.

    Args:
        model: Config of a model whose backbone is a ``mmman.LocalBackbone``.

    Returns:
        The keys below ``local_head``, e.g. ``bbox_head.anchor_generator.ratios``. Excludes options that only set a head's size.
    """
    local_head = model['backbone'].get('local_head')
    kind = resolve_type(local_head['type']) if local_head else None
    if kind is None or resolve_type(model.get('type')) is LocalModel:
        return []
    derived = kind.derive_options(model, local_head)
    ours, theirs = kind.task_options(local_head), kind.task_options(derived)
    return sorted(key for name in theirs for key in _differences(ours.get(name), theirs[name], name))


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``changes`` into ``base`` recursively. A dict with another ``type`` replaces the one in ``base``."""
    for name, value in changes.items():
        old = base.get(name)
        inherits = (
            isinstance(old, Mapping) and isinstance(value, Mapping) and value.get('type', old.get('type')) == old.get('type')
        )
        base[name] = _merged(dict(old), value) if inherits else copy.deepcopy(value)
    return base


def _differences(ours: Any, theirs: Any, key: str) -> list[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = [*theirs, *(name for name in ours if name not in theirs)]
        return [found for name in names for found in _differences(ours.get(name), theirs.get(name), f'{key}.{name}')]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return [] if [*ours] == [*theirs] else [key]
    return [] if ours == theirs else [key]
