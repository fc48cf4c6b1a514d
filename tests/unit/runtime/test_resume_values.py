"""Single values of a checkpoint to resume. All of its entries are tried in tests/integration/test_resume_checks.py."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from torch import nn

from mmman.errors import CheckpointError
from mmman.runtime.resume_record import GRADIENTS, RECORD
from mmman.runtime.resume_values import check_finite, check_values

RECORDED = {'by epoch': True, 'batch': 4, 'data': {'batch size': 2}}
NEWLY_RECORDED = {
    'regular': True,
    'batches': 10,
    'classes': {},
    'accumulative counts': {'': 1},
    'gradients': [],
    'parameters with state': {'': [0, 1]},
}


@pytest.fixture
def runner():
    model = nn.Linear(1, 1)
    return SimpleNamespace(model=model, optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.fixture
def checkpoint(runner):
    state = {0: {'momentum_buffer': torch.ones(1, 1)}, 1: {'momentum_buffer': torch.ones(1), 'step': 3}}
    groups = [{'params': [0, 1], 'lr': 0.1, 'weight_decay': 0.0, 'nesterov': False, 'foreach': None}]
    return {
        'meta': {'epoch': 2, 'iter': 24, 'seed': 0, RECORD: {**RECORDED, **NEWLY_RECORDED}},
        'state_dict': copy.deepcopy(runner.model.state_dict()),
        'optimizer': {'state': state, 'param_groups': groups, 'steps': 24},
        'param_schedulers': [{'last_step': 24, '_global_step': 24, 'base_values': [0.1]}],
        'message_hub': {
            'log_scalars': {'train/loss': HistoryBuffer([1.0], [1])},
            'runtime_info': {'keep_ckpt_ids': [2], 'best_score': math.inf, 'other': object()},
            'resumed_keys': {'keep_ckpt_ids': True},
        },
    }


def set_at(checkpoint, path, value):
    *above, last = path.split('/')
    for key in above:
        checkpoint = checkpoint[int(key) if key.isdigit() else key]
    checkpoint[last] = value


def test_what_a_run_saves_passes(checkpoint, runner):
    check_values(checkpoint, runner)
    checkpoint['meta'][RECORD] = RECORDED  # of an earlier version
    check_values(checkpoint, runner)
    del checkpoint['meta'][RECORD]  # of mmengine
    check_values(checkpoint, runner)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('meta/iter', -1, 'meta.iter of the checkpoint is -1, not an integer >= 0'),
        ('meta/epoch', None, 'meta.epoch of the checkpoint is missing'),
        ('meta/seed', 2**32, 'meta.seed of the checkpoint is 4294967296, not an integer from 0 to 4294967295'),
        (f'meta/{RECORD}/batch', True, f'meta.{RECORD}.batch of the checkpoint is True'),
        (f'meta/{RECORD}/data', None, f'meta.{RECORD}.data of the checkpoint is'),
        (f'meta/{RECORD}/classes', None, f'meta.{RECORD}.classes of the checkpoint is'),
        ('optimizer/param_groups/0/lr', -0.1, r'optimizer.param_groups.0.lr of the checkpoint is -0.1'),
        ('optimizer/param_groups/0/params', ['a'], 'optimizer.param_groups of the checkpoint is a list of 1'),
        ('optimizer/state/1/step', 25, r'optimizer.state.1.step of the checkpoint is 25'),
        ('optimizer/steps', 25, 'optimizer.steps of the checkpoint is 25, not at most the number of iterations'),
        ('optimizer/loss_scaler', {'scale': 0.0}, 'optimizer.loss_scaler.scale of the checkpoint is 0.0'),
        ('param_schedulers/0/last_step', 1.5, 'param_schedulers.0.last_step of the checkpoint is 1.5'),
        ('message_hub/log_scalars', {'a': [1]}, 'message_hub.log_scalars of the checkpoint is a dict'),
        ('message_hub/runtime_info/keep_ckpt_ids', ['a'], 'message_hub.runtime_info.keep_ckpt_ids of the checkpoint'),
        ('message_hub/resumed_keys/keep_ckpt_ids', False, 'message_hub.resumed_keys.keep_ckpt_ids of the checkpoint is False'),
    ],
)
def test_the_value_is_named(path, value, message, checkpoint, runner):
    set_at(checkpoint, path, value)
    with pytest.raises(CheckpointError, match=f'^cannot resume: {message}'):
        check_values(checkpoint, runner)


@pytest.mark.parametrize('part', ['state_dict', GRADIENTS, 'ema_state_dict'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_parameters_are_finite(part, value, checkpoint, runner):
    check_finite(checkpoint, runner)
    name = 'module.bias' if part == 'ema_state_dict' else 'bias'
    checkpoint[part] = {**checkpoint.get(part, {}), name: torch.full((1,), value)}
    with pytest.raises(CheckpointError, match=f'cannot resume: {part}.{name} of the checkpoint is not finite'):
        check_finite(checkpoint, runner)


def test_an_infinity_of_a_buffer_or_of_the_new_model_is_no_damage(checkpoint, runner):
    checkpoint['optimizer']['state'][0]['momentum_buffer'].fill_(math.inf)
    check_finite(checkpoint, runner)
    checkpoint['optimizer']['state'][0]['momentum_buffer'].fill_(math.nan)
    with pytest.raises(CheckpointError, match=r'optimizer.state.0.momentum_buffer of the checkpoint is not finite'):
        check_finite(checkpoint, runner)
    checkpoint['optimizer']['state'] = {}
    for tensor in (runner.model.bias.data, checkpoint['state_dict']['bias']):
        tensor.fill_(math.inf)
    check_finite(checkpoint, runner)


def test_gradients_under_a_loss_scaler_may_overflow(checkpoint, runner):
    checkpoint[GRADIENTS] = {'bias': torch.full((1,), math.inf)}
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu')
    check_finite(checkpoint, runner)


def test_a_log_buffer_has_as_many_counts_as_values(checkpoint, runner):
    checkpoint['message_hub']['log_scalars']['train/loss']._count_history = np.ones(2)
    with pytest.raises(CheckpointError, match='message_hub.log_scalars of the checkpoint'):
        check_values(checkpoint, runner)
