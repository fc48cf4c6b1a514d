"""What a checkpoint records of its run besides mmengine's entries."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from mmman.runtime.resume_record import (
    GRADIENTS,
    RECORD,
    ResumeRecordHook,
    averaged_model,
    by_number,
    classes,
    scaler_state,
    states_by_wrapper,
    wrappers,
)


class Loop:
    by_epoch, batches, sampler_seed = True, 10, 3

    def position(self, epoch, iteration):
        return iteration - 10 * epoch

    def is_regular(self, epoch, iteration, batch):
        return (epoch, iteration, batch) == (2, 24, 4)

    def data_signature(self):
        return {'batch size': 2}


@pytest.fixture
def runner():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    return SimpleNamespace(train_loop=Loop(), model=model, optim_wrapper=wrapper, param_schedulers=[scheduler], hooks=[])


def saved(runner, **parts):
    checkpoint = {'meta': {'epoch': 2, 'iter': 24}, **parts}
    ResumeRecordHook().before_save_checkpoint(runner, checkpoint)
    return checkpoint


def accumulate(runner, counts):
    runner.optim_wrapper.initialize_count_status(runner.model, 0, 99)
    for _ in range(counts):
        runner.optim_wrapper.update_params(runner.model(torch.ones(1)).sum())


def test_the_record_of_a_run_between_steps(runner):
    accumulate(runner, 2)
    runner.model.weight.grad = torch.zeros(1, 1)  # as zero_grad(set_to_none=False) leaves it
    checkpoint = saved(runner, optimizer=runner.optim_wrapper.state_dict())
    assert GRADIENTS not in checkpoint
    assert checkpoint['meta'][RECORD] == {
        'by epoch': True,
        'batch': 4,
        'regular': True,
        'batches': 10,
        'sampler seed': 3,
        'data': {'batch size': 2},
        'classes': {'optimizer': 'SGD', 'param_scheduler 0': 'StepLR', 'averaged weights': None},
        'accumulative counts': {'': 2},
        'gradients': [],
        'parameters with state': {'': [0, 1]},
    }


def test_gradients_that_accumulate_are_saved_with_the_optimizer(runner):
    accumulate(runner, 3)
    checkpoint = saved(runner, optimizer=runner.optim_wrapper.state_dict())
    assert checkpoint['meta'][RECORD]['gradients'] == ['bias', 'weight']
    assert checkpoint[GRADIENTS]['weight'].tolist() == runner.model.weight.grad.tolist() == [[0.5]]
    assert GRADIENTS not in saved(runner)  # a best_*.pth has no optimizer


def test_of_gradients_under_ddp_only_a_warning_is_saved(runner, monkeypatch):
    said = []
    monkeypatch.setattr('mmman.runtime.resume_record.is_model_wrapper', lambda model: True)
    monkeypatch.setattr('mmman.runtime.resume_record.print_log', lambda message, **_: said.append(message))
    accumulate(runner, 3)
    assert GRADIENTS not in saved(runner, optimizer=runner.optim_wrapper.state_dict())
    assert len(said) == 1 and 'multiple of accumulative_counts' in said[0]


def test_several_optimizers_have_names(runner):
    one = runner.optim_wrapper
    assert wrappers(runner) == {'': one} and states_by_wrapper('state', runner) == {'': 'state'}
    runner.optim_wrapper = OptimWrapperDict(a=one, b=one)
    assert wrappers(runner) == {'a': one, 'b': one} and states_by_wrapper('state', runner) == 'state'
    runner.param_schedulers = {'a': runner.param_schedulers, 'b': runner.param_schedulers}
    assert [*classes(runner)] == [
        'optimizer a',
        'optimizer b',
        'param_scheduler a.0',
        'param_scheduler b.0',
        'averaged weights',
    ]


def test_schedulers_have_numbers():
    assert by_number(['x', 'y']) == {'0': 'x', '1': 'y'} and by_number(None) == {}
    assert by_number({'a': ['x'], 'b': ['y', 'z']}) == {'a.0': 'x', 'b.0': 'y', 'b.1': 'z'}


def test_an_averaged_model_is_that_of_any_hook(runner):
    average = nn.Linear(1, 1)
    runner.hooks = [SimpleNamespace(), SimpleNamespace(ema_model=None), SimpleNamespace(ema_model=average)]
    assert averaged_model(runner) is average and classes(runner)['averaged weights'] == 'Linear'


def test_a_wrapper_without_a_loss_scaler_has_no_state_of_one(runner):
    assert scaler_state(runner.optim_wrapper) is None
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    assert scaler_state(runner.optim_wrapper)['scale'] == 8.0
