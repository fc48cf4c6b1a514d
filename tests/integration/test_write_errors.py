"""Disks that take no more: the old checkpoint survives, one line says where, why and what to do, and the next run goes on."""

import errno
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import DATASETS
from torch import multiprocessing

from mmman.errors import CheckpointWriteError
from mmman.runtime.checkpoint_files import check_training_checkpoint, latest_checkpoint
from tests.conftest import ROOT
from tests.integration.test_resume import NoisyImages, assert_same_training, checkpoint_in, load, start, whole

REMEDY = r'\. Earlier checkpoints are unchanged: .* --resume, or continue in another work folder: --work-dir FOLDER --resume'


@pytest.fixture(scope='module')
def reference(tmp_path_factory) -> dict:
    return whole(tmp_path_factory.mktemp('reference'))


def failing(number: int, name: str, ending: str):
    """An operating system's function that fails for files whose name ends so."""
    real = getattr(os, name)

    def replaced(file, *rest, **options):
        path = os.readlink(f'/proc/self/fd/{file}') if isinstance(file, int) else os.fspath(file)
        if path.endswith(ending):
            raise OSError(number, os.strerror(number), path)
        return real(file, *rest, **options)

    return replaced


FAULTS = {
    'disk full': (errno.ENOSPC, 'fsync', 'iter_6.pth.unfinished', 'No space left on device', 'free space on that disk'),
    'quota': (errno.EDQUOT, 'fsync', 'iter_6.pth.unfinished', 'quota exceeded', 'free space within the quota'),
    'no right': (errno.EACCES, 'replace', 'iter_6.pth.unfinished', 'Permission denied', 'make the folder writable'),
    'read-only': (errno.EROFS, 'unlink', 'iter_6.pth.unfinished', 'Read-only file system', 'mount the disk writable'),
    'broken disk': (errno.EIO, 'fsync', '.mmman_checkpoints.json.unfinished', 'Input/output error', 'check the disk'),
    'note of the latest': (errno.ENOSPC, 'replace', 'last_checkpoint.unfinished', 'No space left', 'free space on that disk'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_failed_write_leaves_the_old_checkpoint_and_the_next_run_goes_on(fault, reference, tmp_path, monkeypatch):
    number, name, ending, reason, remedy = FAULTS[fault]
    start(tmp_path, stop=5, seed=5)
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.pth')}
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(number, name, ending))
        with pytest.raises(CheckpointWriteError, match=REMEDY) as error:
            start(tmp_path, resume=latest_checkpoint(tmp_path))
    path = tmp_path / ('last_checkpoint' if 'last' in ending else 'iter_6.pth')
    assert f'cannot write {path}: ' in str(error.value) and reason in str(error.value) and remedy in str(error.value)
    assert '\n' not in str(error.value)
    assert [*tmp_path.glob('*.unfinished')] == []
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.glob('*.pth')}.items()
    start(tmp_path, resume=latest_checkpoint(tmp_path))
    assert_same_training(load(checkpoint_in(tmp_path)), reference)


