"""A run whose blocks train in parallel: one process a block, chosen by ``runner_type='mmman.PipelineRunner'``."""

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
from mmman.errors import MisuseError
from mmman.parallel.pipeline.loop import StageLoop
from mmman.parallel.pipeline.place import PATIENT, join_replicas, rendezvous
from mmman.parallel.pipeline.stage import PipelineStage
from mmman.registry import RUNNERS
from mmman.runtime.launch import type_name
from mmman.watchdog.monitor import Watchdog

FOLLOWERS_HOOKS = ('EMABiasHook',)
"""Hooks of the config that run on every stage; all others see the first one alone."""


@RUNNERS.register_module()
class PipelineRunner(Runner):
    """Trains a localised model with one block a process (PPLL, Algorithm 1 of the paper), and D replicas of that.

    The first stage is the run as users know it: its loops, hooks, schedulers, evaluators, log. It loads the data; all other
    stages follow it (:class:`StageLoop`) with its batches and learning rates. The number of stages is that of the model's
    blocks; K processes make one replica, D * K processes D of them. Options are in ``cfg.pipeline``:

    - ``staleness`` (default 2): S, how many batches a stage may be ahead of the next one. The momentum copies of a block then
      follow the next block's first unit as it was S updates ago, exactly: the run is reproducible.
    - ``timeout`` (default 120): seconds after which a process that shows no sign of life ends the job.

    Evaluation and checkpoints need the whole model: it is put together on the first stage, in the format of an ordinary run.

    Raises:
        MisuseError: The job's processes don't fit the blocks, or an option can't work by stages.
    """

    def __init__(self, model: dict, work_dir: str, launcher: str = 'none', cfg: dict | None = None, **kwargs) -> None:
        options = PipelineOptions(**((cfg or {}).get('pipeline') or {}))
        self._staleness = options.staleness
        self.place, self._store = rendezvous(launcher, _count_blocks(model))
        join_replicas(self.place, self._store)
        self._watchdog = Watchdog(
            self.place.rank,
            self.place.world_size,
            self._store.clone(),
            options.timeout,
            name=lambda rank: str(self.place.at(rank)),
            job='pipeline',
        )
        kwargs['randomness'] = self._agree_on_seed(dict(kwargs.get('randomness') or {'seed': None}))
        if not self.place.is_first:
            work_dir = f'{work_dir}/stages/{self.place.stage}'
            kwargs |= _followers_options()
        self.gathered: list[dict] = []
        launcher = launcher if self.place.replicas > 1 else 'none'
        self._watchdog.start()
        with self._watchdog.reporting():
            super().__init__(model, work_dir, launcher=launcher, cfg=cfg, **kwargs)
            if any(type(hook).__name__ == 'EMAHook' for hook in self.hooks):
                raise MisuseError('EMAHook averages a whole model, which no stage has: leave it out, or train without pipeline')

    def train(self) -> nn.Module:
        """Train; on the first stage the model that is returned is whole."""
        with self._watchdog.reporting():
            self.model.neighbours.connect(self._store, self._watchdog)
            model = super().train()
            self.model.neighbours.close()
        self._watchdog.leave()
        return model

    def dump_config(self) -> None:
        """Written once, by the first stage."""
        if self.place.is_first:
            super().dump_config()

    def register_hooks(self, default_hooks: dict | None = None, custom_hooks: list | None = None) -> None:
        """The config's hooks; on a stage that follows only those that every stage needs."""
        if self.place.is_first:
            super().register_hooks(default_hooks, custom_hooks)
        else:
            names = [type(hook).__name__ if isinstance(hook, Hook) else type_name(hook) for hook in custom_hooks or []]
            kept = [hook for hook, name in zip(custom_hooks or [], names, strict=True) if name in FOLLOWERS_HOOKS]
            self.register_custom_hooks(kept)
        self.register_hook(_WholeModelHook())

    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **kwargs) -> MMLogger:
        """A later stage writes its own log file, and to the terminal only what is wrong."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        if not self.place.is_first:
            for handler in logger.handlers:
                if type(handler) is logging.StreamHandler:
                    handler.setLevel(logging.WARNING)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The model stays whole, in host memory, until training starts: every stage initialises and loads all of it."""
        if is_model_wrapper(model):
            raise MisuseError('PipelineRunner wraps the model itself: pass a model without a wrapper')
        if self.place.replicas == 1:
            model = revert_sync_batchnorm(model)
        elif sync_bn := self.cfg.get('sync_bn'):
            model = convert_sync_batchnorm(model, sync_bn)
        return PipelineStage(model, self.place, self._staleness)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """The first stage's loop is the config's; the others learn from it how long to run."""
        if self.place.is_first:
            loop = super().build_train_loop(loop)
            plan = (loop.max_iters, getattr(loop.dataloader.dataset, 'metainfo', None))
            if self.place.rank == 0:
                self._store.set('loop', pickle.dumps((plan, _random_state())))
            return loop
        self._store.wait(['loop'], PATIENT)
        plan, state = pickle.loads(self._store.get('loop'))
        _set_random_state(state)  # making a data loader may draw; all stages initialise the same weights
        return StageLoop(self, *plan)

    def build_optim_wrapper(self, optim_wrapper: dict | OptimWrapper) -> OptimWrapper:
        """Refuse what stages, each with its own part of the gradients, can't do."""
        wrapper = super().build_optim_wrapper(optim_wrapper)
        if getattr(wrapper, 'loss_scaler', None) is not None:
            raise MisuseError(
                'under a loss scaler stages would not agree on which steps to skip: train a pipeline with '
                "optim_wrapper.dtype='bfloat16' or in full precision"
            )
        if getattr(wrapper, 'clip_scope', None) == 'global' and wrapper.clip_grad_kwargs:
            raise MisuseError(
                "clip_scope='global' needs all gradients at once, which no stage has: leave it out to clip block by block"
            )
        return wrapper

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Learning rates are the first stage's affair, and count D replicas."""
        if self.place.is_first:
            super().scale_lr(optim_wrapper, auto_scale_lr)

    def load_or_resume(self) -> None:
        """All stages load the file that the first one finds."""
        if self._resume and self._load_from is None:
            if self.place.rank == 0:
                self._store.set('resume_from', find_latest_checkpoint(self.work_dir) or '')
            self._store.wait(['resume_from'], PATIENT)
            self._load_from = self._store.get('resume_from').decode() or None
            self._resume = self._load_from is not None
        super().load_or_resume()

    def resume(self, filename: str, *args, map_location: str = 'cpu', **kwargs) -> None:
        """As in any run, but into host memory, where the model still is."""
        super().resume(filename, *args, map_location=map_location, **kwargs)

    def save_checkpoint(self, *args, **kwargs) -> None:
        """Collect all stages' parts into an ordinary checkpoint. The stages that follow are asked for theirs."""
        if self.place.replica:
            self.model.neighbours.request()
            return
        self.gathered = self.model.gather_('checkpoint')
        super().save_checkpoint(*args, **kwargs)
        self.gathered = []
        self.model.part.empty_()

    def _agree_on_seed(self, randomness: dict) -> dict:
        if randomness.get('seed') is None:
            drawn = str(np.random.default_rng().integers(2**31))
            randomness['seed'] = int(self._store.compare_set('seed', '', drawn))
        return randomness


