"""Exact resume: what a checkpoint must say beside weights and optimizer, and which checkpoints a run may go on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn

from mmman.engine.hooks import EMABiasHook
from mmman.errors import CheckpointError

RECORD = 'mmman_resume'  # in a checkpoint's meta: where in the data it was saved
GRADIENTS = 'mmman_gradients'  # in a checkpoint: gradients by parameter, where it was saved while they accumulated

_LOOPS = (EpochBasedTrainLoop.__name__, IterBasedTrainLoop.__name__)
_HOOK = CheckpointHook.__name__
_REMEDY = 'resume with the config that it was trained with, or start a new run from its weights: load_from without resume'


def use_exact_resume(cfg: Config) -> None:
    """Let a config train with the loops and the checkpoint hook of mmman in place of mmengine's.

    A loop or checkpoint hook of another class is kept, and a warning says what that costs.
    """
    if cfg.get('runner_type', 'Runner') == 'FlexibleRunner':
        _warn('FlexibleRunner saves and resumes in its own way: a resumed run will not be exact')
        return
    if cfg.get('train_cfg'):
        by_epoch = cfg.train_cfg.pop('by_epoch', None)
        kind = _full_name(cfg.train_cfg.get('type', None if by_epoch is None else _LOOPS[not by_epoch]))
        if kind in _LOOPS:
            cfg.train_cfg.type = f'mmman.{kind}'
        elif not kind.startswith('mmman.'):
            _warn(f'train_cfg.type={kind} is not a loop of mmengine: a resumed run will not be exact')
    cfg.default_hooks = {'checkpoint': dict(type=_HOOK, interval=1), **(cfg.get('default_hooks') or {})}  # as mmengine does
    if checkpoint := cfg.default_hooks.checkpoint:
        kind = _full_name(checkpoint.get('type'))
        if kind == _HOOK:
            checkpoint.type = f'mmman.{_HOOK}'
        elif kind != f'mmman.{_HOOK}':
            _warn(f'default_hooks.checkpoint.type={kind} is not the hook of mmengine: a kill may lose checkpoints')


def _full_name(kind: str | type | None) -> str:
    """The class that a config names by a string or, in new-style configs, itself; without a scope where it is mmengine's."""
    name = f'{kind.__module__.partition(".")[0]}.{kind.__name__}' if isinstance(kind, type) else str(kind)
    return name.removeprefix('mmengine.')


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


