"""Which checkpoint a run goes on from, and that a damaged one is recognised."""

import os

import pytest
import torch

from mmman.errors import CheckpointError
from mmman.runtime.checkpoint_files import check_training_checkpoint, latest_checkpoint, previous_checkpoint


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
    check_training_checkpoint(save(tmp_path / 'a.pth'))


@pytest.mark.parametrize('share', [0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(share, tmp_path):
    path = save(tmp_path / 'a.pth')
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r'a\.pth is (empty|truncated, damaged or not a checkpoint)'):
        check_training_checkpoint(path)


def test_a_flipped_bit_of_a_tensor_is_refused(tmp_path):
    path = save(tmp_path / 'a.pth')
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor([500.0]).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='is damaged: the checksum of its record a/data/0 is wrong'):
        check_training_checkpoint(path)


def test_what_is_no_training_checkpoint_is_refused(tmp_path):
    torch.save({'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match="not from a training run of mmengine: it has no meta with 'epoch' and 'iter'"):
        check_training_checkpoint(tmp_path / 'a.pth')
    torch.save({'meta': print}, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='b.pth contains builtins.print, which is not needed for weights or logs'):
        check_training_checkpoint(tmp_path / 'b.pth')


def noted(folder, note, out_dir=None):
    """What the note makes of a folder with iter_2, iter_8 and iter_10, and what the log says of it."""
    said = []
    for i in (2, 8, 10):
        save(folder / f'iter_{i}.pth')
    if isinstance(note, bytes):
        (folder / 'last_checkpoint').write_bytes(note)
    elif note is not None:
        (folder / 'last_checkpoint').write_text(str(note))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmman.runtime.checkpoint_files.print_log', lambda message, **options: said.append(message))
        latest = latest_checkpoint(folder, out_dir)
    assert all('\n' not in line and str(folder / 'last_checkpoint') in line and str(latest) in line for line in said)
    return latest, said


def test_a_note_that_names_no_checkpoint_of_this_folder_is_ignored_in_one_line(tmp_path):
    folder, other = tmp_path / 'run', tmp_path / 'other'
    folder.mkdir()
    other.mkdir()
    stranger = save(other / 'iter_99.pth')
    for note in (
        b'\x80\x02\xff\x00',
        b'iter_2.pth\0',
        b'iter_2.pth\niter_8.pth',
        b'a' * 10**5,
        'https://host/iter_99.pth',
        's3://bucket/iter_99.pth',
        'file:///iter_99.pth',
        folder / 'iter_99.pth',
        folder,
        '/dev/zero',
        stranger,
        folder / '..' / 'other' / 'iter_99.pth',
    ):
        latest, said = noted(folder, note)
        assert latest == folder / 'iter_10.pth' and len(said) == 1 and 'is ignored: it ' in said[0], note
    (folder / 'last_checkpoint').unlink()
    (folder / 'last_checkpoint').mkdir()
    assert noted(folder, None)[0] == folder / 'iter_10.pth'


def test_of_a_folder_that_was_copied_or_moved_the_noted_name_is_taken(tmp_path):
    """The original is another run's: training on from it, or removing its files, would be a surprise."""
    folder, original = tmp_path / 'copy', tmp_path / 'original'
    folder.mkdir()
    original.mkdir()
    for path in (save(original / 'iter_8.pth'), tmp_path / 'gone' / 'iter_8.pth'):
        latest, said = noted(folder, path)
        assert latest == folder / 'iter_8.pth' and len(said) == 1
    assert noted(folder, '') == (folder / 'iter_10.pth', [])


def test_a_note_is_followed_to_where_the_config_keeps_checkpoints(tmp_path):
    folder, store = tmp_path / 'run', tmp_path / 'store' / 'run'
    folder.mkdir()
    store.mkdir(parents=True)
    kept = save(store / 'iter_12.pth')
    assert noted(folder, kept, str(tmp_path / 'store')) == (kept, [])
    assert noted(folder, 's3://bucket/run/iter_12.pth', 's3://bucket') == ('s3://bucket/run/iter_12.pth', [])
    assert noted(folder, 's3://bucket/../other/iter_12.pth', 's3://bucket')[0] == folder / 'iter_10.pth'
    assert noted(folder, 's3://bucket2/iter_12.pth', 's3://bucket')[0] == folder / 'iter_10.pth'


@pytest.mark.parametrize(
    ('meta', 'message'),
    [
        ({'iter': -3}, 'its iter is -3'),
        ({'epoch': True}, 'its epoch is True'),
        ({'epoch': 1.0}, r'its epoch is 1\.0'),
        ({'seed': 'a'}, "its seed is 'a'"),
    ],
)
def test_a_position_that_is_no_number_is_refused(meta, message, tmp_path):
    with pytest.raises(CheckpointError, match=f'a.pth is not from a training run of mmengine: {message}; '):
        check_training_checkpoint(save(tmp_path / 'a.pth', meta={'epoch': 1, 'iter': 2, **meta}))
