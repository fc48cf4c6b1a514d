"""Two processes by ``tools/dist_train.sh``: train, log, validate, resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from tests.conftest import ROOT
from tests.integration.test_train import dataset, overrides  # noqa: F401

pytest.importorskip('mmdet')


def dist_train(work_dir, values, *arguments):
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PORT': '29633'}
    options = [f'{key}={value}'.replace(' ', '') for key, value in values.items()]
    command = ['tools/dist_train.sh', 'configs/paper/retinanet_r18_manpp_k4.py', '2', '--work-dir', work_dir, *arguments]
    run = subprocess.run(
        [*map(str, command), '--cfg-options', *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    # Not the exit code: now and then a gloo process aborts when it exits, all work done, also under stock DDP.
    log = run.stdout + run.stderr
    assert 'Epoch(val)' in log, log[-6000:]
    return log


def test_two_processes_train_validate_and_resume(dataset, tmp_path):  # noqa: F811
    values = overrides(dataset, is_local=True, train_cfg__val_interval=1, train_cfg__max_epochs=1)
    log = dist_train(tmp_path, values)
    assert 'local losses: ' in log and 'Epoch(val) [1]' in log
    wrapper = Config.fromfile(tmp_path / 'retinanet_r18_manpp_k4.py').model_wrapper_cfg
    assert wrapper.type == 'mmman.LocalDistributedDataParallel'
    first = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    log = dist_train(tmp_path, {**values, 'train_cfg.max_epochs': 2}, '--resume')
    second = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert 'resumed epoch: 1' in log and second['meta']['iter'] == 2 * first['meta']['iter'] == 4
    assert second['optimizer']['steps'] == 4
