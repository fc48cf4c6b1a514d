"""Checks all of mmman's options in a config before anything is built from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import BaseLoop, Runner

import mmman.registry as registries
from mmman.builder.backbone import LocalBackbone, check_backbone_options
from mmman.errors import ConfigError
from mmman.local.local_head import INJECTED_ARGS, LocalHead
from mmman.options import Positive, Range, check_options, checked, option_parameters

_REGISTRIES = (
    registries.MODELS,
    registries.MODEL_WRAPPERS,
    registries.OPTIM_WRAPPERS,
    registries.HOOKS,
    registries.RUNNERS,
    registries.DATASETS,
    registries.LOG_PROCESSORS,
    registries.LOOPS,
    registries.TRANSFORMS,
)


@checked('pipeline')
@dataclass(frozen=True)
class PipelineOptions:
    """Options of ``cfg.pipeline``.

    Attributes:
        staleness: S, the number of batches that a stage may be ahead of the next one.
        timeout: Seconds without a heartbeat after which a process is considered lost and the job ends.
    """

    staleness: Annotated[int, Range(0)] = 2
    timeout: Positive = 120.0


def check_config(cfg: Config | Mapping[str, Any]) -> None:
    """Check every mmman component that a config names, and reject options in places where nothing reads them.

    Args:
        cfg: The complete config, as passed to a runner.

    Raises:
        ConfigError: An option is invalid. The message gives its place in the config and says what to change.
    """
    cfg = dict(cfg.items())  # a Config is not a Mapping
    components = [*_find_components(cfg, '')]
    for where, node in components:
        if _resolve_component(node['type']) is None:
            raise ConfigError(f'{where}.type={node["type"]!r}: {_unknown_name(node["type"])}')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        for where, node in components:
            _check_component(_resolve_component(node['type']), node, where)
    _check_hooks(cfg)
    _check_pipeline(cfg)
    _check_misplaced_options(cfg)


def _check_component(component: Any, node: Mapping[str, Any], where: str) -> None:
    not_passed = ('type', '_scope_', *(('optimizer', 'constructor', 'paramwise_cfg') if _is_a(component, OptimWrapper) else ()))
    options = {name: value for name, value in node.items() if name not in not_passed}
    if component is LocalBackbone:
        check_backbone_options(options, where)
    elif _is_a(component, BaseLoop):
        check_options(component, options, where, injected=('runner', 'dataloader'))
    elif _is_a(component, LocalHead):
        check_options(component, options, where, injected=INJECTED_ARGS)
    elif not _is_a(component, Runner):
        check_options(component, options, where)


def _find_components(node: Any, where: str) -> Iterator[tuple[str, Mapping]]:
    """Yield the place and content of every dict in ``node`` whose ``type`` belongs to mmman."""
    if isinstance(node, Mapping):
        if _is_ours(node.get('type')):
            yield where, node
        for name, value in node.items():
            yield from _find_components(value, f'{where}.{name}' if where else str(name))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _find_components(value, f'{where}[{index}]')


def _is_ours(kind: Any) -> bool:
    name = kind if isinstance(kind, str) else f'{getattr(kind, "__module__", "")}.'
    return name.startswith('mmman.')


def _resolve_component(kind: Any) -> Any:
    if not isinstance(kind, str):
        return kind
    return _registered().get(kind.removeprefix('mmman.').rpartition('.')[-1])


def _registered() -> dict[str, Any]:
    """Return everything that a config can name with the scope ``mmman``, by name."""
    for registry in _REGISTRIES:
        registry.import_from_location()
    return {name: component for registry in _REGISTRIES for name, component in registry.module_dict.items()}


def _unknown_name(kind: str) -> str:
    known = sorted(_registered())
    near = difflib.get_close_matches(kind.removeprefix('mmman.'), known, 1)
    return 'mmman has no such component; ' + (f'did you mean mmman.{near[0]}?' if near else f'it has {", ".join(known)}')


def _is_a(component: Any, base: type) -> bool:
    return isinstance(component, type) and issubclass(component, base)


def _check_hooks(cfg: Mapping[str, Any]) -> None:
    hooks = [*(cfg.get('custom_hooks') or ()), *(cfg.get('default_hooks') or {}).values()]
    hooks = [hook for hook in hooks if isinstance(hook, Mapping)]
    count = sum(_name(hook.get('type')) == 'EMABiasHook' for hook in hooks)
    if count > 1:
        raise ConfigError(f'the config has {count} mmman.EMABiasHook, and each would update the momentum copies: keep one')


def _check_pipeline(cfg: Mapping[str, Any]) -> None:
    options, is_pipeline = cfg.get('pipeline'), _name(cfg.get('runner_type')) == 'PipelineRunner'
    if options is not None and is_pipeline:
        check_options(PipelineOptions, options, 'pipeline')
    known = option_parameters(PipelineOptions)
    if isinstance(options, Mapping) and not is_pipeline and known.keys() & options.keys():
        raise ConfigError("pipeline has no effect without runner_type='mmman.PipelineRunner': set it, or remove pipeline")


def _check_misplaced_options(cfg: Mapping[str, Any]) -> None:
    """Reject options of the backbone or the optim wrapper that are set at the top level of the config, or in its model.

    A config may use such a name for a variable at its top level if the value equals the option's.
    """
    model = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, Mapping) else None
    if not (isinstance(backbone, Mapping) and _resolve_component(backbone.get('type')) is LocalBackbone):
        return
    wrapper = cfg.get('optim_wrapper') or {}
    owners = [
        ('model.backbone', backbone, {'num_blocks', 'local_head', 'partition', 'transfer', 'recompute', 'selective_recompute'}),
        ('optim_wrapper', wrapper, {'clip_scope', 'images_per_chunk', 'cuda_graphs', 'loss_scale'}),
    ]
    for where, owner, names in owners:
        for place, holder in (('', cfg), ('model.', model)):
            for name in sorted(names & holder.keys()):
                if place or holder[name] != owner.get(name):
                    raise ConfigError(f'{place}{name} has no effect: set {where}.{name} instead')


def _name(kind: Any) -> str:
    return kind.rpartition('.')[-1] if isinstance(kind, str) else getattr(kind, '__name__', '')
