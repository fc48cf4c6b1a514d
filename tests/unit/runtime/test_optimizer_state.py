"""What an optimizer keeps is known before its first step: compared with what it keeps after one."""

import pytest
import torch
from torch import nn, optim

from mmman.runtime.compare import kind
from mmman.runtime.optimizer_state import ExpectedState

SHAPES = [(), (4,), (3, 4), (4, 3, 2, 2)]


@pytest.mark.parametrize(
    ('kind_of_optimizer', 'options'),
    [
        ('SGD', {}),
        ('SGD', {'momentum': 0.9}),
        ('Adam', {'amsgrad': True}),
        ('AdamW', {'capturable': True}),
        ('Adagrad', {}),
        ('Adafactor', {}),
        ('RMSprop', {'centered': True, 'momentum': 0.1}),
        ('NAdam', {}),
        ('ASGD', {}),
        ('Rprop', {}),
    ],
)
def test_what_is_expected_is_what_a_step_leaves(kind_of_optimizer, options):
    parameters = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = getattr(optim, kind_of_optimizer)(parameters, lr=0.1, **options)
    (group,) = optimizer.param_groups
    expected = [ExpectedState(optimizer).of(parameter, group) for parameter in parameters]
    assert not any(optimizer.state.values()) or kind_of_optimizer == 'Adagrad'
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in parameters)
    group |= {'capturable': False} if 'capturable' in group else {}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert expected == [{name: kind(value) for name, value in optimizer.state[p].items()} for p in parameters]


def test_an_optimizer_that_needs_more_than_a_gradient_is_not_guessed():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optim.LBFGS([parameter])
    assert ExpectedState(optimizer).of(parameter, optimizer.param_groups[0]) is None
