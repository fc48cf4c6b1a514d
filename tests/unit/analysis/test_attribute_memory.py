"""The order in which the parts of a step are told."""

from functools import partial

import pytest
from torch.utils.checkpoint import checkpoint

from mmman.analysis.attribute_memory import TASK, attribute_memory
from tests.unit.analysis.test_training import CUTS, toy_meter

END = ['rest', 'optimizer step', 'rest']
END_TO_END = ['block 1', 'block 2', 'block 3', TASK, 'block 3', 'block 2', 'block 1', *END]


class Recorder:
    """Writes down every change of its part, in place of counting."""

    def __init__(self):
        self.told = []

    @property
    def part(self):
        return self.told[-1] if self.told else None

    @part.setter
    def part(self, part):
        if part != self.part:
            self.told.append(part)

    def claim(self, tensor, part):
        assert part == 'gradients' and tensor is not None


def told_by(meter):
    recorder = Recorder()
    with attribute_memory(recorder, meter.model, meter.optim_wrapper, meter.outputs):
        meter.step()
    told = [*recorder.told]
    meter.step()
    assert recorder.told == told  # nothing is left behind
    return told


def test_end_to_end():
    assert told_by(toy_meter(num_blocks=1, outputs=CUTS)) == END_TO_END
    assert told_by(toy_meter(num_blocks=1, outputs=('layer1.1', 'layer9'))) == ['block 1', TASK, 'block 1', *END]


@pytest.mark.parametrize('path', ['layer2.1', 'layer2'])
@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant, path):
    meter = toy_meter(num_blocks=1, outputs=CUTS)
    layer = meter.model.backbone.get_submodule(path)
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    assert told_by(meter) == END_TO_END


@pytest.mark.parametrize('update', ['synchronous', 'immediate'])
def test_local(update):
    step = ['optimizer step'] if update == 'immediate' else []
    expected = []
    for j in (1, 2):
        block = f'block {j}'
        expected += [block, f'local head {j}', block, *step, *([block] if step else [])]
    assert told_by(toy_meter(update=update)) == [*expected, 'block 3', TASK, 'block 3', *END]
