"""Excludes local heads from the learning rates and weight decay that ``paramwise_cfg`` sets for the backbone.

A stock config often fine-tunes a pretrained backbone at a lower learning rate (``'backbone': dict(lr_mult=0.1)``, or a
layer-wise decay). Local heads are new layers, like the model's own head, but their parameter names begin with
``backbone.local``. This module therefore runs the constructor again with the local heads moved out of the backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from mmman.local.blocks import localized_backbone
from mmman.local.transfer import MomentumTransfer

LOCAL_HEADS = 'local_heads'
"""The name under which the constructor sees the local heads, as a sibling of the backbone."""
_TRAINED_COPY = 'trained_copy'
_CONFIG_KEY = 'backbone.local'  # the name of the local heads in paramwise_cfg.custom_keys
_SEEN_NAMES = {_CONFIG_KEY: LOCAL_HEADS, 'transfer.bias': f'transfer.{_TRAINED_COPY}'}
"""Names in custom keys, and the names that the constructor sees. B is a copy of a unit, and a key for biases (``'.bias'``, in
many stock configs) would match all of its weights by its name."""


def build_local_optim_wrapper(model: nn.Module, cfg: dict) -> OptimWrapper:
    """Build an optim wrapper with its constructor, which sees the local heads as a sibling of the backbone.

    Settings of ``paramwise_cfg`` for the backbone, by ``custom_keys`` or by the depth of a layer, don't apply to local heads.
    Settings for all layers (``norm_decay_mult``), ``custom_keys`` for ``backbone.local`` and those for a kind of parameter
    (``relative_position_bias_table``) do, and ``head`` matches every local head as it does the model's own.

    Args:
        model: A localised model, or its wrapper.
        cfg: The config of the optim wrapper.

    Returns:
        The optim wrapper. Its parameter groups are in the order of the model's parameters.
    """
    cfg = copy.deepcopy(cfg)
    if keys := (cfg.get('paramwise_cfg') or {}).get('custom_keys'):
        cfg['paramwise_cfg']['custom_keys'] = {_seen_name(key): value for key, value in keys.items()}
    model = model.module if is_model_wrapper(model) else model
    order = {parameter: i for i, parameter in enumerate(model.parameters())}
    with _local_heads_outside_backbone(model):
        wrapper = build_optim_wrapper(model, cfg)
    wrapper.optimizer.param_groups.sort(key=lambda group: min(order[parameter] for parameter in group['params']))
    return wrapper


def separate_local_heads(runner: Runner) -> None:
    """Give the local heads of a run their own learning rates and weight decay, and log the rates.

    Does nothing if the local heads already have these values, for example without ``paramwise_cfg``.

    Args:
        runner: The runner, before its first iteration, with optim wrapper and schedulers built.
    """
    cfg = runner.cfg.get('optim_wrapper')
    if not cfg or not (cfg.get('paramwise_cfg') or cfg.get('constructor')):
        return
    wrapper = build_local_optim_wrapper(runner.model, cfg)
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    names = [name for name, _ in runner.model.named_parameters() if '.local.' in name]
    before, after = (
        _initial_options(runner.model, names, optimizer) for optimizer in (runner.optim_wrapper.optimizer, wrapper.optimizer)
    )
    if before == after:
        return
    runner.optim_wrapper = wrapper
    if runner.param_schedulers is not None and runner.cfg.get('param_scheduler'):
        runner.param_schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
    rates = sorted({options['lr'] for options in after.values()})
    print_log(
        f'paramwise_cfg: settings of the backbone do not apply to local heads; they train at a learning rate of '
        f"{', '.join(f'{rate:g}' for rate in rates)}. To change it, set custom_keys={{'{_CONFIG_KEY}': dict(lr_mult=...)}}",
        logger='current',
    )


@contextmanager
def _local_heads_outside_backbone(model: nn.Module) -> Iterator[None]:
    """Context in which the local heads are a child of the model, not of its backbone."""
    backbone = localized_backbone(model)
    local = backbone.local
    transfers = [module for module in local.modules() if isinstance(module, MomentumTransfer) and module.bias is not None]
    del backbone.local
    model.add_module(LOCAL_HEADS, local)
    for transfer in transfers:
        transfer.add_module(_TRAINED_COPY, transfer._modules.pop('bias'))
    try:
        yield
    finally:
        for transfer in transfers:
            transfer.add_module('bias', transfer._modules.pop(_TRAINED_COPY))
        delattr(model, LOCAL_HEADS)
        backbone.local = local


def _seen_name(key: str) -> str:
    for name, seen in _SEEN_NAMES.items():
        key = key.replace(name, seen)
    return key


def _initial_options(model: nn.Module, names: list[str], optimizer: Optimizer) -> dict[str, dict]:
    """Return the initial learning rate and the weight decay of each named parameter."""
    found = {}
    for group in optimizer.param_groups:
        options = {'lr': group.get('initial_lr', group['lr']), 'weight_decay': group.get('weight_decay')}
        found |= dict.fromkeys(group['params'], options)
    parameters = dict(model.named_parameters())
    return {name: found[parameters[name]] for name in names if parameters[name] in found}
