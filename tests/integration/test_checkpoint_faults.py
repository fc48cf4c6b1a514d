"""SIGKILL while a checkpoint is written: the last complete one is there, and the resumed run ends as the whole one."""

import itertools
import os
import signal
from pathlib import Path

import pytest
from mmengine.evaluator import BaseMetric, Evaluator

from mmman.runtime.atomic_files import AtomicBackend
from mmman.runtime.checkpoint_files import check_training_checkpoint, latest_checkpoint
from tests.integration.test_resume import EPOCHS, assert_same_training, checkpoint_in, load, loader_of, start, whole


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def of_checkpoint(action, otherwise=None):
    """An operating system's function that does something else where it is called for a checkpoint's own file."""

    def replaced(file, *rest):
        path = os.readlink(f'/proc/self/fd/{file}') if isinstance(file, int) else os.fspath(file)
        if Path(path).name.startswith('iter_6.pth') or Path(path).name.startswith('iter_5.pth'):
            return action(file, *rest)
        return otherwise(file, *rest)

    return replaced


def half(file: int) -> None:
    os.ftruncate(file, os.fstat(file).st_size // 2)
    die()


KILLS = {
    'half of the checkpoint is written': ('fsync', of_checkpoint(half, os.fsync)),
    'the checkpoint has no name yet': ('replace', of_checkpoint(die, os.rename)),
    'the note of the latest is not written': (
        'replace',
        lambda old, new: die() if str(new).endswith('last_checkpoint') else os.rename(old, new),
    ),
    'the old checkpoint is not removed': ('remove', of_checkpoint(die, os.unlink)),
}


@pytest.fixture(scope='module')
def reference(tmp_path_factory) -> dict:
    """The checkpoint of a run by epochs that was never stopped."""
    return whole(tmp_path_factory.mktemp('reference'))


@pytest.mark.parametrize('moment', KILLS)
def test_a_kill_while_a_checkpoint_is_written(moment, reference, tmp_path, monkeypatch):
    name, replacement = KILLS[moment]
    start(tmp_path, stop=5, seed=5)
    process = os.fork()
    if process == 0:  # killed while it saves iteration 6
        try:
            monkeypatch.setattr(os, name, replacement)
            start(tmp_path, resume=latest_checkpoint(tmp_path))
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    found = sorted(path.name for path in tmp_path.glob('iter_*'))
    assert (
        found
        == {
            'fsync': ['iter_5.pth', 'iter_6.pth.unfinished'],
            'replace': ['iter_5.pth', f'iter_6.pth{"" if "note" in moment else ".unfinished"}'],
            'remove': ['iter_5.pth', 'iter_6.pth'],
        }[name]
    )
    latest = latest_checkpoint(tmp_path)
    check_training_checkpoint(latest)
    start(tmp_path, resume=latest, stop=7)
    assert sorted(path.name for path in tmp_path.glob('iter_*')) == ['iter_7.pth']
    start(tmp_path, resume=latest_checkpoint(tmp_path))
    assert_same_training(load(checkpoint_in(tmp_path)), reference)


class RisingScore(BaseMetric):
    """Each validation is better than the one before."""

    scores = itertools.count()

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {'score': float(next(self.scores))}


def test_best_checkpoints_go_when_their_successors_are_complete(tmp_path, monkeypatch):
    present = []
    remove = AtomicBackend.remove

    def watched(backend, path):
        present.append((Path(path).name, {file.name for file in tmp_path.glob('*.pth')}))
        remove(backend, path)

    monkeypatch.setattr(AtomicBackend, 'remove', watched)
    checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 4, 'max_keep_ckpts': 1}
    start(
        tmp_path,
        seed=0,
        train_cfg={'type': 'mmman.EpochBasedTrainLoop', 'max_epochs': EPOCHS, 'val_interval': 1},
        val_cfg={},
        val_dataloader=loader_of(),
        val_evaluator=Evaluator(RisingScore()),
        default_hooks={'logger': None, 'checkpoint': {**checkpoint, 'save_best': 'score', 'rule': 'greater'}},
    )

    assert present == [
        ('iter_4.pth', {'iter_4.pth', 'best_score_iter_4.pth', 'iter_8.pth'}),
        ('best_score_iter_4.pth', {'best_score_iter_4.pth', 'best_score_iter_8.pth', 'iter_8.pth'}),
        ('iter_8.pth', {'iter_8.pth', 'best_score_iter_8.pth', 'iter_12.pth'}),
        ('best_score_iter_8.pth', {'best_score_iter_8.pth', 'best_score_iter_12.pth', 'iter_12.pth'}),
    ]
    assert {path.name for path in tmp_path.glob('*.pth')} == {'best_score_iter_12.pth', 'iter_12.pth'}
