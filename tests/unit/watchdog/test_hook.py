"""The positions that the hook records of a run, and which of them have a time limit."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import is_model_wrapper
from torch import nn

from mmman.errors import ConfigError
from mmman.watchdog import hook as hook_module
from mmman.watchdog.hook import DEFAULT_TIMEOUT_S, WARM_UP, WatchdogHook, timeout_of
from mmman.watchdog.progress import Progress


@pytest.mark.parametrize('cfg', [{}, {'env_cfg': None}, {'env_cfg': {'dist_cfg': None}}, {'env_cfg': {'dist_cfg': {}}}])
def test_without_a_timeout_of_collectives_the_default_holds(cfg):
    assert timeout_of(cfg) == DEFAULT_TIMEOUT_S


def test_the_watchdog_is_faster_than_a_collective():
    assert 0 < timeout_of({'env_cfg': {'dist_cfg': {'timeout': 100}}}) < 100


@pytest.mark.parametrize('timeout', [0, -1, float('inf'), float('nan'), True, '60'])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(timeout):
    with pytest.raises(ConfigError, match='^env_cfg.dist_cfg.timeout=.*: set a positive number of seconds, or remove it'):
        timeout_of({'env_cfg': {'dist_cfg': {'timeout': timeout}}})


class Run:
    """A run's hook with a watchdog that only keeps the position."""

    def __init__(self, model=None):
        self.watchdog = SimpleNamespace(progress=Progress())
        self.hook = WatchdogHook(self.watchdog)
        self.runner = SimpleNamespace(model=model, iter=0, _train_loop=object())

    def call(self, name, *args):
        getattr(self.hook, name)(self.runner, *args)
        return self.position

    @property
    def position(self):
        position = self.watchdog.progress.position
        return position.text, position.order, position.timed


def test_positions_of_an_iteration_are_timed_once_the_first_ones_are_over():
    run, seen = Run(), []
    for i in range(WARM_UP + 1):
        run.runner.iter = i
        if i == 0:
            assert run.call('before_train_epoch') == ('the data loading of iteration 1', (0, 0), False)
        seen.append(run.call('before_train_iter', i))
        after = run.call('after_train_iter', i)
        assert after == (f'the data loading of iteration {i + 2}', (i + 1, 0), True)
    assert seen == [(f'the forward pass of iteration {i + 1}', (i, 1), i >= WARM_UP) for i in range(WARM_UP + 1)]


@pytest.mark.parametrize('call', ['before_val', 'after_val_iter', 'before_test', 'after_test_iter', 'after_train'])
def test_evaluation_and_the_end_may_take_any_time(call):
    run = Run()
    run.hook._iterations = 9
    assert not run.call(call)[2]
    assert not run.call('before_save_checkpoint', {})[2]


def test_steps_of_a_wrapped_model_follow_each_other(monkeypatch):
    model = nn.Linear(2, 2)
    model.block_reducers = {1: SimpleNamespace()}
    monkeypatch.setattr(hook_module, 'is_model_wrapper', lambda module: module is model)
    assert not is_model_wrapper(model)
    run, seen = Run(model), []
    run.runner.iter = 4
    run.call('before_train')
    model.register_forward_pre_hook(lambda *_: seen.append(run.position))
    model(torch.ones(1, 2))
    seen.append(run.position)
    model.block_reducers[1].on_wait()
    seen.append(run.position)
    texts, orders, _ = zip(*seen, strict=True)
    assert texts[1] == 'the backward pass and gradient reduction of iteration 5'
    assert texts[2] == 'the reduction of block 1 of iteration 5'
    assert texts[0] == 'the forward pass of iteration 5' and orders == tuple(sorted(orders))
    run.call('after_train')
    model(torch.ones(1, 2))
    assert run.position[0] == 'the end of the run'  # nothing is recorded any more


def test_a_run_of_one_process_has_no_watchdog(monkeypatch):
    monkeypatch.setattr(hook_module, 'start_watchdog', lambda *args: pytest.fail('one process has no peers'))
    hook, runner = WatchdogHook(), SimpleNamespace(model=nn.Identity(), iter=0, cfg={})
    hook.before_run(runner)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    hook.after_run(runner)