class _WholeModelHook(Hook):
    """Takes the model apart when training starts, and puts it together for what needs all of it."""

    priority = 'VERY_LOW'

    def before_train(self, runner: PipelineRunner) -> None:
        runner.model.start_(runner.optim_wrapper.optimizer, get_device(), runner.iter)

    def before_val(self, runner: PipelineRunner) -> None:
        runner.model.gather_('weights')

    def after_val(self, runner: PipelineRunner) -> None:
        runner.model.part.empty_()

    def before_save_checkpoint(self, runner: PipelineRunner, checkpoint: dict) -> None:
        if 'optimizer' in checkpoint:
            state = checkpoint['optimizer']['state']
            for content in runner.gathered:
                state |= content['optimizer']
            checkpoint['optimizer']['state'] = dict(sorted(state.items()))

    def after_train(self, runner: PipelineRunner) -> None:
        if runner.place.is_first:
            runner.model.gather_('weights', last=True)


def _random_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _followers_options() -> dict:
    """What a stage that follows leaves to the first one: learning rate schedules and evaluation."""
    unused = [f'{split}_{part}' for split in ('val', 'test') for part in ('dataloader', 'cfg', 'evaluator')]
    return dict.fromkeys(['param_scheduler', *unused])


def _count_blocks(model: dict) -> int:
    """K, from the model's config: it tells a process its place, before anything is built."""
    backbone = model.get('backbone') or {}
    partition = backbone.get('partition')
    if isinstance(partition, Sequence) and not isinstance(partition, str):
        return len(partition) + 1
    if not backbone.get('num_blocks'):
        raise MisuseError(
            "PipelineRunner trains the blocks of a localised model: set model.backbone = dict(type='mmman.LocalBackbone', "
            'num_blocks=..., ...), or leave runner_type out'
        )
    return backbone['num_blocks']
