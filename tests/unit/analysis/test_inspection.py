"""Gradients, dead channels and distances of the toy network against direct computations."""

import pytest
import torch

from mmman import LocalLearningOptimWrapper
from mmman.analysis.inspection import StepMonitor, copy_distance
from mmman.engine.block_parameters import parameters_by_block
from tests.toy import toy_batches
from tests.unit.local.test_session import toy


def wrapper_of(model, **options):
    return LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0), **options)


def measured(model, **options):
    optim_wrapper = wrapper_of(model, **options)
    blocks = [[*block.values()] for block in parameters_by_block(model)]
    with StepMonitor(model.backbone, optim_wrapper.optimizer, blocks) as monitor:
        model.train_step(toy_batches(1)[0], optim_wrapper)
    return monitor, blocks


@pytest.mark.parametrize('options', [{}, {'update': 'immediate'}])
def test_gradients_are_those_of_each_block(options):
    monitor, _ = measured(toy(), **options)
    model = toy()
    blocks = [[*block.values()] for block in parameters_by_block(model)]
    norms = []
    optim_wrapper = wrapper_of(model)  # the same step; the norms are computed here, before the gradients are freed
    optim_wrapper.optimizer.register_step_pre_hook(
        lambda *_: norms.extend(sum(float((p.grad**2).sum()) for p in block if p.grad is not None) ** 0.5 for block in blocks)
    )
    model.train_step(toy_batches(1)[0], optim_wrapper)
    assert [*monitor.gradients] == [1, 2, 3, 4] and min(norms) > 0 and len({*norms}) == 4
    assert [*monitor.gradients.values()] == pytest.approx(norms, rel=1e-12)


def test_gradients_are_those_after_clipping():
    monitor, _ = measured(toy(), clip_grad={'max_norm': 0.01})
    assert [*monitor.gradients.values()] == pytest.approx([0.01] * 4, rel=1e-3)


def test_the_share_of_dead_channels():
    model = toy()
    unit = model.backbone.get_submodule(model.backbone.local.plan.blocks[1][-1].output)
    with torch.no_grad():  # a channel is below zero everywhere in front of the ReLU
        unit.bn.weight[:3], unit.bn.bias[:3] = 0, -1e6
    monitor, _ = measured(model)
    assert [*monitor.dead] == [1, 2, 3, 4]
    assert monitor.dead[2] == pytest.approx(3 / unit.bn.num_features)
    assert monitor.dead[1] == 0


def test_a_channel_that_is_zero_in_one_image_only_is_alive():
    model = toy(num_blocks=1)
    monitor = StepMonitor(model.backbone, wrapper_of(model).optimizer, [])
    output = torch.zeros(2, 4, 3, 3)
    output[1, 0, 2, 2], output[0, 1, 0, 0] = -1, 1
    with monitor:
        monitor._measure_output(1)(None, (), output)
        assert monitor.dead == {1: 0.5}
        monitor._measure_output(1)(None, (), output.roll(2, 1))  # the rest of the batch, where it runs in parts
        monitor._measure_output(2)(None, (), torch.tensor([[[0.0, 1, 0]], [[0, 1, 0]]]))  # tokens (B, L, C)
    assert monitor.dead == {1: 0, 2: pytest.approx(2 / 3)}


def test_nothing_is_left_behind():
    model = toy()
    before = [len(module._forward_hooks) for module in model.modules()]
    _, _ = measured(model)
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_the_distance_is_relative_to_the_source():
    model = toy()
    head = next(iter(model.backbone.local.values()))
    source = head.source.of(model.backbone)
    head.transfer.init_from_(source)
    assert copy_distance(head, model.backbone) == 0
    with torch.no_grad():
        for parameter in head.transfer.momentum.parameters():
            parameter.mul_(1.25)
        for buffer in head.transfer.momentum.buffers():  # statistics don't count
            buffer.add_(1)
    assert copy_distance(head, model.backbone) == pytest.approx(0.25, rel=1e-12)


def test_without_a_momentum_copy_there_is_no_distance():
    model = toy(transfer={'ema': False, 'bias': False, 'scale': False})
    assert {copy_distance(head, model.backbone) for head in model.backbone.local.values()} == {None}
