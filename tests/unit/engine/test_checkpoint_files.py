"""Which checkpoint a run goes on from, and that a damaged one is recognised."""

import os

import pytest
import torch

from mmman.engine.checkpoint_files import check_whole, latest_checkpoint, previous_checkpoint
from mmman.errors import CheckpointError


def save(path, **content):
    torch.save({'meta': {'epoch': 1, 'iter': 2}, 'state_dict': {'a': torch.arange(1000.0)}, **content}, path)
    return path


def test_the_noted_checkpoint_is_the_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is previous_checkpoint(tmp_path) is None
    paths = [save(tmp_path / f'iter_{i}.pth') for i in (2, 8, 10)]
    (tmp_path / 'last_checkpoint').write_text(str(paths[1]))
    assert latest_checkpoint(tmp_path) == paths[1]
    assert previous_checkpoint(tmp_path) == paths[0]


def test_a_remote_checkpoint_is_found_by_its_note(tmp_path):
    save(tmp_path / 'iter_2.pth')
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/run/iter_8.pth')
    assert latest_checkpoint(tmp_path, 's3://bucket') == 's3://bucket/run/iter_8.pth'
    assert previous_checkpoint(tmp_path, 's3://bucket') is None


@pytest.mark.parametrize('note', [None, '', 'elsewhere/iter_99.pth'])
def test_without_a_note_the_highest_number_counts(note, tmp_path):
    for name in ('iter_9.pth', 'iter_10.pth', 'iter_11.pth.unfinished', 'best_score_iter_12.pth', 'epoch_12-0123abcd.pth'):
        save(tmp_path / name)
    if note is not None:
        (tmp_path / 'last_checkpoint').write_text(note)
    assert latest_checkpoint(tmp_path).name == 'iter_10.pth'
    assert previous_checkpoint(tmp_path).name == 'iter_9.pth'


def test_of_epochs_and_iterations_those_of_the_last_one_written_count(tmp_path):
    for time, name in enumerate(('iter_900.pth', 'epoch_1.pth', 'epoch_2.pth'), start=1):
        os.utime(save(tmp_path / name), (time, time))
    assert latest_checkpoint(tmp_path).name == 'epoch_2.pth'


def test_whole_checkpoints_pass(tmp_path):
    check_whole(save(tmp_path / 'a.pth'))


@pytest.mark.parametrize('share', [0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(share, tmp_path):
    path = save(tmp_path / 'a.pth')
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r'a\.pth is (empty|cut short, damaged, or no checkpoint)'):
        check_whole(path)


def test_a_flipped_bit_of_a_tensor_is_refused(tmp_path):
    path = save(tmp_path / 'a.pth')
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor([500.0]).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='is damaged: its record a/data/0 has another checksum'):
        check_whole(path)


def test_what_is_no_training_checkpoint_is_refused(tmp_path):
    torch.save({'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match="not from a training run of mmengine: it has no meta with 'epoch' and 'iter'"):
        check_whole(tmp_path / 'a.pth')
    torch.save({'meta': print}, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='b.pth names builtins.print, which is no weight and no log'):
        check_whole(tmp_path / 'b.pth')
