"""Runner of pipeline parallel training, one process per block. Selected by ``runner_type='mmman.PipelineRunner'``."""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import convert_sync_batchnorm, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from torch import nn

from mmman.engine.config_check import PipelineOptions
from mmman.errors import ConfigError
from mmman.parallel.pipeline.loop import StageLoop
from mmman.parallel.pipeline.stage import PipelineStage
from mmman.parallel.pipeline.stage_rank import NO_TIMEOUT, join_replicas, rendezvous
from mmman.registry import RUNNERS
from mmman.runtime.launch import type_name
from mmman.watchdog.monitor import Watchdog

LATER_STAGE_HOOKS = ('EMABiasHook',)
"""Hooks of the config that run on every stage. All others run on the first stage only."""


@RUNNERS.register_module()
class PipelineRunner(Runner):
    """Trains a localised model with one block per process (PPLL, Algorithm 1 of the paper), in D replicas.

    The first stage is an ordinary run with its loops, hooks, schedulers, evaluators and log. It loads the data. All other
    stages (:class:`StageLoop`) use its batches and learning rates. There are as many stages as the model has blocks: K
    processes form one replica, D * K processes form D replicas. Options are in ``cfg.pipeline``:

    - ``staleness`` (default 2): S, the number of batches that a stage may be ahead of the next one. The momentum copies of a
      block follow the state that the next block's first unit had exactly S updates ago, so that the run is reproducible.
    - ``timeout`` (default 120): seconds without a heartbeat after which a process is considered lost and the job ends.

    Evaluation and checkpoints need the whole model. The first stage gathers it, in the format of an ordinary run.

    Attributes:
        stage_rank: Position of this process.
        gathered: Contents of the later stages while a checkpoint is saved, else empty.

    Raises:
        ConfigError: The number of processes does not fit the blocks, or an option is not supported by a pipeline.
    """

    def __init__(self, model: dict, work_dir: str, launcher: str = 'none', cfg: dict | None = None, **kwargs) -> None:
        options = PipelineOptions(**((cfg or {}).get('pipeline') or {}))
        self._staleness = options.staleness
        self.stage_rank, self._store = rendezvous(launcher, _count_blocks(model))
        join_replicas(self.stage_rank, self._store)
        self._watchdog = Watchdog(
            self.stage_rank.rank,
            self.stage_rank.world_size,
            self._store.clone(),
            options.timeout,
            name=lambda rank: str(self.stage_rank.at(rank)),
            job='pipeline',
        )
        kwargs['randomness'] = self._agree_on_seed(dict(kwargs.get('randomness') or {'seed': None}))
        if not self.stage_rank.is_first:
            work_dir = f'{work_dir}/stages/{self.stage_rank.stage}'
            kwargs |= _later_stage_options()
        self.gathered: list[dict] = []
        launcher = launcher if self.stage_rank.replicas > 1 else 'none'
        self._watchdog.start()
        with self._watchdog.reporting():
            super().__init__(model, work_dir, launcher=launcher, cfg=cfg, **kwargs)
            if any(type(hook).__name__ == 'EMAHook' for hook in self.hooks):
                raise ConfigError(
                    'EMAHook averages a whole model, but a stage holds one block only: remove it, or train without pipeline'
                )

    def train(self) -> nn.Module:
        """Train, and return the model. On the first stage the returned model is complete."""
        with self._watchdog.reporting():
            self.model.comm.connect(self._store, self._watchdog)
            model = super().train()
            self.model.comm.close()
        self._watchdog.leave()
        return model

    def dump_config(self) -> None:
        """Write the config on the first stage only."""
        if self.stage_rank.is_first:
            super().dump_config()

    def register_hooks(self, default_hooks: dict | None = None, custom_hooks: list | None = None) -> None:
        """Register the config's hooks; on later stages only those in :data:`LATER_STAGE_HOOKS`."""
        if self.stage_rank.is_first:
            super().register_hooks(default_hooks, custom_hooks)
        else:
            names = [type(hook).__name__ if isinstance(hook, Hook) else type_name(hook) for hook in custom_hooks or []]
            kept = [hook for hook, name in zip(custom_hooks or [], names, strict=True) if name in LATER_STAGE_HOOKS]
            self.register_custom_hooks(kept)
        self.register_hook(_WholeModelHook())

    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **kwargs) -> MMLogger:
        """Build the logger. A later stage writes its own log file, and only warnings and errors to the terminal."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        if not self.stage_rank.is_first:
            for handler in logger.handlers:
                if type(handler) is logging.StreamHandler:
                    handler.setLevel(logging.WARNING)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model in a :class:`PipelineStage`.

        Until training starts the model stays complete, in host memory: every stage initialises and loads all of it.

        Raises:
            ConfigError: The model is already wrapped.
        """
        if is_model_wrapper(model):
            raise ConfigError('PipelineRunner wraps the model itself: pass a model without a wrapper')
        if self.stage_rank.replicas == 1:
            model = revert_sync_batchnorm(model)
        elif sync_bn := self.cfg.get('sync_bn'):
            model = convert_sync_batchnorm(model, sync_bn)
        return PipelineStage(model, self.stage_rank, self._staleness)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the config's loop on the first stage, and a :class:`StageLoop` of the same length on the others."""
        if self.stage_rank.is_first:
            loop = super().build_train_loop(loop)
            plan = (loop.max_iters, getattr(loop.dataloader.dataset, 'metainfo', None))
            if self.stage_rank.rank == 0:
                self._store.set('loop', pickle.dumps((plan, _random_state())))
            return loop
        self._store.wait(['loop'], NO_TIMEOUT)
        plan, state = pickle.loads(self._store.get('loop'))
        # Building a data loader may draw random numbers, but all stages must initialise the same weights.
        _set_random_state(state)
        return StageLoop(self, *plan)

    def build_optim_wrapper(self, optim_wrapper: dict | OptimWrapper) -> OptimWrapper:
        """Build the optim wrapper, and refuse options that need the gradients of all stages.

        Raises:
            ConfigError: A loss scaler, or clipping with ``clip_scope='global'``.
        """
        wrapper = super().build_optim_wrapper(optim_wrapper)
        if getattr(wrapper, 'loss_scaler', None) is not None:
            raise ConfigError(
                'with a loss scaler, stages would disagree on which steps to skip: train a pipeline with '
                "optim_wrapper.dtype='bfloat16' or in full precision"
            )
        if getattr(wrapper, 'clip_scope', None) == 'global' and wrapper.clip_grad_kwargs:
            raise ConfigError(
                "clip_scope='global' needs all gradients at once, which no stage has: remove it to clip each block by itself"
            )
        return wrapper

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate for D replicas, on the first stage only: later stages receive its learning rates."""
        if self.stage_rank.is_first:
            super().scale_lr(optim_wrapper, auto_scale_lr)

    def load_or_resume(self) -> None:
        """Load the same checkpoint on all stages. For ``resume`` without ``load_from`` rank 0 finds the latest one."""
        if self._resume and self._load_from is None:
            if self.stage_rank.rank == 0:
                self._store.set('resume_from', find_latest_checkpoint(self.work_dir) or '')
            self._store.wait(['resume_from'], NO_TIMEOUT)
            self._load_from = self._store.get('resume_from').decode() or None
            self._resume = self._load_from is not None
        super().load_or_resume()

    def resume(self, filename: str, *args, map_location: str = 'cpu', **kwargs) -> None:
        """Resume as in an ordinary run, but load into host memory, where the model is at that time."""
        super().resume(filename, *args, map_location=map_location, **kwargs)

    def save_checkpoint(self, *args, **kwargs) -> None:
        """Gather the shards of all stages and save an ordinary checkpoint.

        The first stages of other replicas let their later stages finish the batches in flight.
        """
        if self.stage_rank.replica:
            self.model.comm.request()
            return
        self.gathered = self.model.gather_('checkpoint')
        super().save_checkpoint(*args, **kwargs)
        self.gathered = []
        self.model.shard.empty_()

    def _agree_on_seed(self, randomness: dict) -> dict:
        """If no seed is given, use the one that the first process to reach the store has drawn."""
        if randomness.get('seed') is None:
            drawn = str(np.random.default_rng().integers(2**31))
            randomness['seed'] = int(self._store.compare_set('seed', '', drawn))
        return randomness


class _WholeModelHook(Hook):
    """Splits the model when training starts, and gathers it for validation, checkpoints and the end of training."""

    priority = 'VERY_LOW'

    def before_train(self, runner: PipelineRunner) -> None:
        runner.model.start_(runner.optim_wrapper.optimizer, get_device(), runner.iter)

    def before_val(self, runner: PipelineRunner) -> None:
        runner.model.gather_('weights')

    def after_val(self, runner: PipelineRunner) -> None:
        runner.model.shard.empty_()

    def before_save_checkpoint(self, runner: PipelineRunner, checkpoint: dict) -> None:
        if 'optimizer' in checkpoint:
            state = checkpoint['optimizer']['state']
            for content in runner.gathered:
                state |= content['optimizer']
            checkpoint['optimizer']['state'] = dict(sorted(state.items()))

    def after_train(self, runner: PipelineRunner) -> None:
        if runner.stage_rank.is_first:
            runner.model.gather_('weights', last=True)


def _random_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _later_stage_options() -> dict:
    """Options that are None on later stages, because the first stage alone runs schedules and evaluation."""
    unused = [f'{split}_{key}' for split in ('val', 'test') for key in ('dataloader', 'cfg', 'evaluator')]
    return dict.fromkeys(['param_scheduler', *unused])


def _count_blocks(model: dict) -> int:
    """Read K from the model's config, because a process needs its position before the model is built.

    Raises:
        ConfigError: The config has no localised backbone.
    """
    backbone = model.get('backbone') or {}
    partition = backbone.get('partition')
    if isinstance(partition, Sequence) and not isinstance(partition, str):
        return len(partition) + 1
    if not backbone.get('num_blocks'):
        raise ConfigError(
            "PipelineRunner trains the blocks of a localised model: set model.backbone = dict(type='mmman.LocalBackbone', "
            'num_blocks=..., ...), or remove runner_type'
        )
    return backbone['num_blocks']
