"""Memory, FLOPs and seconds of a step on a toy: what arithmetic says, and what its blocks alone say."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmman import LocalLearningOptimWrapper
from mmman.analysis import LiveBytes
from mmman.analysis.training import StepMeter
from tests.toy import block_parameters, toy_batches, toy_config

CUTS = ('layer1.1', 'layer2.1')


class WideHead(nn.Linear):
    """A classifier behind so much memory that the peak is there."""

    def forward(self, x):
        return super().forward(x) + 0 * x.new_zeros(1 << 20).sum()


def toy_meter(num_blocks=3, outputs=(), update='synchronous', **options):
    torch.manual_seed(0)
    cuts = CUTS if num_blocks == 3 else 'stage'
    model = MODELS.build(toy_config(num_blocks, cuts, net={'out_indices': (1, 2)}, **options)).train()
    model.head = nn.ModuleList((WideHead(8, 5), WideHead(16, 5)))
    model.data_preprocessor.forward = lambda data, training=False: {**data, 'inputs': data['inputs'] * 2}
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    wrapper = LocalLearningOptimWrapper(optimizer, update=update)
    return StepMeter(model, wrapper, toy_batches(1, dtype=torch.float32)[0], outputs)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def kept_by_blocks(meter):
    """Bytes that every block, run forward alone, leaves alive: its output, and what its backward pass needs."""
    backbone, x, kept = meter.model.backbone, 2 * meter.data['inputs'], []
    for block in ([backbone.stem, *backbone.layer1], [*backbone.layer2], [*backbone.layer3]):
        with LiveBytes(meter.model, x) as live:
            before = live.current
            y = nn.Sequential(*block).forward(x.detach().requires_grad_())
            kept.append(live.current - before)
        x = y
    return kept


def test_parts_of_end_to_end_training():
    meter = toy_meter(num_blocks=1, outputs=CUTS)
    model = meter.model
    memory = meter.memory()
    parts, parameters = memory.parts, [*model.parameters()]
    assert sum(parts.values()) == memory.peak
    assert parts['parameters'] == parts['optimizer state'] == nbytes(parameters)
    assert parts['buffers'] == nbytes(model.buffers())
    assert parts['input'] == 2 * meter.data['inputs'].nbytes + meter.data['data_samples'].nbytes
    assert [parts[f'block {j}'] for j in (1, 2, 3)] == kept_by_blocks(meter)
    assert 'gradients' not in parts and 'momentum copies' not in parts
    assert parts['neck, head, loss'] > 4 << 20


@pytest.mark.parametrize('update', ['synchronous', 'immediate'])
def test_parts_of_local_training(update):
    meter = toy_meter(update=update)
    model, local = meter.model, meter.model.backbone.local
    memory = meter.memory()
    parts = memory.parts
    momentum = [head.transfer.momentum for head in local.values()]
    copies = nbytes(t for module in momentum for t in (*module.parameters(), *module.buffers()))
    assert sum(parts.values()) == memory.peak
    assert parts['momentum copies'] == copies
    assert parts['momentum copies'] + parts['parameters'] + parts['buffers'] == nbytes((*model.parameters(), *model.buffers()))
    # The peak is in the task's head: of block 1 nothing is left, of block 2 its output, which block 3 and the head need.
    assert 'block 1' not in parts and parts['block 2'] == 4 * (4 * 8 * 8 * 8)
    assert parts['block 3'] == kept_by_blocks(meter)[2]
    trained = [p for block in block_parameters(model.backbone) for p in block if p.requires_grad]
    assert parts.get('gradients', 0) == (nbytes(trained) if update == 'synchronous' else 0)


def test_local_heads_count_where_they_run():
    curves = toy_meter().memory().curves
    for j in (1, 2):
        assert curves[f'local head {j}'].max() > 0 and curves[f'local head {j}'][-1] == 0
    assert curves['local head 1'].argmax() < curves['local head 2'].argmax() < curves['neck, head, loss'].argmax()
    assert curves['block 2'].argmax() < curves['block 3'].argmax()


def test_curves_add_up_and_keep_the_peak():
    memory = toy_meter().memory()
    total = sum(memory.curves.values())
    assert len(total) <= 1000
    assert total.max() == memory.peak
    assert {name: curve[total.argmax()] for name, curve in memory.curves.items() if curve[total.argmax()]} == memory.parts


def test_the_floor_is_below_the_peak_and_leaves_no_trace():
    meter = toy_meter()
    memory = meter.memory()
    model, optimizer = meter.model, meter.optim_wrapper.optimizer
    held = LiveBytes(model, optimizer, meter.data).current
    floor = meter.floor()
    assert held + (4 << 20) < floor < memory.peak
    assert LiveBytes(model, optimizer, meter.data).current == held
    again = meter.memory()
    assert (again.peak, again.parts) == (memory.peak, memory.parts)


def test_flops():
    whole, local = toy_meter(num_blocks=1), toy_meter()
    x = 2 * whole.data['inputs']
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        whole.model(x)
    forward = counter.get_total_flops()
    stem = 2 * 4 * 256 * 4 * 27  # multiply and add, batch, pixels, output channels, weights each; images want no gradient
    assert whole.memory().flops == 3 * forward - stem
    assert local.memory().flops > whole.memory().flops


def test_a_step_moves_the_momentum_copies():
    meter = toy_meter()
    (head, *_) = meter.model.backbone.local.values()
    copied, source = head.transfer.momentum.conv.weight, head.source.of(meter.model.backbone).conv.weight
    copied.zero_()
    meter.step()
    torch.testing.assert_close(copied, 0.005 * source.detach())


def test_seconds_are_those_of_a_step():
    meter = toy_meter()
    before = meter.optim_wrapper.steps
    assert 0 < meter.seconds() < 10
    assert meter.optim_wrapper.steps == before + 1
