"""One rule for learning rates by parameter: to an optim wrapper's constructor, local heads are no part of the backbone.

A stock config fine-tunes a pretrained backbone slowly (``'backbone': dict(lr_mult=0.1)``, or a layer-wise decay). Local heads
are new layers, as the model's own head is, but their parameters' names begin with ``backbone.local``. So the constructor is run
once more with the local heads beside the backbone.
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

LOCAL_HEADS = 'local_heads'
"""The name of the local heads, beside the backbone, that constructors see."""
_KEY = 'backbone.local'  # how a config names them in paramwise_cfg.custom_keys


def build_local_optim_wrapper(model: nn.Module, cfg: dict) -> OptimWrapper:
    """Build an optim wrapper by its constructor, to which the local heads are a module beside the backbone.

    What ``paramwise_cfg`` says of the backbone doesn't apply to local heads; what it says of all layers (``norm_decay_mult``)
    and what its ``custom_keys`` say of ``backbone.local`` does.

    Args:
        model: A localised model, or its wrapper.
        cfg: The config of the optim wrapper.

    Returns:
        The optim wrapper. Its parameter groups have the order of the model's parameters.
    """
    cfg = copy.deepcopy(cfg)
    if keys := (cfg.get('paramwise_cfg') or {}).get('custom_keys'):
        cfg['paramwise_cfg']['custom_keys'] = {key.replace(_KEY, LOCAL_HEADS): value for key, value in keys.items()}
    model = model.module if is_model_wrapper(model) else model
    order = {parameter: i for i, parameter in enumerate(model.parameters())}
    with _beside_backbone(model):
        wrapper = build_optim_wrapper(model, cfg)
    wrapper.optimizer.param_groups.sort(key=lambda group: min(order[parameter] for parameter in group['params']))
    return wrapper


def separate_local_heads(runner: Runner) -> None:
    """Give local heads their own learning rates and weight decay in a run that is set up, and log which.

    Nothing happens where the constructor has given them these already, as without ``paramwise_cfg``.

    Args:
        runner: Before its first iteration, with optim wrapper and schedulers built.
    """
    cfg = runner.cfg.get('optim_wrapper')
    if not cfg or not (cfg.get('paramwise_cfg') or cfg.get('constructor')):
        return
    wrapper = build_local_optim_wrapper(runner.model, cfg)
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    names = [name for name, _ in runner.model.named_parameters() if '.local.' in name]
    before, after = (
        _options(runner.model, names, optimizer) for optimizer in (runner.optim_wrapper.optimizer, wrapper.optimizer)
    )
    if before == after:
        return
    runner.optim_wrapper = wrapper
    if runner.param_schedulers is not None and runner.cfg.get('param_scheduler'):
        runner.param_schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
    rates = sorted({options['lr'] for options in after.values()})
    print_log(
        f'paramwise_cfg: local heads are no part of the backbone; they train at a learning rate of '
        f"{', '.join(f'{rate:g}' for rate in rates)}. To change it, set custom_keys={{'{_KEY}': dict(lr_mult=...)}}",
        logger='current',
    )


@contextmanager
def _beside_backbone(model: nn.Module) -> Iterator[None]:
    backbone = localized_backbone(model)
    local = backbone.local
    del backbone.local
    model.add_module(LOCAL_HEADS, local)
    try:
        yield
    finally:
        delattr(model, LOCAL_HEADS)
        backbone.local = local


def _options(model: nn.Module, names: list[str], optimizer: Optimizer) -> dict[str, dict]:
    """The optimizer's options for each of the named parameters, without what a scheduler has done to them."""
    found = {}
    for group in optimizer.param_groups:
        options = {'lr': group.get('initial_lr', group['lr']), 'weight_decay': group.get('weight_decay')}
        found |= dict.fromkeys(group['params'], options)
    parameters = dict(model.named_parameters())
    return {name: found[parameters[name]] for name in names if parameters[name] in found}
