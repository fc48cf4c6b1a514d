"""An optimizer that holds the parameters of one block only, for as long as it steps them."""

import pytest
import torch
from torch import nn

from mmman.engine.block_groups import BlockGroups


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.ones(2)) for _ in range(5)]


@pytest.fixture
def optimizer(parameters):
    """Two groups: the first holds parameters of both blocks and of the final one, the second of block 2 alone."""
    groups = [{'params': parameters[:4]}, {'params': parameters[4:], 'lr': 0.5}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(('block', 'stepped'), [(1, [0, 1]), (2, [2, 4])])
def test_only_the_blocks_parameters_step_with_the_options_of_their_groups(optimizer, parameters, block, stepped):
    blocks = BlockGroups(optimizer, [parameters[:2], [parameters[2], parameters[4]]])
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    with blocks.restrict(block):
        optimizer.step()
        optimizer.zero_grad()
    rates = [0.1] * 4 + [0.5]
    for i, parameter in enumerate(parameters):
        assert parameter.tolist() == pytest.approx([1 - rates[i] * (i in stepped)] * 2)
        assert (parameter.grad is None) == (i in stepped)
    assert {*optimizer.state} == {parameters[i] for i in stepped}


def test_the_groups_return_also_after_an_error(optimizer, parameters):
    groups, held = optimizer.param_groups, [group['params'] for group in optimizer.param_groups]
    blocks = BlockGroups(optimizer, [parameters[:2], [parameters[2], parameters[4]]])
    with pytest.raises(ZeroDivisionError), blocks.restrict(1):
        raise ZeroDivisionError
    assert optimizer.param_groups is groups
    assert all(group['params'] is own for group, own in zip(groups, held, strict=True))


def test_a_parameter_of_no_block_belongs_to_the_final_one(optimizer, parameters):
    blocks = BlockGroups(optimizer, [parameters[:2], [parameters[2], parameters[4]]])
    assert [blocks.block_of.get(parameter) for parameter in parameters] == [1, 1, 2, None, 2]
