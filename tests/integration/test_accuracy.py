"""The accuracy benchmark: every named row is built and stepped, and a killed run ends like an uninterrupted one."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.console import Console

from mmman.analysis.dummy_model import build_dummy_model
from tests.conftest import ROOT
from tools.benchmarks import accuracy
from training_rows.paper import write_row
from training_rows.rows import build_row, check_equal_budgets, store_config
from training_rows.runs import Run, resume_from

LIBRARY = {'detection': 'mmdet', 'segmentation': 'mmseg', 'classification': 'mmpretrain'}
FOLDER = {'detection': 'bccd', 'segmentation': 'camvid'}
SMALL = {
    'segmentation': [
        '--cfg-options',
        'train_dataloader.dataset.pipeline.1.crop_size=(64,64)',
        'model.data_preprocessor.size=(64,64)',
    ]
}
IMAGES = 32


@pytest.fixture
def npz(test_data, tmp_path):
    """A few images of every class, packed like the whole."""
    source, folder = test_data / 'cifar10', tmp_path / 'small'
    if not source.is_dir():
        pytest.skip(f'no CIFAR-10 at {source}')
    folder.mkdir()
    for split in ('train', 'test'):
        arrays = np.load(source / f'{split}.npz')
        offsets, chosen = arrays['offsets'], np.linspace(0, len(arrays['labels']) - 1, IMAGES).astype(int)
        jpeg = arrays['jpeg']
        files = [jpeg[offsets[i] : offsets[i + 1]] for i in chosen]
        packed = {'jpeg': np.concatenate(files), 'offsets': np.cumsum([0, *map(len, files)])}
        np.savez(folder / f'{split}.npz', labels=arrays['labels'][chosen], classes=arrays['classes'], **packed)
    return folder


@pytest.fixture
def data_of(test_data, request):
    """The folder of a task's data."""

    def find(task):
        pytest.importorskip(LIBRARY[task])
        if task == 'classification':
            return request.getfixturevalue('npz')
        if not (test_data / FOLDER[task]).is_dir():
            pytest.skip(f'no data at {test_data / FOLDER[task]}')
        return test_data / FOLDER[task]

    return find


def rows_of(task, *arguments):
    args = accuracy.parse_args([task, *map(str, arguments)])
    return [build_row(request, accuracy.TASKS[task], args) for request in args.requests]


@pytest.mark.whole_models
@pytest.mark.parametrize('task', LIBRARY)
def test_every_row_is_built_and_stepped(task, data_of, tmp_path):
    names = [*accuracy.TASKS[task].rows]
    budget = ('--batch-size', 2, '--train-images', 2, '--val-images', 2, *SMALL.get(task, []))
    rows = rows_of(task, '--data-root', data_of(task), '--rows', *names, '--work-dir', tmp_path, *budget)
    check_equal_budgets(rows)
    for row in rows:
        store_config(row)
        cfg = Config.fromfile(row.folder / 'config.py')
        init_default_scope(cfg.default_scope)
        batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
        model, optim_wrapper = build_dummy_model(cfg, *batch['inputs'][0].shape[-2:])
        losses = model.train_step(batch, optim_wrapper)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())


def finish(command, monkeypatch):
    """Run a command to its end in this process, which has imported everything already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['accuracy.py', *command])
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    with pytest.raises(SystemExit) as ending:
        accuracy.main()
    assert not ending.value.code


def test_a_killed_run_ends_like_an_uninterrupted_one(npz, tmp_path, monkeypatch):
    pytest.importorskip('mmpretrain')
    monkeypatch.setattr(accuracy, 'measure_costs', lambda *args: None)
    command = ['classification', '--data-root', npz, '--rows', 'manpp', '--epochs', 2, '--batch-size', 8, '--train-images', 24]
    command = [*map(str, command)]
    weights = []
    for is_killed in (True, False):
        work_dir = ['--work-dir', str(tmp_path / f'killed_{is_killed}')]
        (row,) = rows_of(*command, *work_dir)
        if is_killed:
            store_config(row)
            run = Run(row, 0, accuracy.TASKS['classification'].metrics)
            run.launch(None, 1, 0)
            while run.process.poll() is None and not (run.folder / 'epoch_1.pth').exists():
                time.sleep(0.02)
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
            run.read()
            assert resume_from(run) in (None, run.folder / 'epoch_1.pth') and not run.finish()
        finish([*command, *work_dir], monkeypatch)
        folder = row.folder / 'seed0'
        result = json.loads((folder / 'result.json').read_text())
        assert [point['iteration'] for point in result['curve'] if 'accuracy/top1' in point] == [3, 6]
        assert len(result['attempts']) == 1 + is_killed
        assert (row.folder.parent / 'curves.png').stat().st_size > 0
        assert '| manpp |' in (row.folder.parent / 'table.md').read_text()
        weights.append(torch.load(folder / 'epoch_2.pth', map_location='cpu', weights_only=False)['state_dict'])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    monkeypatch.setattr(Run, 'launch', lambda *args: pytest.fail('a finished run is trained again'))
    finish([*command, *work_dir], monkeypatch)
    command[command.index('manpp')] = 'dgl'
    (other,) = rows_of(*command, *work_dir, '--cfg-options', 'optim_wrapper.optimizer.momentum=0.5')
    with pytest.raises(SystemExit, match=r'another budget: optim_wrapper\.optimizer\.momentum is 0\.5, not 0\.9 \(manpp\)'):
        store_config(other)


def test_an_ablation_cannot_change_the_budget(npz, tmp_path):
    pytest.importorskip('mmpretrain')
    arguments = ('classification', '--data-root', npz, '--work-dir', tmp_path, '--ablation', 'long', 'manpp')
    with pytest.raises(SystemExit, match=r'--ablation long changes the budget: train_cfg\.max_epochs is 30, not 15'):
        rows_of(*arguments, 'train_cfg.max_epochs=30')
    (row,) = rows_of(*arguments, 'custom_hooks.0.momentum=0.9')
    assert row.cfg.custom_hooks[0].momentum == 0.9 and row.name == 'long'


def test_iterations_and_epochs_are_not_confused(npz, tmp_path):
    pytest.importorskip('mmpretrain')
    with pytest.raises(SystemExit, match='--iterations: this task counts epochs'):
        rows_of('classification', '--data-root', npz, '--rows', 'dgl', '--iterations', 5)


def test_a_row_of_the_paper_is_scaled(npz, tmp_path):
    pytest.importorskip('mmpretrain')
    config, row = tmp_path / 'dgl.py', tmp_path / 'row.py'
    write_row('table1/cifar10_resnet32_k16_dgl', row, Console())
    dataset = "dict(_delete_=True, type='mmman.PackedImageDataset', ann_file={!r}, pipeline=[dict(type='PackInputs')])"
    loaders = [
        f'{loader} = dict(dataset={dataset.format(str(npz / f"{split}.npz"))})'
        for loader, split in (('train_dataloader', 'train'), ('val_dataloader', 'test'))
    ]
    config.write_text('\n'.join([f'_base_ = {str(row)!r}', *loaders]))
    budget = ('--epochs', 10, '--train-images', 24, '--batch-size', 8, '--lr', 0.05)
    (row,) = rows_of('paper', '--rows', config, '--work-dir', tmp_path, *budget)
    assert row.cfg.param_scheduler[-1].T_max == 10 and row.cfg.optim_wrapper.optimizer.lr == 0.05
    assert row.iterations == 30 and row.paper == {'value': '85.92', 'budget': '400 epochs, batch 1024'}
    assert str(row.budget) == '10 epochs, batch 8, lr 0.05, 24 train and 32 validation images'
