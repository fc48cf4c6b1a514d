"""The hook that initialises and updates the momentum copies of local heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmman.builder.model import mismatched_options
from mmman.engine.config_check import check_config
from mmman.engine.optim_wrapper import LocalLearningOptimWrapper
from mmman.engine.paramwise import separate_local_heads
from mmman.engine.pretrained import check_prefix, report_pretrained
from mmman.errors import CheckpointError, ConfigError
from mmman.local.blocks import localized_backbone
from mmman.local.local_head import LocalHead
from mmman.options import Count, Range, checked
from mmman.registry import HOOKS
from mmman.watchdog.hook import WatchdogHook


@HOOKS.register_module()
@checked('EMABiasHook')
class EMABiasHook(Hook):
    """Initialises the copies E and B of all local heads, updates E after every optimizer step, and logs every s_j.

    When training starts, E (momentum) and B (bias) are set to their source unit, after weight initialisation, pretrained
    weights and ``load_from``. Copies that the loaded checkpoint contains are kept, and a resumed run never resets them. After
    every iteration in which the optimizer stepped, ``E <- lerp(E, source, 1 - momentum)``.

    Args:
        momentum: m, from 0 (the copy equals its source) to 1 (the copy never changes). Paper: 0.995.
        interval: Number of optimizer steps between updates.

    Raises:
        ConfigError: The run isn't set up for local learning, or pretrained weights (``init_cfg``) don't fit the backbone.
        CheckpointError: The checkpoint to resume has different local heads.
    """

    priority = 'NORMAL'

    def __init__(self, momentum: Annotated[float, Range(0, 1)] = 0.995, interval: Count = 1) -> None:
        self.momentum = momentum
        self.interval = interval
        self._last_steps = 0
        self._loaded_checkpoint = False

    def before_run(self, runner: Runner) -> None:
        """Reject settings that local learning doesn't support. mmengine calls this before weights are initialised."""
        if type(runner).__name__ == 'FlexibleRunner':
            raise ConfigError(
                'FlexibleRunner strategies (FSDP, DeepSpeed, ColossalAI) are not supported: use Runner, and DDP to scale'
            )
        if runner.cfg.get('compile'):
            raise ConfigError(
                'cfg.compile compiles the whole training step, which contains local backward passes: remove it, and add '
                "dict(type='mmman.LocalCompileHook') to custom_hooks, which compiles units"
            )
        check_config(runner.cfg)
        watched = _is_stage(runner.model) or any(isinstance(hook, WatchdogHook) for hook in runner.hooks)
        if not watched and dist.is_initialized():
            runner.register_hook(WatchdogHook())  # has the lowest priority, so its own before_run still runs
        backbone = localized_backbone(_unwrap(runner.model))
        if isinstance(runner._train_loop, BaseLoop):  # a test run initialises and trains nothing
            _warn_about_mismatched_heads(runner.cfg)
            check_prefix(backbone)
            separate_local_heads(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep only the momentum copies that this checkpoint contains, not those that weight initialisation loaded.

        Local heads that are not initialised yet are initialised here, so that they have values if the checkpoint has none.
        """
        self._loaded_checkpoint = True
        _initialise_heads(runner)
        local = localized_backbone(_unwrap(runner.model)).local
        for head in local.values():
            head.transfer.is_loaded = False
        if runner._resume:
            check_local_heads(checkpoint['state_dict'], _unwrap(runner.model).state_dict())

    def before_train(self, runner: Runner) -> None:
        """Log which pretrained weights were loaded, and set copies to their source unless the checkpoint contains them."""
        if not isinstance(runner.optim_wrapper, LocalLearningOptimWrapper):
            raise ConfigError(
                f"a localised model requires optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', ...), "
                f'not {type(runner.optim_wrapper).__name__}; for AMP set its dtype option'
            )
        _initialise_heads(runner)
        backbone = localized_backbone(_unwrap(runner.model))
        if not self._loaded_checkpoint:
            report_pretrained(backbone)
        for head in backbone.local.values():
            head.transfer.init_from_(head.source.of(backbone), keep_loaded=self._loaded_checkpoint)
        self._last_steps = runner.optim_wrapper.steps
        if _is_stage(runner.model):
            for head in backbone.local.trained_heads():
                runner.model.comm.on_next_unit = partial(self._update_from_next_stage, head)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Update the copies if the optimizer stepped, and log the scales s_j."""
        backbone = localized_backbone(_unwrap(runner.model))
        heads = backbone.local.trained_heads()
        steps = runner.optim_wrapper.steps
        if steps != self._last_steps and steps % self.interval == 0 and not _is_stage(runner.model):
            for head in heads:
                head.transfer.ema_update_(head.source.of(backbone), self.momentum)
        self._last_steps = steps
        scales = {f'train/local/{head.block}/s': head.transfer.s for head in heads if head.transfer.s is not None}
        if scales:
            for name, value in zip(scales, torch.stack([*scales.values()]).tolist(), strict=True):
                runner.message_hub.update_scalar(name, value)

    def _update_from_next_stage(self, head: LocalHead, steps: int, unit: Mapping[str, Tensor]) -> None:
        """Update a copy in a pipeline: after each step, the next stage sends the state of its first unit."""
        if steps % self.interval == 0:
            head.transfer.ema_update_(unit, self.momentum)


def _warn_about_mismatched_heads(cfg: Config) -> None:
    model = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, Mapping) else None
    if not isinstance(backbone, Mapping) or 'local_head' not in backbone:
        return
    if mismatched := mismatched_options(model):
        print_log(
            f"local heads differ from the model's own head in {', '.join(mismatched)}: a config that changes the head has to "
            "change model.backbone.local_head too, or inherit type='mmman.LocalModel', whose local heads follow it",
            logger='current',
            level=logging.WARNING,
        )


def check_local_heads(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """Check that a checkpoint to resume has the same local heads as this run.

    Args:
        theirs: The checkpoint's state dict.
        ours: The model's state dict.

    Raises:
        CheckpointError: The local heads differ. The optimizer's state would then be loaded for the wrong parameters.
    """
    theirs, ours = ({key for key in state if '.local.' in key} for state in (theirs, ours))
    if ours != theirs:
        raise CheckpointError(
            f'cannot resume: the checkpoint has local heads on [{_heads(theirs)}], this config on [{_heads(ours)}], '
            f'and {len(ours ^ theirs)} keys differ, the first is {min(ours ^ theirs)}. '
            'Resume with the config that it was trained with, or start a new run from its weights: '
            'load_from without resume'
        )


def _initialise_heads(runner: Runner) -> None:
    """Initialise the local heads before training starts or resumes, if ``init_weights`` of the model didn't initialise them.

    If mmengine's ``BaseModule`` runs the initialisation, :class:`mmman.local.blocks.LocalBlocks` has already done it.
    """
    local = localized_backbone(_unwrap(runner.model)).local
    if local.is_init or not isinstance(runner._train_loop, BaseLoop):
        return
    local.init_weights()
    for value in local.state_dict().values():  # the runner has already broadcast the model
        broadcast(value)


def _is_stage(model: nn.Module) -> bool:
    """Whether this process trains a pipeline stage, whose copies are updated from what the next stage sends."""
    return hasattr(model, 'comm')


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _heads(keys: set[str]) -> str:
    return ', '.join(sorted({key.split('.local.')[1].split('.')[0] for key in keys})) or 'none'
