"""Exact resume: makes a config use mmman's loops and checkpoint hook, and continues a run at the batch where it stopped."""

from __future__ import annotations

import logging

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from mmman.runtime.resume_checks import check_fits
from mmman.runtime.resume_record import GRADIENTS, RECORD, unwrap

_LOOPS = (EpochBasedTrainLoop.__name__, IterBasedTrainLoop.__name__)
_HOOK = CheckpointHook.__name__


def use_exact_resume(cfg: Config) -> None:
    """Replace mmengine's train loop and checkpoint hook in a config with those of mmman.

    A loop or checkpoint hook of another class is kept, and a warning describes the consequence.
    """
    if cfg.get('runner_type', 'Runner') == 'FlexibleRunner':
        _warn('FlexibleRunner saves and resumes differently: a resumed run will not be exact')
        return
    if cfg.get('train_cfg'):
        by_epoch = cfg.train_cfg.pop('by_epoch', None)
        kind = _full_name(cfg.train_cfg.get('type', None if by_epoch is None else _LOOPS[not by_epoch]))
        if kind in _LOOPS:
            cfg.train_cfg.type = f'mmman.{kind}'
        elif not kind.startswith('mmman.'):
            _warn(f'train_cfg.type={kind} is not an mmengine loop: a resumed run will not be exact')
    cfg.default_hooks = {'checkpoint': dict(type=_HOOK, interval=1), **(cfg.get('default_hooks') or {})}  # as mmengine does
    if checkpoint := cfg.default_hooks.checkpoint:
        kind = _full_name(checkpoint.get('type'))
        if kind == _HOOK:
            checkpoint.type = f'mmman.{_HOOK}'
        elif kind != f'mmman.{_HOOK}':
            _warn(f'default_hooks.checkpoint.type={kind} is not the hook of mmengine: a killed run may lose checkpoints')


def _full_name(kind: str | type | None) -> str:
    """Return the name of a class given as a string or, in new-style configs, as the class. Omits the scope ``mmengine``."""
    name = f'{kind.__module__.partition(".")[0]}.{kind.__name__}' if isinstance(kind, type) else str(kind)
    return name.removeprefix('mmengine.')


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


class ExactResumeHook(Hook):
    """Checks a checkpoint to resume, and positions the data where it was saved. mmman's loops register this hook.

    Raises:
        CheckpointError: The checkpoint to resume doesn't fit this run. The message says what to change.
    """

    priority = 'VERY_HIGH'  # check a checkpoint before other hooks load from it

    def __init__(self) -> None:
        self._loaded: dict = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reject a checkpoint that doesn't fit this run, before anything is loaded from it."""
        if runner._resume:
            for note in check_fits(checkpoint, runner):
                _warn(note)
        self._loaded = {'meta': checkpoint.get('meta', {}), GRADIENTS: checkpoint.get(GRADIENTS, {})}

    def before_train(self, runner: Runner) -> None:
        """If a checkpoint was resumed, position the data where it was saved and restore accumulated gradients."""
        loop, loaded, self._loaded = runner.train_loop, self._loaded, {}
        if not loop.iter or not loaded:
            return
        record = loaded['meta'].get(RECORD)
        if record is None:
            loop.resumed_batch = _stock_batch(loop)
            return
        loop.resumed_batch = record['batch']
        if record['sampler seed'] is not None:
            loop.dataloader.batch_sampler.sampler.seed = record['sampler seed']
        for name, parameter in unwrap(runner.model).named_parameters():
            if name in loaded[GRADIENTS]:
                parameter.grad = loaded[GRADIENTS][name].to(parameter.device, copy=True)


def _stock_batch(loop) -> int:
    """Return the batch at which mmengine saved, assuming that all epochs have the same number of batches."""
    return loop.iter if not loop.by_epoch else min(max(loop.iter - loop.epoch * len(loop.dataloader), 0), len(loop.dataloader))
