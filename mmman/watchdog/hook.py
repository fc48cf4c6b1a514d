"""Hook that reports a run's position to the watchdog, and starts a watchdog if the train script does not."""

from __future__ import annotations

import atexit
import math
import os
import sys
from functools import partial
from itertools import count

import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.distributed import PrefixStore

from mmman.errors import ConfigError
from mmman.registry import HOOKS
from mmman.watchdog.monitor import Watchdog
from mmman.watchdog.rendezvous import connect

DEFAULT_TIMEOUT_S = 180.0
"""Default timeout in seconds. The launcher may need another 30 s to kill a suspended process."""
SHARE_OF_TIMEOUT = 0.8
"""The watchdog's timeout as a fraction of the collectives' timeout, so that it reports before a collective times out."""
WARM_UP = 2
"""Number of first iterations of a process without a time limit, because they may compile."""

_LOADING, _FORWARD, _BACKWARD, _REDUCTION, _CHECKPOINT, _EVALUATION, _END = range(7)
_runs = count()


def timeout_of(cfg: dict) -> float:
    """The watchdog's timeout in seconds, from ``env_cfg.dist_cfg.timeout`` of a config, the timeout of collectives.

    Raises:
        ConfigError: The config's timeout is not a positive finite number.
    """
    timeout = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ConfigError(f'env_cfg.dist_cfg.timeout={timeout!r}: set a positive number of seconds, or remove it')
    return SHARE_OF_TIMEOUT * timeout


def start_watchdog(rank: int, world_size: int, timeout: float) -> Watchdog:
    """Start a watchdog of the processes of a data parallel run.

    Args:
        rank: Rank of this process.
        world_size: Number of processes.
        timeout: See :class:`Watchdog`.

    Returns:
        The running watchdog.
    """
    store = PrefixStore(f'mmman/watchdog/{next(_runs)}', connect(rank, world_size))
    watchdog = Watchdog(rank, world_size, store, timeout)
    watchdog.progress.move('its set-up', (0,))
    watchdog.start()
    return watchdog


@HOOKS.register_module()
class WatchdogHook(Hook):
    """Records the position of a data parallel run for the :class:`Watchdog`, and which positions have no time limit.

    ``tools/train.py`` and ``tools/test.py`` register the hook with a watchdog that runs from the program's start to its end.
    Without a watchdog, as :class:`EMABiasHook` registers the hook under other train scripts, it starts one before the run.

    Args:
        watchdog: A running watchdog. None to start one.
    """

    priority = 'LOWEST'  # run after all other hooks, so that the loop follows

    def __init__(self, watchdog: Watchdog | None = None) -> None:
        self._watchdog = watchdog
        self._is_own = False
        self._handles: list = []
        self._iterations = 0  # completed by this process

    def before_run(self, runner: Runner) -> None:
        """Start a watchdog if there is none, there are several processes, and ``MASTER_ADDR`` gives them a common store."""
        if self._watchdog is None and 'MASTER_ADDR' in os.environ and dist.is_initialized() and dist.get_world_size() > 1:
            self._watchdog = start_watchdog(dist.get_rank(), dist.get_world_size(), timeout_of(runner.cfg))
            self._is_own = True
            atexit.register(self._report_exit)

    def after_run(self, runner: Runner) -> None:
        """Stop the watchdog that :meth:`before_run` started."""
        if self._is_own:
            dist.barrier()
            self._leave()

    def before_train(self, runner: Runner) -> None:
        """Register callbacks for the steps of an iteration: forward pass, backward pass and gradient reductions."""
        if self._watchdog is None or hasattr(runner.model, 'comm'):
            return
        if is_model_wrapper(runner.model):
            self._handles = [
                runner.model.register_forward_pre_hook(lambda *_: self._step('forward pass', runner, _FORWARD)),
                runner.model.register_forward_hook(
                    lambda *_: self._step('backward pass and gradient reduction', runner, _BACKWARD)
                ),
            ]
        for block, reducer in getattr(runner.model, 'block_reducers', {}).items():
            reducer.on_wait = partial(self._step, f'reduction of block {block}', runner, _REDUCTION, block)

    def before_train_epoch(self, runner: Runner) -> None:
        self._load(runner, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        self._step('forward pass', runner, _FORWARD)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None) -> None:
        self._iterations += 1
        self._load(runner, runner.iter + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._move('a checkpoint', runner.iter, _CHECKPOINT)

    def before_val(self, runner: Runner) -> None:
        self._evaluate(runner)

    def after_val_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        self._evaluate(runner)

    def after_val(self, runner: Runner) -> None:
        self._load(runner, runner.iter)

    def before_test(self, runner: Runner) -> None:
        self._move('the evaluation', 0, _EVALUATION)

    def after_test_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        self._move('the evaluation', 0, _EVALUATION)

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._move('the end of the run', runner.iter, _END)

    def _load(self, runner: Runner, iteration: int) -> None:
        timed = self._iterations > 0  # no limit before the first iteration, when workers start
        self._move(f'the data loading of iteration {iteration + 1}', iteration, _LOADING, timed=timed)

    def _step(self, text: str, runner: Runner, *order: int) -> None:
        timed = self._iterations >= WARM_UP
        self._move(f'the {text} of iteration {runner.iter + 1}', runner.iter, *order, timed=timed)

    def _evaluate(self, runner: Runner) -> None:
        iteration = runner.iter if runner._train_loop is not None else 0
        self._move('the evaluation', iteration, _EVALUATION)

    def _move(self, text: str, *order: int, timed: bool = False) -> None:
        if self._watchdog is not None:
            self._watchdog.progress.move(text, order, timed)

    def _report_exit(self) -> None:
        """Report the exit of the program during the run, which most likely has an error as its cause."""
        if self._watchdog is not None:
            peer_error = self._watchdog.fail(getattr(sys, 'last_value', None) or SystemExit('exited during the run'))
            if peer_error is not None:
                print(peer_error, file=sys.stderr, flush=True)  # follows the traceback of the connection error

    def _leave(self) -> None:
        atexit.unregister(self._report_exit)
        self._watchdog.leave()
        self._watchdog, self._is_own = None, False
