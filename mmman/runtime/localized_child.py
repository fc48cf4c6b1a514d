"""Writes a child config of a dozen lines that trains a stock config's model with MAN++, and tests it with a training step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmman.analysis.dry_step import dry_step
from mmman.errors import ConfigError, LocalLearningError
from mmman.heads.dry_run import one_line
from mmman.runtime.launch import type_name
from mmman.runtime.stock_config import StockConfig, read_text, unreadable_config

DENSE = "dict(type='mmman.DetLocalHead', bbox_head={model}.bbox_head{train_cfg})"
TWO_STAGE = "dict(type='mmman.DetLocalHead', num_classes={num_classes})"
SEGMENTATION = "dict(type='mmman.SegLocalHead', decode_head={model}.decode_head)"
CLASSIFICATION = "dict(type='mmman.{kind}', head={head})"

CHILD = """\
{inheritance_lines}

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks={num_blocks},
        partition={partition!r},
        local_head={local_head},
    )
)
optim_wrapper = dict({optim_wrapper})
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
"""
NEW_STYLE_CHILD = """\
{inheritance_lines}

model['backbone'] = dict(
    type='mmman.LocalBackbone',
    backbone=model['backbone'],
    num_blocks={num_blocks},
    partition={partition!r},
    local_head={local_head},
)
optim_wrapper.update({optim_wrapper})
custom_hooks = [{hooks}dict(type='mmman.EMABiasHook', momentum=0.995)]
"""


@dataclass
class ChildConfig:
    """A child config, the backbone that it builds, and the reasons for its settings."""

    text: str
    backbone: nn.Module
    reasons: list[str]


def localize(
    stock: str, num_blocks: int, partition: str | list[str] = 'stage', folder: Path | None = None, dry_run: bool = True
) -> ChildConfig:
    """Create the child of a stock config.

    Args:
        stock: ``library::path`` of a library's config, or the path of a file.
        num_blocks: K.
        partition: See :func:`mmman.partition.plan_blocks`.
        folder: The folder of the child. The path of its base is relative to this folder, and the child is read there. None:
            the base of a file is an absolute path.
        dry_run: Accept a local head only if a training step runs with it (:func:`mmman.analysis.dry_step.dry_step`).

    Raises:
        LocalLearningError: The config can't be read, or its backbone or head doesn't support local learning.
    """
    source = StockConfig.read(stock)
    cfg = source.cfg
    _check(source)
    wrapper, why_wrapper = _optim_wrapper(cfg)
    inheritance_lines = source.inheritance_lines(folder)
    failures: list[str] = []
    for local_head, why_head in _local_heads(cfg, 'model' if source.is_new_style else '_base_.model'):
        text = (NEW_STYLE_CHILD if source.is_new_style else CHILD).format(
            inheritance_lines=inheritance_lines,
            num_blocks=num_blocks,
            partition=partition,
            local_head=local_head,
            optim_wrapper=wrapper,
            hooks='*custom_hooks, ' if 'custom_hooks' in cfg else '',
        )
        child = _read(stock, text, folder)
        try:
            backbone = _build_backbone(child)
            dry_run_notes = _run_dry_step(child, cfg) if dry_run else []
        except LocalLearningError as error:
            failures.append(str(error))
            continue
        reasons = [
            f'blocks: {backbone.local.plan}',
            f'local head: {why_head}',
            *_head_adaptations(backbone, local_head, cfg),
            why_wrapper,
        ]
        reasons += [*_kept_settings(cfg), *dry_run_notes]
        if 'bbox_head' in cfg.model:
            reasons += [f'not chosen: {failure}' for failure in failures]
        return ChildConfig(text, backbone, reasons)
    if failures:  # candidates are sorted best first: what the last one lacks, all of them lack
        raise LocalLearningError(failures[-1])
    raise LocalLearningError(
        f'no local head is known for {type_name(cfg.model)}, which has no bbox_head, roi_head, decode_head or head that sets '
        'num_classes; write the child by hand, with a local_head of your choice'
    )


def _check(source: StockConfig) -> None:
    model = source.cfg.get('model')
    if not isinstance(model, dict) or not isinstance(model.get('backbone'), dict) or 'type' not in model.backbone:
        inner = next((name for name in ('detector', 'model') if isinstance(model, dict) and name in model), None)
        advice = '; give the config of a detector, segmentor or classifier'
        if inner:
            advice = f', only model.{inner}.backbone: give the config of the {inner} without the wrapper'
        raise ConfigError(f'{source.name} has no model.backbone{advice}')
    if type_name(model.backbone) == 'LocalBackbone':
        raise ConfigError(f'{source.name} is already localised: give a stock config')


def _local_heads(cfg: Config, model: str) -> list[tuple[str, str]]:
    """Return candidate local heads, best first, each with its reason. ``model`` is the name of the model in the child."""
    stock = cfg.model
    if 'decode_head' in stock:
        return [(SEGMENTATION.format(model=model), "FCN, with the classes, losses and sampler of the model's decode_head")]
    if 'bbox_head' in stock:
        train_cfg = f', train_cfg={model}.train_cfg' if stock.get('train_cfg') else ''
        kind = type_name(stock.bbox_head)
        dense = (DENSE.format(model=model, train_cfg=train_cfg), f"the model's own {kind}, two convolutions a tower")
        retina = TWO_STAGE.format(num_classes=f'{model}.bbox_head.num_classes')
        why = f"RetinaNet's, because {kind} cannot be one"
        return [dense, *([(retina, why)] if 'num_classes' in stock.bbox_head else [])]
    if 'roi_head' in stock and 'bbox_head' in stock.roi_head:
        index = '[0]' if isinstance(stock.roi_head.bbox_head, (list, tuple)) else ''
        number = f'{model}.roi_head.bbox_head{index}.num_classes'
        return [(TWO_STAGE.format(num_classes=number), "RetinaNet's, because the detector has no dense head with classes")]
    for name, number in (('mask_head', 'num_classes'), ('panoptic_head', 'num_things_classes')):
        if number in (stock.get(name) or {}):
            number = f'{model}.{name}.{number}'
            return [(TWO_STAGE.format(num_classes=number), f"RetinaNet's, because the {name} predicts masks and no boxes")]
    if 'head' in stock and isinstance(stock.head, dict):
        head, why = f'{model}.head', f"the model's own {type_name(stock.head)}"
        if 'num_classes' not in stock.head and stock.backbone.get('num_classes', 0) > 0:
            loss = f', loss={model}.head.loss' if 'loss' in stock.head else ''
            head = f"dict(type='mmpretrain.LinearClsHead', num_classes={model}.backbone.num_classes{loss})"
            why = "a linear classifier with the model's loss, because its own classifier is in the backbone"
        return [
            (CLASSIFICATION.format(kind='ViTLocalHead', head=head), f'one more layer, class token or mean, {why}'),
            (CLASSIFICATION.format(kind='DGLLocalHead', head=head), f"DGL's network, {why}"),
        ]
    return []


def _head_adaptations(backbone: nn.Module, local_head: str, cfg: Config) -> list[str]:
    """Describe how the local heads differ from the head in the config: replaced classes and frozen parameters."""
    reasons = []
    for head in backbone.local.values():
        built = type(getattr(head, 'dense_head', None)).__name__
        if 'bbox_head=' in local_head and (own := type_name(cfg.model.bbox_head)) != built:
            reasons.append(f'local head: {built} replaces {own}, whose loss involves another network')
        frozen = [name for name, p in head.named_parameters() if not p.requires_grad and not name.startswith('transfer.')]
        if frozen:
            reasons.append(f'frozen after {head.unit}, because the local loss does not train them: {", ".join(frozen)}')
    return [*dict.fromkeys(reasons)]


def _optim_wrapper(cfg: Config) -> tuple[str, str]:
    """Return the arguments of the child's optim wrapper, and what changes compared with the stock one."""
    stock = cfg.get('optim_wrapper') or ConfigDict()
    if 'optimizer' not in stock and 'constructor' not in stock:
        raise ConfigError('the config has no optim_wrapper with an optimizer; give the config of a training run')
    kind = type_name(stock, 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ConfigError(f'optim_wrapper.type={kind} cannot be replaced by mmman.LocalLearningOptimWrapper')
    wrapper = "type='mmman.LocalLearningOptimWrapper'"
    if kind == 'AmpOptimWrapper' and not {'dtype', 'loss_scale'} & stock.keys():
        return (
            f"{wrapper}, dtype='float16'",
            'optim wrapper: mixed precision is an option of the local one; optimizer and clipping are kept',
        )
    return wrapper, 'optim wrapper: optimizer, clipping and param-wise options are kept'


def _kept_settings(cfg: Config) -> list[str]:
    """Describe the settings of the stock config that remain in effect and that a user should know."""
    kept = []
    hooks = [type_name(hook) for hook in cfg.get('custom_hooks') or []]
    if hooks:
        kept.append(f'kept: {", ".join(hooks)}')
    frozen = cfg.model.backbone.get('frozen_stages', -1)
    minimum = 1 if type_name(cfg.model.backbone) in ('ConvNeXt', 'VisionTransformer') else 0
    if isinstance(frozen, int) and frozen >= minimum:
        kept.append(f'kept: frozen_stages={frozen}; frozen units have no local head and are not counted in K')
    return kept


def _read(name: str, text: str, folder: Path | None) -> Config:
    try:
        return read_text(text, folder)
    except OSError as error:
        raise ConfigError(f'{folder or "the temporary folder"} cannot be written to ({error})') from error
    except Exception as error:  # a child can't refer to every value of a stock config
        raise unreadable_config(f'the child of {name}', error) from error


def _build_backbone(cfg: Config) -> nn.Module:
    scope = cfg.get('default_scope') or 'mmengine'
    init_default_scope(scope)  # also registers the library's modules
    with DefaultScope.overwrite_default_scope(scope):
        try:
            return MODELS.build(cfg.model.backbone)
        except LocalLearningError:
            raise
        except Exception as error:  # a stock backbone can raise any error
            name = type_name(cfg.model.backbone.backbone)
            raise ConfigError(f'{name} cannot be built, or run on a small image ({one_line(error)})') from error


def _run_dry_step(child: Config, stock: Config) -> list[str]:
    """Run a training step and return what it showed; raise :class:`LocalLearningError` if it fails."""
    without_gradient, why_not_whole = dry_step(child, stock)
    reasons = [f'tested: {why_not_whole or "a training step on two small random images"}']
    if without_gradient:
        reasons.append(
            f'no gradient reaches {", ".join(without_gradient)}: under DistributedDataParallel set find_unused_parameters=True'
        )
    return reasons
