"""Build a config's model without downloads, and random batches for it. Measuring tools share these functions."""

from __future__ import annotations

from functools import partial

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, PretrainedInit, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmman.analysis.sizes_only import SizesOnly
from mmman.errors import ConfigError
from mmman.heads.dry_run import box_masks, predicts_masks
from mmman.local.blocks import LocalBlocks

OBJECTS = 10
"""Boxes per image."""
LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def classes_of(kind: str | type | None, cfg: Config) -> tuple[type, ...]:
    """The class that ``type`` of a part of the model names in a config, and its base classes; empty if it is no known class."""
    if isinstance(kind, str):
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return getattr(kind, '__mro__', ())


def library_of(cfg: Config) -> str:
    """The library that defines the class of a config's model, or a base class of it. Otherwise the default scope."""
    model = cfg.get('model') or {}
    libraries = (cls.__module__.partition('.')[0] for cls in classes_of(model.get('model_type', model.get('type')), cfg))
    return next((library for library in libraries if library in LIBRARIES), cfg.get('default_scope') or 'mmengine')


def scope_of(cfg: Config) -> str:
    """The default scope of a config. A pure Python config may have none: then the library of its model."""
    return cfg.get('default_scope') or library_of(cfg)


def without_pretrained(cfg: ConfigDict) -> ConfigDict:
    """Copy a config without its pretrained weights, which don't affect what is measured."""
    kept = {
        key: value
        for key, value in cfg.items()
        if not (key == 'init_cfg' and isinstance(value, dict) and value.get('type') in ('Pretrained', PretrainedInit))
    }
    if isinstance(kept.get('pretrained'), str):
        kept['pretrained'] = None
    return ConfigDict({key: without_pretrained(value) if isinstance(value, dict) else value for key, value in kept.items()})


def model_config(cfg: Config, height: int, width: int) -> ConfigDict:
    """Copy the model of a config without its pretrained weights.

    Args:
        cfg: The whole config.
        height, width: Size of the images, pixels. A segmentor's data preprocessor needs it.
    """
    model = without_pretrained(cfg.model)
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    if 'size' in (model['data_preprocessor'] or {}):
        model['data_preprocessor'] = {**model['data_preprocessor'], 'size': (height, width)}
    return model


def build_dummy_model(
    cfg: Config, height: int, width: int, sizes_only: SizesOnly | None = None
) -> tuple[BaseModel, OptimWrapper]:
    """Build the model of a config in training mode, and its optim wrapper with a learning rate of 0.

    Momentum copies of local heads are initialised. Weights are random with seed 0, so a config gives the same model in every
    process. With ``sizes_only`` the weights are fake tensors. ``cfg`` is modified: its learning rate is set to 0, and a missing
    default scope to the model's library.
    """
    cfg.default_scope = scope_of(cfg)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(model_config(cfg, height, width))).train()
    local = getattr(model.backbone, 'local', None)
    if isinstance(local, LocalBlocks):
        local.is_init = True  # counts as initialised: the values don't matter
        for head in local.values():
            head.transfer.init_from_(head.source.of(model.backbone))
    if sizes_only is not None:
        sizes_only.strip_(model)
    cfg.optim_wrapper.optimizer.lr = 0.0
    return model, build_optim_wrapper(model, cfg.optim_wrapper)


def image_channels(model: nn.Module) -> int:
    """Channels of a model's images: as many as its data preprocessor has means, or 3."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    return 3 if mean is None else mean.numel()


def random_batch(model: nn.Module, scope: str, size: int, height: int, width: int, seed: int = 0) -> dict:
    """Random uint8 images with random annotations, in the format of the data loader of the library ``scope``.

    Args:
        model: Used to find the number of classes, and the channels of the images.
        scope: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``.
        size: Number of images.
        height, width: Size of the images, pixels.
        seed: Seed of the random generator.

    Raises:
        ConfigError: ``scope`` is another library, or no module of the model has ``num_classes``.
    """
    has_stuff = any('semantic' in name or 'panoptic' in name for name, _ in model.named_modules())
    boxes = partial(_boxes, has_masks=predicts_masks(model), has_stuff=has_stuff)
    annotate = {'mmdet': boxes, 'mmseg': _pixels, 'mmpretrain': _label}.get(scope)
    if annotate is None:
        raise ConfigError(f'no random data for default_scope={scope!r}: choose mmdet, mmseg or mmpretrain')
    heads = [getattr(model, name) for name in ('bbox_head', 'roi_head', 'decode_head', 'head') if hasattr(model, name)]
    parts = (part for owner in (*heads, model) for part in owner.modules())
    classes = next((part.num_classes for part in parts if getattr(part, 'num_classes', None)), None)
    if classes is None:
        raise ConfigError(f'no random data for {type(model).__name__}: none of its modules has num_classes')
    generator = torch.Generator().manual_seed(seed)
    inputs, samples, channels = [], [], image_channels(model)
    for _ in range(size):
        inputs.append(torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8))
        samples.append(annotate(height, width, classes, generator))
    return {'inputs': torch.stack(inputs) if scope == 'mmpretrain' else inputs, 'data_samples': samples}


def _boxes(
    height: int, width: int, classes: int, generator: torch.Generator, has_masks: bool = False, has_stuff: bool = False
) -> object:
    from mmdet.structures import DetDataSample

    corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
    shape = (height, width)
    sample = DetDataSample(metainfo={'img_shape': shape, 'scale_factor': (1.0, 1.0)})
    labels = torch.randint(classes, (OBJECTS,), generator=generator)
    sample.gt_instances = InstanceData(bboxes=corners.flatten(1), labels=labels)
    if has_masks:
        sample.gt_instances.masks = box_masks(corners.flatten(1), height, width)
    if has_stuff:
        sample.gt_sem_seg = PixelData(sem_seg=torch.randint(2, (1, height, width), generator=generator))
    return sample


def _pixels(height: int, width: int, classes: int, generator: torch.Generator) -> object:
    from mmseg.structures import SegDataSample

    labels = torch.randint(classes, (1, height, width), generator=generator)
    return SegDataSample(gt_sem_seg=PixelData(data=labels))


def _label(height: int, width: int, classes: int, generator: torch.Generator) -> object:
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(torch.randint(classes, (1,), generator=generator))
