"""The hook that keeps the momentum copies of local heads."""

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

from mmman.builder.model import changed_options
from mmman.engine.config_check import check_config
from mmman.engine.optim_wrapper import LocalLearningOptimWrapper
from mmman.engine.paramwise import separate_local_heads
from mmman.engine.pretrained import check_prefix, report_pretrained
from mmman.errors import CheckpointError, MisuseError
from mmman.local.blocks import localized_backbone
from mmman.local.local_head import LocalHead
from mmman.options import Count, Range, checked
from mmman.registry import HOOKS
from mmman.watchdog.hook import WatchdogHook


@HOOKS.register_module()
@checked('EMABiasHook')
class EMABiasHook(Hook):
    """Starts the momentum copies and biases of all local heads, moves the copies after every step, logs every s_j.

    The copies start as what their source unit is when training starts: after weight init, pretrained weights and ``load_from``,
    unless the loaded checkpoint carries them; never on resume. Then ``E <- lerp(E, source, 1 - momentum)`` after every
    iteration on which the optimizer really stepped.

    Args:
        momentum: m, from 0 (the copy is the source) to 1 (it never moves). Paper: 0.995.
        interval: Update every that many optimizer steps.

    Raises:
        MisuseError: The run isn't set up for local learning, or pretrained weights (``init_cfg`` of the backbone) don't fit it.
        CheckpointError: The checkpoint to resume has other local heads.
    """

    priority = 'NORMAL'

    def __init__(self, momentum: Annotated[float, Range(0, 1)] = 0.995, interval: Count = 1) -> None:
        self.momentum = momentum
        self.interval = interval
        self._seen_steps = 0
        self._loaded_checkpoint = False

    def before_run(self, runner: Runner) -> None:
        """Refuse what local learning can't run under. mmengine calls this before weights are initialised."""
        if type(runner).__name__ == 'FlexibleRunner':
            raise MisuseError(
                'FlexibleRunner strategies (FSDP, DeepSpeed, ColossalAI) are not supported: use Runner, and DDP to scale'
            )
        if runner.cfg.get('compile'):
            raise MisuseError(
                'cfg.compile compiles the whole train step, which local backward passes break; call unit.compile() on units'
            )
        check_config(runner.cfg)
        watched = _is_stage(runner.model) or any(isinstance(hook, WatchdogHook) for hook in runner.hooks)
        if not watched and dist.is_initialized():
            runner.register_hook(WatchdogHook())  # of the lowest priority, so its own before_run follows
        backbone = localized_backbone(_unwrap(runner.model))
        if isinstance(runner._train_loop, BaseLoop):  # else this is a test run, which initialises and trains nothing
            _warn_of_changed_heads(runner.cfg)
            check_prefix(backbone)
            separate_local_heads(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Forget what weight initialisation loaded: only this checkpoint may bring the copies along.

        Local heads that nothing has initialised are initialised now, so that they have values where the checkpoint has none.
        """
        self._loaded_checkpoint = True
        _initialise_heads(runner)
        local = localized_backbone(_unwrap(runner.model)).local
        for head in local.values():
            head.transfer.is_loaded = False
        if runner._resume:
            check_local_heads(checkpoint['state_dict'], _unwrap(runner.model).state_dict())

    def before_train(self, runner: Runner) -> None:
        """Say what pretrained weights brought; make the copies exact where the checkpoint brought none."""
        if not isinstance(runner.optim_wrapper, LocalLearningOptimWrapper):
            raise MisuseError(
                f"a localised model needs optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', ...), "
                f'not {type(runner.optim_wrapper).__name__}; AMP is its dtype option'
            )
        _initialise_heads(runner)
        backbone = localized_backbone(_unwrap(runner.model))
        if not self._loaded_checkpoint:
            report_pretrained(backbone)
        for head in backbone.local.values():
            head.transfer.sync_(head.source.of(backbone), keep_loaded=self._loaded_checkpoint)
        self._seen_steps = runner.optim_wrapper.steps
        if _is_stage(runner.model):
            for head in backbone.local.trained():
                runner.model.comm.follow = partial(self._follow, head)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Move the copies where the optimizer stepped."""
        backbone = localized_backbone(_unwrap(runner.model))
        heads = backbone.local.trained()
        steps = runner.optim_wrapper.steps
        if steps != self._seen_steps and steps % self.interval == 0 and not _is_stage(runner.model):
            for head in heads:
                head.transfer.update_(head.source.of(backbone), self.momentum)
        self._seen_steps = steps
        scales = {f'train/local/{head.block}/s': head.transfer.s for head in heads if head.transfer.s is not None}
        if scales:
            for name, value in zip(scales, torch.stack([*scales.values()]).tolist(), strict=True):
                runner.message_hub.update_scalar(name, value)

    def _follow(self, head: LocalHead, steps: int, unit: Mapping[str, Tensor]) -> None:
        """In a pipeline the next stage sends what its first unit is after each of its steps."""
        if steps % self.interval == 0:
            head.transfer.update_(unit, self.momentum)


def _warn_of_changed_heads(cfg: Config) -> None:
    model = cfg.get('model')
    backbone = model.get('backbone') if isinstance(model, Mapping) else None
    if not isinstance(backbone, Mapping) or 'local_head' not in backbone:
        return
    if changed := changed_options(model):
        print_log(
            f"local heads differ from the model's own head in {', '.join(changed)}: a config that changes the head has to "
            "change model.backbone.local_head too, or inherit type='mmman.LocalModel', whose local heads follow it",
            logger='current',
            level=logging.WARNING,
        )


def check_local_heads(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """Check that a checkpoint to resume has the local heads of this run.

    Args:
        theirs: The checkpoint's weights.
        ours: The model's.

    Raises:
        CheckpointError: It has others. An optimizer's state would belong to other parameters then.
    """
    theirs, ours = ({key for key in state if '.local.' in key} for state in (theirs, ours))
    if ours != theirs:
        raise CheckpointError(
            f'cannot resume: the checkpoint has local heads on [{_heads(theirs)}], this config on [{_heads(ours)}], '
            f'and they differ in {len(ours ^ theirs)} keys, the first is {min(ours ^ theirs)}. '
            'Resume with the config that it was trained with, or start a new run from its weights: '
            'load_from without resume'
        )


def _initialise_heads(runner: Runner) -> None:
    """Before training starts or goes on: initialise the local heads where ``init_weights`` of the model didn't reach them.

    Where mmengine's ``BaseModule`` runs the initialisation, :class:`mmman.local.blocks.LocalBlocks` has taken care of it.
    """
    local = localized_backbone(_unwrap(runner.model)).local
    if local.is_init or not isinstance(runner._train_loop, BaseLoop):
        return
    local.init_weights()
    for value in local.state_dict().values():  # as the runner does with the model, which has happened by now
        broadcast(value)


def _is_stage(model: nn.Module) -> bool:
    """Whether this process trains one stage of a pipeline, whose copies move by what the next stage sends."""
    return hasattr(model, 'comm')


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _heads(keys: set[str]) -> str:
    return ', '.join(sorted({key.split('.local.')[1].split('.')[0] for key in keys})) or 'none'
