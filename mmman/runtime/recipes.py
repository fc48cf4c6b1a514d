"""Which local heads a stock config gets, and which configs get none."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from mmengine.config import Config, ConfigDict

from mmman.analysis.dummy_model import classes_of, library_of
from mmman.errors import ConfigError
from mmman.heads.det_config import find_box_classes
from mmman.local.local_head import SELF_SUPERVISED, TRACKER
from mmman.runtime.launch import type_name
from mmman.runtime.stock_config import StockConfig

LIGHT_WIDTH = 128
"""Width of the towers of a light dense head."""
_EXAMPLES = {
    'mmdet': "dict(type='mmman.DetLocalHead', num_classes=...)",
    'mmseg': "dict(type='mmman.SegLocalHead', decode_head=dict(num_classes=...))",
    'mmpretrain': "dict(type='mmman.DGLLocalHead', head=dict(type='LinearClsHead', num_classes=...))",
}
"""A local head for a config that tells none, by library."""
_UNSUPPORTED = {
    SELF_SUPERVISED: (
        'trains without labels, which local heads learn from: train it without mmman, and give the config that trains a '
        'detector, segmentor or classifier from its weights'
    ),
    'BaseReID': (
        'learns identities of crops, and this tool tries local heads on other images: write the child by hand, with '
        "local_head=dict(type='mmman.DGLLocalHead', head=_base_.model.head)"
    ),
    TRACKER: 'trains on videos, and local heads learn from images: give the config of a detector',
}
"""What follows the name of a model, by its base class."""


@dataclass(frozen=True)
class Recipe:
    """The local heads of a child config, as source code.

    Attributes:
        local_head: The option ``local_head``.
        transfer: The option ``transfer``.
        why: Why this local head.
    """

    local_head: str
    transfer: str
    why: str


def check_source(source: StockConfig) -> None:
    """Raise :class:`ConfigError` if a config has no backbone of its own, or its model trains without labels or on videos."""
    model = source.cfg.get('model')
    if not isinstance(model, dict) or not isinstance(model.get('backbone'), dict) or 'type' not in model.backbone:
        inner = next((name for name in ('detector', 'model') if isinstance(model, dict) and name in model), None)
        advice = '; give the config of a detector, segmentor or classifier'
        if inner:
            advice = f', only model.{inner}.backbone: give the config of the {inner} without the wrapper'
        elif isinstance(model, dict) and isinstance(model.get('image_encoder'), (list, tuple)):
            advice = ", but model.image_encoder: write the child by hand, with mmman.LocalBackbone as the encoder's first part"
        raise ConfigError(f'{source.name} has no model.backbone{advice}')
    bases = [cls.__name__ for cls in classes_of(model.type, source.cfg)]
    if reason := next((_UNSUPPORTED[name] for name in bases if name in _UNSUPPORTED), None):
        raise ConfigError(f'{source.name}: {type_name(model)} {reason}')


def recipes_for(cfg: Config, model: str) -> list[Recipe]:
    """Return candidate recipes, best first.

    Args:
        cfg: The stock config.
        model: Name of its model in the child.

    Raises:
        ConfigError: No part of the model tells which local head fits it.
    """
    stock = cfg.model
    if 'decode_head' in stock:
        head = f"dict(type='mmman.SegLocalHead', decode_head={model}.decode_head)"
        why = "FCN, with the classes, losses and sampler of the model's decode_head"
        return [
            Recipe(head, "dict(bias='depthwise')", why),
            Recipe(head, 'dict()', f'{why}; tokens without a grid take no depthwise bias'),
        ]
    if 'bbox_head' in stock:
        train_cfg = f', train_cfg={model}.train_cfg' if stock.get('train_cfg') else ''
        kind, own = type_name(stock.bbox_head), f'{model}.bbox_head'
        if _tower_width(stock.bbox_head, cfg) > LIGHT_WIDTH:
            own = f'dict({own}, feat_channels={LIGHT_WIDTH})'
        dense = _detector_recipe(f'bbox_head={own}{train_cfg}', f"the model's own {kind}, one convolution a tower")
        retina = _detector_recipe(f'num_classes={model}.bbox_head.num_classes', f"RetinaNet's, because {kind} cannot be one")
        return [dense, *([retina] if find_box_classes(stock) else [])]
    if found := find_box_classes(stock):
        place, _ = found
        owner = place.partition('.')[0]
        lacks = 'the detector has no dense head' if owner == 'roi_head' else f'the {owner} predicts masks and no boxes'
        return [_detector_recipe(f'num_classes={model}.{place}', f"RetinaNet's, because {lacks}")]
    if 'head' in stock and isinstance(stock.head, dict):
        head, why = f'{model}.head', f"the model's own {type_name(stock.head)}"
        if 'num_classes' not in stock.head and stock.backbone.get('num_classes', 0) > 0:
            loss = f', loss={model}.head.loss' if 'loss' in stock.head else ''
            head = f"dict(type='mmpretrain.LinearClsHead', num_classes={model}.backbone.num_classes{loss})"
            why = "a linear classifier with the model's loss, because its own classifier is in the backbone"
        vit = f"dict(type='mmman.ViTLocalHead', head={head}, layers=0)"
        dgl = f"dict(type='mmman.DGLLocalHead', head={head})"
        return [
            Recipe(vit, "dict(bias='channel')", f'class token or mean, {why}'),
            Recipe(dgl, "dict(bias='depthwise')", f"DGL's network, {why}"),
        ]
    example = _EXAMPLES.get(library_of(cfg), 'a subclass of mmman.LocalHead')
    raise ConfigError(
        f'no local head is known for {type_name(stock)}, which has no bbox_head, roi_head, decode_head or head that sets '
        f'num_classes; write the child by hand, with a local_head of your choice, e.g. {example}'
    )


def _tower_width(bbox_head: ConfigDict, cfg: Config) -> int:
    """Width of a dense head's towers; 0 if it has no such option, like DETR's."""
    defaults = [
        option.default
        for cls in classes_of(bbox_head.type, cfg)
        if (option := inspect.signature(cls.__init__).parameters.get('feat_channels'))
    ]
    return bbox_head.get('feat_channels', defaults[0] if defaults else 0)


def _detector_recipe(options: str, why: str) -> Recipe:
    head = f"dict(type='mmman.DetLocalHead', {options}, stacked_convs=1, downsample=4)"
    return Recipe(head, "dict(bias='channel')", f'{why}, on a grid four times as coarse')