def mounted(*options: str) -> bool:
    """Mount something, where this process may; no test fails because it may not."""
    return os.geteuid() == 0 and subprocess.run(['mount', *options], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for less than two checkpoints."""
    start(tmp_path / 'measured', stop=1, seed=5)
    size = checkpoint_in(tmp_path / 'measured').stat().st_size * 17 // 10
    disk = tmp_path / 'disk'
    disk.mkdir()
    if not mounted('-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(disk)):
        pytest.skip('this process may not mount a file system; the faults above stand in for it')
    yield disk
    subprocess.run(['umount', '--lazy', str(disk)], check=True)


def test_a_real_disk_that_is_full_or_read_only(small_disk, reference, tmp_path):
    checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 1, 'max_keep_ckpts': 1}
    options = {'default_hooks': {'logger': None, 'checkpoint': {**checkpoint, 'out_dir': str(small_disk)}}}
    run, folder = tmp_path / 'run', small_disk / 'run'
    with pytest.raises(CheckpointWriteError, match=f'cannot write {folder}/iter_2.pth: No space left on device{REMEDY}'):
        start(run, seed=5, **options)
    check_training_checkpoint(checkpoint_in(folder))
    assert sorted(path.name for path in folder.glob('iter_*')) == ['iter_1.pth']
    assert mounted('-o', 'remount,ro', str(small_disk))
    with pytest.raises(CheckpointWriteError, match=f'cannot write {folder}: Read-only file system{REMEDY}'):
        start(run, resume=checkpoint_in(folder), **options)
    assert mounted('-o', 'remount,rw,size=64m', str(small_disk))
    start(run, resume=checkpoint_in(folder), **options)
    assert_same_training(load(checkpoint_in(folder)), reference)


def test_a_folder_that_is_a_file_is_noticed_before_the_first_iteration(tmp_path):
    (tmp_path / 'out').touch()
    checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 1, 'out_dir': str(tmp_path / 'out')}
    with pytest.raises(CheckpointWriteError, match=f'cannot write {tmp_path}/out/run: .* remove the file that has the name'):
        start(tmp_path / 'run', seed=0, stop=1, default_hooks={'logger': None, 'checkpoint': checkpoint})


CONFIG = """
model = dict(type='mmman.ToyClassifier', backbone=dict(type='mmman.ToyNet'))
train_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(type='NoisyImages', images=8),
    sampler=dict(type='DefaultSampler', shuffle=True), collate_fn=dict(type='default_collate'))
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
"""


def end_of_tool(folder: Path, monkeypatch, *arguments: str) -> str:
    """The last line of ``tools/train.py``; empty where it ends in order."""
    config = folder.parent / 'config.py'
    config.write_text(CONFIG)
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config), '--work-dir', str(folder), *arguments])
    monkeypatch.setattr(
        NoisyImages, '__getitem__', lambda self, index: {'inputs': torch.ones(3, 8, 8), 'data_samples': index % 5}
    )
    DATASETS.register_module(module=NoisyImages, force=True)
    try:
        runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
    except SystemExit as error:
        return str(error)
    return ''


def test_the_tool_ends_with_one_line(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    line = end_of_tool(tmp_path / 'file', monkeypatch)
    assert line.startswith(f'cannot write {tmp_path}/file: File exists. ') and '\n' not in line
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', failing(errno.ENOSPC, 'fsync', 'epoch_1.pth.unfinished'))
        line = end_of_tool(tmp_path / 'run', monkeypatch)
    assert line.startswith(f'cannot write {tmp_path}/run/epoch_1.pth: No space left on device. ') and '\n' not in line
    assert end_of_tool(tmp_path / 'run', monkeypatch, '--resume') == ''
    assert latest_checkpoint(tmp_path / 'run').name == 'epoch_2.pth'


def train_with_a_full_disk(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    wrapper = {'type': 'mmman.LocalDistributedDataParallel', 'broadcast_buffers': False, 'device_ids': None}
    options = {'launcher': 'pytorch', 'cfg': {'model_wrapper_cfg': wrapper}, 'env_cfg': {'dist_cfg': {'backend': 'gloo'}}}
    os.fsync = failing(errno.ENOSPC, 'fsync', 'iter_2.pth.unfinished')
    began = time.monotonic()
    try:
        start(folder / 'run', seed=5, custom_hooks=[{'type': 'mmman.EMABiasHook'}], **options)
    except Exception as error:
        (folder / f'{rank}.txt').write_text(f'{time.monotonic() - began:.0f} s {type(error).__name__}: {error}')
        os._exit(1)


def test_a_full_disk_ends_all_ranks(tmp_path):
    context = multiprocessing.get_context('fork')
    ranks = [context.Process(target=train_with_a_full_disk, args=(rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    first, second = ((tmp_path / f'{rank}.txt').read_text() for rank in range(2))
    assert 'CheckpointWriteError: cannot write' in first and 'iter_2.pth: No space left on device' in first
    assert 'Error' in second
