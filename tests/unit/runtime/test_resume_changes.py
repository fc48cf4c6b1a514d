"""Positions in the data that a run can't have, and changes of data and options that it goes on with.

Checkpoints of real runs are in tests/integration/test_resume_checks.py.
"""

from types import SimpleNamespace

import pytest

from mmman.errors import CheckpointError
from mmman.runtime.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmman.runtime.resume_changes import changed_position


class Epochs(EpochBasedTrainLoop):
    """mmman's loop with ten batches an epoch, of which only the position in the data is asked."""

    max_epochs = 3
    batches, sampler_seed = 10, 5

    def __init__(self):
        self._pass = self._pass_start = 0

    def data_signature(self):
        return {'processes': 1, 'batch size': 2, 'dataset length': 20}


class Iterations(IterBasedTrainLoop, Epochs):
    max_iters = 30

    def __init__(self):
        Epochs.__init__(self)


DATA = {'processes': 1, 'batch size': 2, 'dataset length': 20}


def record(batch, by_epoch=True, **changes):
    return {'by epoch': by_epoch, 'batch': batch, 'regular': True, 'batches': 10, 'sampler seed': 5, 'data': DATA, **changes}


def notes(epoch, iteration, recorded, loop=Epochs):
    meta, runner = {'epoch': epoch, 'iter': iteration}, SimpleNamespace(train_loop=loop())
    return [*changed_position(meta, recorded, runner)]


@pytest.mark.parametrize(('epoch', 'iteration', 'batch'), [(0, 3, 3), (2, 20, 0), (2, 24, 4), (3, 30, 0)])
def test_positions_of_a_run_of_epochs(epoch, iteration, batch):
    assert notes(epoch, iteration, record(batch)) == []


@pytest.mark.parametrize('iteration', [0, 7, 30])
def test_positions_of_a_run_of_iterations(iteration):
    assert notes(0, iteration, record(iteration, by_epoch=False), Iterations) == []


@pytest.mark.parametrize(
    ('epoch', 'iteration', 'recorded', 'loop', 'message'),
    [
        (2, 24, record(5), Epochs, 'batch 5 of epoch 2 after 24 iterations is impossible'),
        (1, 21, record(11), Epochs, 'batch 11 of epoch 1 after 21 iterations is impossible'),
        (0, 7, record(6, by_epoch=False), Iterations, 'batch 6 of epoch 0 after 7 iterations is impossible'),
        (4, 40, record(0), Epochs, 'after 4 epochs, but train_cfg.max_epochs is 3: raise it'),
        (0, 31, record(31, by_epoch=False), Iterations, 'after 31 iters, but train_cfg.max_iters is 30: raise it'),
        (2, 24, record(4), Iterations, 'the checkpoint counts epochs, train_cfg iterations'),
        (2, 24, record(4, data={**DATA, 'batch size': 4}), Epochs, 'at batch 4 of an epoch with other data: batch size is 4'),
        (2, 24, record(4, batches=12), Epochs, 'batches is 12 in the checkpoint, 10 in this run'),
        (2, 24, record(4, **{'sampler seed': None}), Epochs, 'sampler seed is missing in the checkpoint'),
        (2, 1, record(0, data={**DATA, 'batch size': 4}), Epochs, 'batch 0 of epoch 2 after 1 iterations is impossible'),
    ],
)
def test_other_positions_are_refused(epoch, iteration, recorded, loop, message):
    with pytest.raises(CheckpointError, match=f'^cannot resume.*{message}'):
        notes(epoch, iteration, recorded, loop)


def test_between_epochs_the_data_may_change_with_a_note():
    (note,) = notes(2, 36, record(0, data={**DATA, 'dataset length': 36}, batches=18))
    assert note == 'The run continues with other data: dataset length is 36 in the checkpoint, 20 in this run'
    assert notes(2, 36, record(0, regular=False)) == []  # its epochs had been of other lengths already


def test_a_checkpoint_of_another_loop_is_not_exact():
    (note,) = notes(2, 24, {})
    assert 'was not saved by a loop of mmman' in note
