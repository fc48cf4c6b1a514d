"""Which files a resumed run removes: those that it wrote into its own folder, and no others, whatever a checkpoint says."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator

from mmman.runtime.ledger import Ledger
from tests.integration.test_resume import EPOCHS, load, loader_of, start


def files(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder, but for logs: names and contents."""
    found = sorted(path for path in folder.rglob('*') if 'pth' in path.name or path.suffix == '.txt')
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def run(folder: Path, stop: int = 6, keep: int = 1, **options):
    checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 1, 'max_keep_ckpts': keep}
    options.setdefault('default_hooks', {'logger': None, 'checkpoint': checkpoint})
    return start(folder, seed=0, stop=stop, **options)


def alter(path: Path, **info) -> None:
    """Change what a checkpoint says about files, and let it look as if the run had written it so."""
    status = path.stat()
    checkpoint = load(path)
    checkpoint['message_hub']['runtime_info'].update(info)
    checkpoint['message_hub']['resumed_keys'].update(dict.fromkeys(info, True))
    torch.save(checkpoint, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    ledger = Ledger(path.parent)
    entry = ledger.with_entry(path.name, ledger._entries()[path.name]['run'], path.stat())
    ledger.path.write_bytes(entry)


@pytest.fixture
def other(tmp_path) -> Path:
    """The folder of another run, with two checkpoints, a best one and notes."""
    folder = tmp_path / 'other'
    run(folder, keep=2)
    shutil.copy(folder / 'iter_6.pth', folder / 'best_score_iter_6.pth')
    (folder / 'notes.txt').write_text('precious')
    return folder


def test_a_checkpoint_that_names_files_of_another_run_removes_none(other, tmp_path):
    mine = tmp_path / 'mine'
    run(mine)
    (mine / 'notes.txt').write_text('precious')
    shutil.copy2(other / 'iter_5.pth', mine / 'iter_3.pth')  # another run's, under a name that this one could have used
    (mine / 'iter_2.pth').symlink_to(other / 'iter_6.pth')
    (mine / 'iter_1.pth').mkdir()
    (mine / 'link').symlink_to(other)
    names = ['iter_5.pth', 'iter_6.pth', 'best_score_iter_6.pth', 'notes.txt']
    listed = [
        *(str(other / name) for name in names),
        *(f'{mine}/../other/{name}' for name in names),
        *(f'{mine}/link/{name}' for name in names),
        *(os.path.relpath(other / name) for name in names),
        *(str(mine / f'iter_{step}.pth') for step in (1, 2, 3, 6)),
        str(mine / 'notes.txt'),
        f'{mine}/iter_6.pth/../iter_3.pth',
        'iter_3.pth\0',
        '',
    ]
    keep = [1, 2, 3, '../other/iter_5', -1, 10**30, True]
    alter(mine / 'iter_6.pth', superseded_ckpts=listed, keep_ckpt_ids=keep, best_ckpt=str(other / 'iter_5.pth'))
    before = [files(other), files(mine)]
    # not by the loops of mmman, which refuse such lists before
    runner = run(mine, 8, keep=2, resume=mine / 'iter_6.pth', train_cfg={'type': 'EpochBasedTrainLoop', 'max_epochs': EPOCHS})
    after = files(mine)
    assert files(other) == before[0]
    assert {name: after[name] for name in before[1] if name != 'iter_6.pth'} == {
        name: content for name, content in before[1].items() if name != 'iter_6.pth'
    }
    assert set(after) - set(before[1]) == {'iter_7.pth', 'iter_8.pth'}
    assert runner.message_hub.get_info('best_ckpt') is None


def test_a_copy_of_a_folder_goes_on_without_the_first_one(tmp_path):
    first, copy = tmp_path / 'first', tmp_path / 'copy'
    run(first, keep=2)
    shutil.copytree(first, copy)
    before = files(first)
    run(copy, 8, keep=2, resume=copy / 'iter_6.pth')
    assert files(first) == before
    assert sorted(files(copy)) == ['iter_7.pth', 'iter_8.pth']  # its own copies are pruned as in the first folder


@pytest.mark.parametrize('place', ['in another folder', 'through a link', 'in the folder, by another run', 'changed since'])
def test_what_is_resumed_from_elsewhere_is_another_run(place, tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    run(first, keep=2)
    run(second, keep=2)
    resumed = first / 'iter_6.pth'
    if place == 'through a link':
        resumed = second / 'latest.pth'
        resumed.symlink_to(first / 'iter_6.pth')
    elif place == 'in the folder, by another run':
        resumed = shutil.copy2(first / 'iter_6.pth', second / 'iter_0.pth')
    elif place == 'changed since':
        resumed = second / 'iter_6.pth'
        resumed.touch()
    before = [files(first), files(second)]
    run(second, 8, keep=2, resume=resumed)
    after = files(second)
    assert files(first) == before[0]
    assert {name: after[name] for name in before[1]} == before[1]
    assert set(after) - set(before[1]) == {'iter_7.pth', 'iter_8.pth'}


def test_two_runs_share_a_folder(tmp_path):
    run(tmp_path, 3, keep=2)
    checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 1, 'max_keep_ckpts': 1}
    checkpoint['filename_tmpl'] = 'second_{}.pth'
    second = {'logger': None, 'checkpoint': checkpoint}
    run(tmp_path, 3, default_hooks=second)
    assert sorted(files(tmp_path)) == ['iter_2.pth', 'iter_3.pth', 'second_3.pth']
    (tmp_path / 'iter_9.pth.unfinished').touch()  # the first run may be writing it
    run(tmp_path, 5, default_hooks=second, resume=tmp_path / 'second_3.pth')
    assert sorted(files(tmp_path)) == ['iter_2.pth', 'iter_3.pth', 'iter_9.pth.unfinished', 'second_5.pth']
    run(tmp_path, 4, keep=2, resume=tmp_path / 'iter_3.pth')
    assert sorted(files(tmp_path)) == ['iter_3.pth', 'iter_4.pth', 'iter_9.pth.unfinished', 'second_5.pth']


def test_a_resumed_run_keeps_fewer(tmp_path):
    run(tmp_path, keep=4)
    assert sorted(files(tmp_path)) == [f'iter_{step}.pth' for step in (3, 4, 5, 6)]
    run(tmp_path, 7, keep=2, resume=tmp_path / 'iter_6.pth')
    assert sorted(files(tmp_path)) == ['iter_6.pth', 'iter_7.pth']


class FallingScore(BaseMetric):
    scores = itertools.count()

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {'score': float(next(self.scores)), 'loss': float(-next(self.scores))}


@pytest.mark.parametrize('indicators', ['score', ['score', 'loss']])
def test_the_best_checkpoint_is_replaced_across_a_resume_and_only_the_runs_own(indicators, other, tmp_path):
    def best(folder, stop, **options):
        checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 4, 'max_keep_ckpts': 1}
        rule = ['greater', 'less'] if isinstance(indicators, list) else 'greater'
        return run(
            folder,
            stop,
            train_cfg={'type': 'mmman.EpochBasedTrainLoop', 'max_epochs': EPOCHS, 'val_interval': 1},
            val_cfg={},
            val_dataloader=loader_of(),
            val_evaluator=Evaluator(FallingScore()),
            default_hooks={'logger': None, 'checkpoint': {**checkpoint, 'save_best': indicators, 'rule': rule}},
            **options,
        )

    names = ['score', 'loss'] if isinstance(indicators, list) else ['score']
    best(tmp_path / 'mine', 5)
    best(tmp_path / 'mine', 9, resume=tmp_path / 'mine' / 'iter_4.pth')
    assert set(files(tmp_path / 'mine')) == {'iter_8.pth', *(f'best_{name}_iter_8.pth' for name in names)}

    before = files(other)
    keys = [f'best_ckpt_{name}' for name in names] if isinstance(indicators, list) else ['best_ckpt']
    alter(tmp_path / 'mine' / 'iter_8.pth', **dict.fromkeys(keys, str(other / 'best_score_iter_6.pth')))
    best(tmp_path / 'mine', 99, resume=tmp_path / 'mine' / 'iter_8.pth')
    assert files(other) == before
    assert {f'best_{name}_iter_12.pth' for name in names} <= set(files(tmp_path / 'mine'))


def test_a_folder_without_a_list_keeps_its_files(tmp_path):
    run(tmp_path, keep=2)
    Ledger(tmp_path).path.unlink()
    run(tmp_path, 8, keep=2, resume=tmp_path / 'iter_6.pth')
    assert sorted(files(tmp_path)) == [f'iter_{step}.pth' for step in (5, 6, 7, 8)]


def test_an_unfinished_file_is_never_written_through(other, tmp_path):
    before = files(other)
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'iter_1.pth.unfinished').symlink_to(other / 'iter_5.pth')
    os.link(other / 'iter_6.pth', mine / 'iter_2.pth.unfinished')
    (mine / 'last_checkpoint').symlink_to(other / 'notes.txt')
    (mine / 'iter_3.pth').symlink_to(other / 'iter_5.pth')
    run(mine, 3, keep=3)
    assert files(other) == before
    assert sorted(files(mine)) == ['iter_1.pth', 'iter_2.pth', 'iter_3.pth']
    assert not any(path.is_symlink() for path in mine.iterdir())
