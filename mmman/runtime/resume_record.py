"""What a checkpoint says about the run that saved it, beside what mmengine writes: enough to go on exactly, or to refuse."""

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

RECORD = 'mmman_resume'  # in a checkpoint's meta: where in the data it was saved, and by what
GRADIENTS = 'mmman_gradients'  # in a checkpoint: gradients by parameter, where it was saved while they accumulated


class ResumeRecordHook(Hook):
    """Writes into checkpoints where in the data and by what they were saved. mmman's loops register it themselves."""

    priority = 'LOWEST'  # other hooks complete or exchange what a checkpoint holds

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
            'data': loop.data_facts(),
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
            'This checkpoint is saved while gradients accumulate, and every process has its own: a run resumed from it '
            "will not be exact. Choose the checkpoint hook's interval as a multiple of accumulative_counts",
            logger='current',
            level=logging.WARNING,
        )
        return {}
    return {name: p.grad.cpu() for name, p in unwrap(runner.model).named_parameters() if p.grad is not None}


def classes(runner: Runner) -> dict[str, str | None]:
    """The names of the classes whose state a checkpoint holds."""
    average = averaged_model(runner)
    return {
        **{f'optimizer {name}'.rstrip(): type(wrapper.optimizer).__name__ for name, wrapper in wrappers(runner).items()},
        **{f'param_scheduler {i}': type(scheduler).__name__ for i, scheduler in by_number(runner.param_schedulers).items()},
        'averaged weights': None if average is None else type(average).__name__,
    }


def by_number(schedulers: Any) -> dict[str, Any]:
    """Schedulers, or their states, by number and, where there are several optimizers, their name."""
    if isinstance(schedulers, Mapping):
        return {f'{name}.{i}': own for name, some in schedulers.items() for i, own in enumerate(some)}
    return {str(i): own for i, own in enumerate(schedulers or [])}


def wrappers(runner: Runner) -> dict[str, OptimWrapper]:
    """The optim wrappers by name; a single one has the name ``''``."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return dict(wrapper.items())
    return {'': wrapper} if isinstance(wrapper, OptimWrapper) else {}


def states_by_wrapper(state: Any, runner: Runner) -> dict[str, Any]:
    """The optimizer's entry of a checkpoint, by the names of :func:`wrappers`."""
    return state if isinstance(runner.optim_wrapper, OptimWrapperDict) else {'': state}


def scaler_state(wrapper: OptimWrapper) -> dict | None:
    """The state of an optim wrapper's loss scaler, if it has one."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return None if scaler is None else scaler.state_dict()


def averaged_model(runner: Runner) -> nn.Module | None:
    """The moving average of the model that a hook keeps (EMAHook), if one does."""
    return next((hook.ema_model for hook in runner.hooks if isinstance(getattr(hook, 'ema_model', None), nn.Module)), None)


def unwrap(model: nn.Module) -> nn.Module:
    """A model without its wrapper for several processes."""
    return model.module if is_model_wrapper(model) else model
