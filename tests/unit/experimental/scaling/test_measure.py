"""Marks at the boundaries of a training step: with FLOPs for seconds they count what arithmetic says."""

import pytest
import torch
from mmengine.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from mmman import LocalLearningError, LocalLearningOptimWrapper
from mmman.experimental.scaling.measure import ProfileMeter
from tests.toy import toy_batches, toy_config


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = MODELS.build(toy_config(num_blocks=3, partition=['layer1.1', 'layer2.1'], net={'out_indices': (0, 1, 2)}))
    for name, width in (('head', (4, 8, 16)),):
        setattr(model, name, torch.nn.ModuleList(torch.nn.Linear(c, 5) for c in width))
    model.data_preprocessor.forward = lambda data, training=False: data
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return model.train()


def measured(model, **options):
    wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))
    (batch,) = toy_batches(1, dtype=torch.float32)
    meter = ProfileMeter(model, wrapper, batch, **options)
    meter.lap()
    return meter.profile(warmup=0)


def flops_of(module, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = module(x)
    return counter.get_total_flops(), y


def test_flops_of_every_part(toy):
    with FlopCounterMode(display=False) as counter:
        profile = measured(toy, clock=counter.get_total_flops)
    x, backbone = toy_batches(1, dtype=torch.float32)[0]['inputs'], toy.backbone
    units = [[backbone.stem, *backbone.layer1], [*backbone.layer2], [*backbone.layer3]]
    for j, block in enumerate(units):
        expected = 0
        for unit in block:
            flops, x = flops_of(unit, x)
            expected += flops
        assert profile.blocks[j].forward == profile.end_to_end[j].forward == expected
    # The backward pass costs twice the forward pass, but for the gradient of the images, which nobody wants.
    stem = flops_of(backbone.stem, toy_batches(1, dtype=torch.float32)[0]['inputs'])[0]
    for j, (part, block) in enumerate(zip(profile.end_to_end, profile.blocks, strict=True)):
        inner = part.head + part.forward
        assert part.backward == pytest.approx(2 * inner - (stem if j == 0 else 0), rel=0.02)
        assert block.head > 0 and (part.head > 0) == (j == 2)
        assert block.update == part.update == 0
    # Momentum and bias: two copies of the first unit of the next block.
    twice = 2 * flops_of(backbone.layer2[0], torch.zeros(4, 4, 16, 16))[0]
    assert profile.blocks[0].head > twice


def test_bytes_are_counted_exactly(toy):
    profile = measured(toy)
    first, second, last = profile.blocks
    assert profile.batch == 4 and profile.images == 4 * 4 * 3 * 16 * 16 and profile.labels == 4 * 8
    assert first.features == first.taps == 4 * 4 * 4 * 16 * 16
    assert second.features == second.taps == 4 * 4 * 8 * 8 * 8
    assert last.features == last.taps == first.first_unit == 0
    assert profile.message(1) == second.features + first.taps + profile.labels
    parameters = {name: p.nbytes for name, p in toy.named_parameters() if p.requires_grad}
    assert second.gradients == sum(size for name, size in parameters.items() if name.startswith('backbone.layer2'))
    assert second.head_gradients == sum(size for name, size in parameters.items() if '.local.layer2_1' in name)
    assert last.head_gradients == sum(size for name, size in parameters.items() if name.startswith('head.'))
    assert sum(b.gradients + b.head_gradients for b in profile.blocks) == sum(parameters.values())
    assert profile.end_to_end[-1].head_gradients == last.head_gradients and not profile.end_to_end[0].head_gradients
    unit = toy.backbone.layer2[0]
    floats = [t for t in unit.state_dict().values() if t.is_floating_point()]
    assert second.first_unit == sum(t.nbytes for t in floats)


def test_times_are_positive_and_the_model_is_as_it_was(toy):
    before = {name: value.clone() for name, value in toy.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in toy.modules())
    profile = measured(toy)
    for block in (*profile.blocks, *profile.end_to_end):
        assert block.forward > 0 and block.backward > 0 and block.update > 0
    assert all(torch.equal(before[name], value) for name, value in toy.named_parameters())
    assert hooks == sum(len(module._forward_hooks) for module in toy.modules())


def test_a_model_in_one_block_is_refused():
    with pytest.raises(LocalLearningError, match='num_blocks of at least 2'):
        measured(MODELS.build(toy_config(num_blocks=1)))
