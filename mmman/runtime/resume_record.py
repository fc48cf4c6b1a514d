"""Adds a record of the run to its checkpoints, with what exact resume needs in addition to mmengine's entries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

RECORD = 'mmman_resume'  # in a checkpoint's meta: position in the data, and facts about the run that saved it
GRADIENTS = 'mmman_gradients'  # in a checkpoint: gradients by parameter, if saved during accumulation


class ResumeRecordHook(Hook):
    """Adds the record of the run and its position in the data to checkpoints. mmman's loops register this hook."""

    priority = 'LOWEST'  # run after hooks that add or replace entries of a checkpoint

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the record, and gradients that are still accumulating."""
        loop, meta = runner.train_loop, checkpoint['meta']
        gradients = _accumulating(runner) if 'optimizer' in checkpoint else {}
        if gradients:
            checkpoint[GRADIENTS] = gradients
        batch = loop.position(meta['epoch'], meta['iter'])
        meta[RECORD] = {
            'by epoch': loop.by_epoch,
            'batch': batch,
            'regular': loop.is_regular(meta['epoch'], meta['iter'], batch),
            'batches': loop.batches,
            'sampler seed': loop.sampler_seed,
            'data': loop.data_signature(),
            'classes': classes(runner),
            'accumulative counts': {name: wrapper._accumulative_counts for name, wrapper in wrappers(runner).items()},
            'gradients': sorted(gradients),
        }
        if 'optimizer' in checkpoint:
            states = states_by_wrapper(checkpoint['optimizer'], runner)
            meta[RECORD]['parameters with state'] = {
                name: [index for index, values in state['state'].items() if values] for name, state in states.items()
            }


def _accumulating(runner: Runner) -> dict[str, Any]:
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, OptimWrapper) or wrapper.should_update():
        return {}
    if is_model_wrapper(runner.model):
        print_log(
            'This checkpoint is saved while gradients accumulate, separately on every process: a run resumed from it will not '
            "be exact. Set the checkpoint hook's interval to a multiple of accumulative_counts",
            logger='current',
            level=logging.WARNING,
        )
        return {}
    return {name: p.grad.cpu() for name, p in unwrap(runner.model).named_parameters() if p.grad is not None}


def classes(runner: Runner) -> dict[str, str | None]:
    """Return the names of the classes whose state a checkpoint contains."""
    average = averaged_model(runner)
    return {
        **{f'optimizer {name}'.rstrip(): type(wrapper.optimizer).__name__ for name, wrapper in wrappers(runner).items()},
        **{f'param_scheduler {i}': type(scheduler).__name__ for i, scheduler in by_number(runner.param_schedulers).items()},
        'averaged weights': None if average is None else type(average).__name__,
    }


def by_number(schedulers: Any) -> dict[str, Any]:
    """Return schedulers, or their states, by index; with several optimizers, by optimizer name and index."""
    if isinstance(schedulers, Mapping):
        return {f'{name}.{i}': own for name, some in schedulers.items() for i, own in enumerate(some)}
    return {str(i): own for i, own in enumerate(schedulers or [])}


def wrappers(runner: Runner) -> dict[str, OptimWrapper]:
    """Return the optim wrappers by name. A single one has the name ``''``."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return dict(wrapper.items())
    return {'': wrapper} if isinstance(wrapper, OptimWrapper) else {}


def states_by_wrapper(state: Any, runner: Runner) -> dict[str, Any]:
    """Return the optimizer entry of a checkpoint, by the names of :func:`wrappers`."""
    return state if isinstance(runner.optim_wrapper, OptimWrapperDict) else {'': state}


def scaler_state(wrapper: OptimWrapper) -> dict | None:
    """Return the state of an optim wrapper's loss scaler, or None."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return None if scaler is None else scaler.state_dict()


def averaged_model(runner: Runner) -> nn.Module | None:
    """Return the averaged model of a hook such as EMAHook, or None."""
    return next((hook.ema_model for hook in runner.hooks if isinstance(getattr(hook, 'ema_model', None), nn.Module)), None)


def unwrap(model: nn.Module) -> nn.Module:
    """Return a model without its wrapper for distributed training."""
    return model.module if is_model_wrapper(model) else model
