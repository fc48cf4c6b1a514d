"""Writes child configs of a dozen lines that train a stock config's model in less memory, and tests them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmman.analysis.dry_step import dry_step
from mmman.analysis.dummy_model import scope_of
from mmman.errors import ConfigError, LocalLearningError
from mmman.heads.dry_run import one_line
from mmman.planning.choice import Changes
from mmman.runtime.launch import type_name
from mmman.runtime.recipes import Recipe, recipes_for
from mmman.runtime.stock_config import StockConfig, read_text, unreadable_config

WRAPPER = 'mmman.LocalLearningOptimWrapper'

COMMENTS = {
    'num_blocks': 'gradient-isolated blocks of the backbone; 1: end-to-end training',
    'partition': 'the last unit of each block but the last',
    'recompute': 'computed again in the backward pass, not kept; the same numbers',
    'selective_recompute': 'computed again, except what is expensive to compute, which is kept; the same numbers',
    'transfer': 'a light bias in place of a second copy of the next unit',
    'local_head': 'the loss that trains a block: a light head',
    'with_cp': "the stock backbone's own activation checkpointing",
    'frozen_stages': 'asked for by --frozen-stages',
    'update': 'a block takes its optimizer step, and frees its gradients, before the next block runs',
    'images_per_chunk': 'neck and heads run on so many images at a time',
    'dtype': 'mixed precision: not the same numbers as in single precision',
    'batch_size': 'asked for by --batch; the learning rate is not scaled',
}


@dataclass
class ChildConfig:
    """A child config, its content, the backbone that it builds, its recipe, and the reasons for its settings."""

    text: str
    cfg: Config
    backbone: nn.Module
    recipe: Recipe
    reasons: list[str]


class _Source(str):
    """Source code, which is written as it is."""

    __repr__ = str.__str__


def localize(
    source: StockConfig, changes: Changes, folder: Path | None = None, dry_run: bool = True, recipe: Recipe | None = None
) -> ChildConfig:
    """Create a child of a stock config that trains by local learning.

    Args:
        source: The stock config.
        changes: What the child changes, with ``num_blocks`` in its options of ``mmman.LocalBackbone``.
        folder: The folder of the child. The path of its base is relative to this folder, and the child is read there. None:
            the base of a file is an absolute path.
        dry_run: Accept a local head only if a training step runs with it (:func:`mmman.analysis.dry_step.dry_step`).
        recipe: The local heads. Default: the recommended ones that the model supports.

    Raises:
        LocalLearningError: The config's backbone or head doesn't support local learning.
    """
    wrapper, why_wrapper = local_wrapper(source.cfg)
    changes = replace(changes, optim_wrapper=wrapper | changes.optim_wrapper)
    failures: list[str] = []
    for candidate in [recipe] if recipe else recipes_for(source.cfg, 'model' if source.is_new_style else '_base_.model'):
        text = child_text(source, folder, changes, candidate)
        child = read_child(source.name, text, folder)
        try:
            backbone = _build_backbone(child)
            dry_run_notes = run_dry_step(child, source.cfg) if dry_run else []
        except LocalLearningError as error:
            failures.append(str(error))
            continue
        reasons = [
            f'blocks: {backbone.local.plan}',
            f'local head: {candidate.why}',
            *_head_adaptations(backbone, candidate.local_head, source.cfg),
            why_wrapper,
        ]
        reasons += [*_kept_settings(child, source.cfg), *dry_run_notes]
        if 'bbox_head' in source.cfg.model:
            reasons += [f'not chosen: {failure}' for failure in dict.fromkeys(failures)]
        return ChildConfig(text, child, backbone, candidate, reasons)
    raise LocalLearningError(failures[-1])  # candidates are sorted best first: what the last one lacks, all of them lack


def child_text(
    source: StockConfig,
    folder: Path | None,
    changes: Changes,
    recipe: Recipe | None = None,
    batch: int | None = None,
    header: Sequence[str] = (),
) -> str:
    """Write a child config.

    Args:
        source: The stock config, from which the child inherits.
        folder: The folder of the child. See :meth:`StockConfig.inheritance_lines`.
        changes: What the child changes.
        recipe: The local heads, required for more than one block. None: the stock config is localised, and keeps its own.
        batch: Images per step. None: as in the stock config.
        header: Lines of a comment at the top.

    Returns:
        The source code of the config.
    """
    is_local = changes.num_blocks > 1 and recipe is not None
    base = 'model.backbone' if source.is_new_style else '_base_.model.backbone'
    backbone: dict[str, Any] = dict(changes.stock)
    if type_name(source.cfg.model.backbone) == 'LocalBackbone':
        options = ', '.join([f'{base}.backbone', *(f'{key}={value!r}' for key, value in changes.stock.items())])
        backbone = dict(changes.local) | ({'backbone': _Source(f'dict({options})')} if changes.stock else {})
    elif changes.local:
        options = ', '.join([base, *(f'{key}={value!r}' for key, value in changes.stock.items())])
        backbone = {} if source.is_new_style else {'_delete_': True}
        backbone |= {'type': 'mmman.LocalBackbone', 'backbone': _Source(f'dict({options})' if changes.stock else base)}
        backbone |= changes.local
        if is_local:
            backbone |= {'transfer': _Source(recipe.transfer), 'local_head': _Source(recipe.local_head)}
    wrapper = dict(changes.optim_wrapper)
    if 'type' not in wrapper and (is_local or wrapper):
        wrapper = {'type': WRAPPER, **wrapper}
    lines = [*(f'# {line}' for line in header), *([''] if header else []), source.inheritance_lines(folder)]
    if backbone:
        lines += ['', *_section(source, 'model', {'backbone': backbone})]
    if wrapper:
        lines += ['', *_section(source, 'optim_wrapper', wrapper)]
    if is_local:
        hooks = "*_base_.get('custom_hooks', []), "
        if source.is_new_style:
            hooks = '*custom_hooks, ' if 'custom_hooks' in source.cfg else ''
        lines += ['', f"custom_hooks = [{hooks}dict(type='mmman.EMABiasHook', momentum=0.995)]"]
    if batch is not None:
        lines += ['', *_section(source, 'train_dataloader', {'batch_size': batch})]
    return '\n'.join(lines) + '\n'


def _section(source: StockConfig, name: str, options: Mapping[str, Any]) -> list[str]:
    """The lines that set options of one top-level dict of the config."""
    if not source.is_new_style:
        return [f'{name} = dict(', *_options(options, 1), ')']
    if name == 'model' and 'type' in options['backbone']:
        return ["model['backbone'] = dict(", *_options(options['backbone'], 1), ')']
    if name == 'model':
        return ["model['backbone'].update(", *_options(options['backbone'], 1), ')']
    return [f'{name}.update(', *_options(options, 1), ')']


def _options(options: Mapping[str, Any], depth: int) -> list[str]:
    """The lines ``key=value,`` of keyword arguments, with comments."""
    indent, lines = '    ' * depth, []
    for key, value in options.items():
        if key in COMMENTS:
            lines.append(f'{indent}# {COMMENTS[key]}')
        if isinstance(value, dict):
            lines += [f'{indent}{key}=dict(', *_options(value, depth + 1), f'{indent}),']
        else:
            lines.append(f'{indent}{key}={value!r},')
    return lines


def local_wrapper(cfg: Config) -> tuple[dict[str, Any], str]:
    """Return the options of the optim wrapper for local learning, and what changes compared with the stock one.

    Raises:
        ConfigError: The stock optim wrapper can't be replaced.
    """
    stock = cfg.get('optim_wrapper') or ConfigDict()
    if 'optimizer' not in stock and 'constructor' not in stock:
        raise ConfigError('the config has no optim_wrapper with an optimizer; give the config of a training run')
    kind = type_name(stock, 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ConfigError(f'optim_wrapper.type={kind} cannot be replaced by {WRAPPER}')
    if kind == 'AmpOptimWrapper' and stock.get('dtype') != 'bfloat16':
        dtype = {} if {'dtype', 'loss_scale'} & stock.keys() else {'dtype': 'float16'}
        return {'type': WRAPPER, **dtype}, 'optim wrapper: mixed precision, optimizer and clipping are kept'
    return {'type': WRAPPER, 'update': 'immediate'}, 'optim wrapper: optimizer, clipping and param-wise options are kept'


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


def _kept_settings(child: Config, cfg: Config) -> list[str]:
    """Describe the settings of the stock config that remain in effect and that a user should know."""
    kept = []
    hooks = [type_name(hook) for hook in cfg.get('custom_hooks') or []]
    if hooks:
        kept.append(f'kept: {", ".join(hooks)}')
    frozen = child.model.backbone.backbone.get('frozen_stages', -1)
    minimum = 1 if type_name(cfg.model.backbone) in ('ConvNeXt', 'VisionTransformer') else 0
    if isinstance(frozen, int) and frozen >= minimum:
        kept.append(f'kept: frozen_stages={frozen}; frozen units have no local head and are not counted in K')
    return kept


def read_child(name: str, text: str, folder: Path | None) -> Config:
    """Read a child config from its text; ``name`` is that of its base."""
    try:
        return read_text(text, folder)
    except OSError as error:
        raise ConfigError(f'{folder or "the temporary folder"} cannot be written to ({error})') from error
    except Exception as error:  # a child can't refer to every value of a stock config
        raise unreadable_config(f'the child of {name}', error) from error


def _build_backbone(cfg: Config) -> nn.Module:
    scope = scope_of(cfg)
    init_default_scope(scope)  # also registers the library's modules
    with DefaultScope.overwrite_default_scope(scope):
        try:
            return MODELS.build(cfg.model.backbone)
        except LocalLearningError:
            raise
        except Exception as error:  # a stock backbone can raise any error
            name = type_name(cfg.model.backbone.backbone)
            raise ConfigError(f'{name} cannot be built, or run on a small image ({one_line(error)})') from error


def run_dry_step(child: Config, stock: Config) -> list[str]:
    """Run a training step and return what it showed; raise :class:`LocalLearningError` if it fails."""
    without_gradient, why_not_whole = dry_step(child, stock)
    reasons = [f'tested: {why_not_whole or "a training step on two small random images"}']
    if without_gradient:
        reasons.append(
            f'no gradient reaches {", ".join(without_gradient)}: under DistributedDataParallel set find_unused_parameters=True'
        )
    return reasons
