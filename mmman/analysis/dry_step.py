"""Run one training step of a localised config on a tiny random batch, to check that it trains at all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmman.analysis.dummy_model import (
    build_dummy_model,
    image_channels,
    library_of,
    model_config,
    random_batch,
    scope_of,
)
from mmman.errors import ConfigError, LocalLearningError, NonFiniteLossError
from mmman.heads.dry_run import BATCH_SIZE, describe_error, detection_samples, predicts_masks
from mmman.local.session import Session

SIDES = {'mmdet': (128, 384), 'mmseg': (128,), 'mmpretrain': (64, 224)}
"""Image sides to try for models of each library, pixels. If a model can't run on the first side, the next is tried."""


def dry_step(child: Config, stock: Config) -> tuple[list[str], str | None]:
    """Run the forward and backward passes of a localised model once, without downloading weights.

    If both the localised and the stock model fail, the model can't take a random batch (it needs texts, videos or the data of a
    teacher). Then only the backbone with its local heads is run.

    Args:
        child: The localised config.
        stock: The config that ``child`` was made from.

    Returns:
        Names of local heads' parameters that received no gradient; and the reason if the whole model could not be run, else
        None.

    Raises:
        LocalLearningError: The localised model fails and the stock model doesn't, or the local heads fail.
    """
    child, stock = _for_cpu(child), _for_cpu(stock)
    scope = library_of(child)
    sides = tuple(dict.fromkeys((*SIDES.get(scope, (128,)), *_own_sides(child.model.backbone.backbone))))
    try:
        return _first_that_runs(sides, lambda side: _step(child, scope, side)), None
    except (LocalLearningError, torch.OutOfMemoryError) as error:
        if not isinstance(error, NonFiniteLossError):
            raise
        failure: Exception = error
    except Exception as error:  # a model may fail in any way
        failure = error
    try:
        _first_that_runs(sides, lambda side: _stock_step(stock, scope, side))
    except Exception:
        why = f'the whole model was not run, because the stock model also fails on random data ({describe_error(failure)})'
        try:
            return _first_that_runs(sides, lambda side: _backbone_step(child, scope, side)), why
        except LocalLearningError:
            raise
        except Exception as error:
            raise ConfigError(f'the local heads fail in a first step ({describe_error(error)}), and {why}') from error
    raise ConfigError(f'the localised model fails in a first step, where the stock model does not ({describe_error(failure)})')


def _for_cpu(cfg: Config) -> Config:
    """Copy the config for a CPU and small images.

    Full precision, gradients that stay after a block's step, no batch augments, no teacher weights to download.
    """
    cfg = copy.deepcopy(cfg)
    wrapper = cfg.get('optim_wrapper', {})
    for name in ('dtype', 'loss_scale', 'update'):
        wrapper.pop(name, None)
    if getattr(kind := wrapper.get('type'), '__name__', kind) == 'AmpOptimWrapper':  # it requires a GPU
        wrapper.type = 'OptimWrapper'
    if 'teacher_ckpt' in cfg.model:
        cfg.model.teacher_ckpt = None
    for owner in (cfg, cfg.model):
        if (owner.get('data_preprocessor') or {}).get('batch_augments'):
            owner['data_preprocessor']['batch_augments'] = None  # batch augments pad to the training size
    cfg.default_scope = scope_of(cfg)
    return cfg


def _own_sides(backbone: ConfigDict) -> tuple[int, ...]:
    size = backbone.get('img_size')
    side = max(size) if isinstance(size, (list, tuple)) else size
    return (side,) if isinstance(side, int) else ()


def _first_that_runs(sides: tuple[int, ...], step: Callable[[int], list[str]]) -> list[str]:
    for side in sides[:-1]:
        try:
            return step(side)
        except LocalLearningError:
            raise
        except Exception:  # the next size may fit
            continue
    return step(sides[-1])


def _step(cfg: Config, scope: str, side: int) -> list[str]:
    model, optim_wrapper = build_dummy_model(copy.deepcopy(cfg), side, side)
    optim_wrapper.initialize_count_status(model, 0, 1)
    data = model.data_preprocessor(_batch(model, scope, side), training=True)
    with optim_wrapper.optim_context(model):
        loss, _ = model.parse_losses(model(**data, mode='loss'))
    optim_wrapper.backward(loss)
    return _without_gradient(model.backbone)


def _stock_step(cfg: Config, scope: str, side: int) -> list[str]:
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(model_config(cfg, side, side))).train()
    data = model.data_preprocessor(_batch(model, scope, side), training=True)
    model.parse_losses(model(**data, mode='loss'))[0].backward()
    return []


class _BackboneAlone(BaseModel):
    """A model that only runs its backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor') -> tuple[Tensor, ...]:
        return self.backbone(inputs)


def _backbone_step(cfg: Config, scope: str, side: int) -> list[str]:
    init_default_scope(cfg.default_scope)
    model = _BackboneAlone(revert_sync_batchnorm(MODELS.build(model_config(cfg, side, side).backbone))).train()
    local = model.backbone.local
    batch = _batch(model, scope, side)
    images = torch.stack([*batch['inputs']]).float() / 255
    with Session(model, local, lambda loss, block: loss.backward()):
        model(images, batch['data_samples'])
    return _without_gradient(model.backbone)


def _batch(model: nn.Module, scope: str, side: int) -> dict:
    if scope == 'mmdet':
        classes = next(part.num_classes for part in model.modules() if getattr(part, 'num_classes', None))
        images = torch.randint(256, (BATCH_SIZE, image_channels(model), side, side), dtype=torch.uint8)
        samples = detection_samples(side, classes, objects_per_side=1, masks=predicts_masks(model))
        return {'inputs': [*images], 'data_samples': samples}
    batch = random_batch(model, scope, BATCH_SIZE, side, side)
    shape = (side, side)
    for sample in batch['data_samples']:
        sample.set_metainfo({'img_shape': shape, 'ori_shape': shape, 'pad_shape': shape, 'batch_input_shape': shape})
    return batch


def _without_gradient(backbone: nn.Module) -> list[str]:
    return [f'local.{name}' for name, p in backbone.local.named_parameters() if p.requires_grad and p.grad is None]