class ExactResumeHook(Hook):
    """Writes into checkpoints where in the data they were saved, and goes on from there. mmman's loops register it themselves.

    Raises:
        CheckpointError: The checkpoint to resume doesn't fit this run; the message says what to change.
    """

    priority = 'VERY_HIGH'  # a checkpoint is checked before other hooks load from it

    def __init__(self) -> None:
        self._loaded: dict = {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the position in the data, and gradients that are still accumulating."""
        loop, meta = runner.train_loop, checkpoint['meta']
        meta[RECORD] = {
            'by epoch': loop.by_epoch,
            'batch': loop.position(meta['epoch'], meta['iter']),
            'sampler seed': getattr(getattr(loop.dataloader.batch_sampler, 'sampler', None), 'seed', None),
            'data': loop.data_facts(),
        }
        if not isinstance(runner.optim_wrapper, OptimWrapper) or runner.optim_wrapper.should_update():
            return
        if is_model_wrapper(runner.model):
            _warn(
                'This checkpoint is saved while gradients accumulate, and every process has its own: a run resumed from it '
                "will not be exact. Choose the checkpoint hook's interval as a multiple of accumulative_counts"
            )
            return
        gradients = {name: p.grad.cpu() for name, p in _unwrap(runner.model).named_parameters() if p.grad is not None}
        checkpoint[GRADIENTS] = gradients

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse a checkpoint that isn't of this run, before anything is loaded from it."""
        if runner._resume:
            check_fits(checkpoint, _unwrap(runner.model), runner)
        self._loaded = {'meta': checkpoint.get('meta', {}), GRADIENTS: checkpoint.get(GRADIENTS, {})}

    def before_train(self, runner: Runner) -> None:
        """Position the data where the checkpoint was saved, where one was resumed."""
        loop, loaded, self._loaded = runner.train_loop, self._loaded, {}
        if not loop.iter or not loaded:
            return
        record = loaded['meta'].get(RECORD)
        if record is None:
            _warn('The checkpoint was not saved by a loop of mmman: the resumed run will not be exactly the uninterrupted one')
            loop.resumed_batch = _stock_batch(loop)
            return
        _check_record(record, loop)
        loop.resumed_batch = record['batch']
        if record['sampler seed'] is not None:
            loop.dataloader.batch_sampler.sampler.seed = record['sampler seed']
        for name, parameter in _unwrap(runner.model).named_parameters():
            if name in loaded[GRADIENTS]:
                parameter.grad = loaded[GRADIENTS][name].to(parameter.device, copy=True)


def check_fits(checkpoint: dict, model: nn.Module, runner: Runner) -> None:
    """Check that a checkpoint belongs to this model, optimizer and schedule.

    Raises:
        CheckpointError: It doesn't.
    """
    for key, what in (('state_dict', 'weights'), ('message_hub', 'log'), ('optimizer', 'optimizer state')):
        if key not in checkpoint:
            raise CheckpointError(
                f'cannot resume: the checkpoint has no {what}, as a published one or a best_*.pth: '
                'resume from an epoch_*.pth or iter_*.pth, or start a new run from its weights: load_from without resume'
            )
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    theirs = {name: tuple(value.shape) for name, value in checkpoint['state_dict'].items() if torch.is_tensor(value)}
    is_local = any('.local.' in name for name in ours.keys() ^ theirs.keys())
    if is_local and any(isinstance(hook, EMABiasHook) for hook in runner.hooks):
        return  # that hook refuses, and names the local heads
    if ours != theirs:
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        shapes = [shapes.get(differ[0], 'not there') for shapes in (theirs, ours)]
        raise CheckpointError(
            f'cannot resume: the checkpoint is of another model. {len(differ)} tensors differ, the first is {differ[0]}: '
            f'{shapes[0]} in the checkpoint, {shapes[1]} in this model; {_REMEDY}'
        )
    if isinstance(runner.optim_wrapper, OptimWrapper):
        _check_optimizer(checkpoint['optimizer'], runner.optim_wrapper.optimizer)
    schedules = [_count(checkpoint.get('param_schedulers') or []), _count(runner.param_schedulers or [])]
    if schedules[0] != schedules[1]:
        raise CheckpointError(
            f'cannot resume: the checkpoint has {schedules[0]} parameter schedulers, this config {schedules[1]}; {_REMEDY}'
        )


def _check_optimizer(state: dict, optimizer: torch.optim.Optimizer) -> None:
    groups = state.get('param_groups')
    if not isinstance(groups, list):
        raise CheckpointError(f'cannot resume: the checkpoint has no state of a single optimizer; {_REMEDY}')
    sizes = [[len(group['params']) for group in side] for side in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"cannot resume: the checkpoint's optimizer has {len(sizes[0])} groups of {sum(sizes[0])} parameters, "
            f"this config's {len(sizes[1])} of {sum(sizes[1])} (paramwise_cfg?); {_REMEDY}"
        )
    unknown = {name for name in groups[0] if not name.startswith('initial_')} - optimizer.param_groups[0].keys()
    if unknown:
        kind = type(optimizer).__name__
        raise CheckpointError(
            f"cannot resume: the checkpoint's optimizer has {', '.join(sorted(unknown))}, which {kind} has not; {_REMEDY}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    indices = [index for group in groups for index in group['params']]
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in state['state'].get(index, {}).items():
            if torch.is_tensor(value) and value.dim() == parameter.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"cannot resume: the optimizer's {name} of parameter {index} has the shape {tuple(value.shape)}, "
                    f'the parameter {tuple(parameter.shape)}; {_REMEDY}'
                )


def _check_record(record: dict, loop) -> None:
    if record['by epoch'] != loop.by_epoch:
        kinds = ['epochs' if by_epoch else 'iterations' for by_epoch in (record['by epoch'], loop.by_epoch)]
        raise CheckpointError(f'cannot resume: the checkpoint counts {kinds[0]}, train_cfg {kinds[1]}; {_REMEDY}')
    ours = loop.data_facts()
    changes = [f'{name} {value} there, {ours[name]} here' for name, value in record['data'].items() if ours[name] != value]
    if not changes:
        return
    if record['batch']:
        raise CheckpointError(
            f'cannot resume after batch {record["batch"]} of other data: {"; ".join(changes)}. Resume with the same data '
            'and processes, or from the end of an epoch, or start a new run from its weights: load_from without resume'
        )
    _warn(f'The run goes on with other data than it began: {"; ".join(changes)}')


def _stock_batch(loop) -> int:
    """The batch at which mmengine saved, if all epochs were equally long."""
    return loop.iter if not loop.by_epoch else min(max(loop.iter - loop.epoch * len(loop.dataloader), 0), len(loop.dataloader))


def _count(schedulers: list | Mapping) -> int:
    return sum(map(len, schedulers.values())) if isinstance(schedulers, Mapping) else len(schedulers)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
