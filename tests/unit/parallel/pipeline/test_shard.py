"""The tensors that a stage holds: split off, filled in for evaluation, emptied again."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from mmman.errors import ConfigError
from mmman.parallel.pipeline.shard import StageShard
from tests.toy import toy_config


def test_a_shard_is_filled_and_emptied():
    whole = MODELS.build(toy_config(num_blocks=2))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    shard = StageShard(whole, 1)
    shard.split_(torch.optim.SGD(whole.parameters(), lr=0.1), 'cpu')
    held = {name for name, value in whole.state_dict().items() if not value.is_meta}
    assert held == shard.weights().keys() != state.keys()
    with pytest.raises(ConfigError, match='no stage holds backbone'):
        shard.fill_({})
    shard.fill_(state)
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    shard.empty_()
    assert {name for name, value in whole.state_dict().items() if not value.is_meta} == held


def test_shards_of_all_stages_are_the_whole_model_and_optimizer():
    whole = MODELS.build(toy_config(num_blocks=3))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    weights, steps = {}, {}
    for stage in range(3):
        model = copy.deepcopy(whole)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter]['momentum_buffer'] = parameter.detach().clone()
        shard = StageShard(model, stage)
        shard.split_(optimizer, 'cpu')
        assert not weights.keys() & shard.weights().keys() and not steps.keys() & shard.optimizer_state(optimizer).keys()
        weights |= shard.weights()
        steps |= shard.optimizer_state(optimizer)
    assert weights.keys() == state.keys() and all(torch.equal(weights[name], value) for name, value in state.items())
    for i, parameter in enumerate(whole.parameters()):
        assert torch.equal(steps[i]['momentum_buffer'], parameter)
