"""Command line arguments of ``tools/train.py`` and ``tools/test.py``: the config, the checkpoint to resume, and errors."""

import argparse
import os

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import EpochBasedTrainLoop

from mmman.engine.config_check import check_config
from mmman.errors import CheckpointError, CheckpointWriteError, ConfigError
from mmman.runtime.launch import (
    _set_log_processor,
    add_common_arguments,
    check_checkpoint,
    config_argument,
    end_on_error,
    is_pipeline,
    load_config,
    set_resume,
    type_name,
    watch_peers,
)


def config(folder, **options):
    return Config({'work_dir': str(folder), **options})


def save(folder, *iterations):
    paths = [folder / f'iter_{i}.pth' for i in iterations]
    for path, iteration in zip(paths, iterations, strict=True):
        torch.save({'meta': {'epoch': 0, 'iter': iteration}, 'state_dict': {'a': torch.zeros(9)}}, path)
    return paths


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def chosen(choice, folder, **options):
    cfg = config(folder, **options)
    set_resume(cfg, choice)
    return cfg.get('resume'), cfg.get('load_from')


def test_what_is_chosen(tmp_path):
    older, latest = map(str, save(tmp_path, 4, 6))
    assert chosen('auto', tmp_path) == (True, latest)
    assert chosen('previous', tmp_path) == (True, older)
    assert chosen(older, tmp_path) == (True, older)
    assert chosen(None, tmp_path) == (None, None)
    assert chosen(None, tmp_path, resume=True) == (True, latest)
    assert chosen(None, tmp_path, resume=True, load_from=older) == (True, older)
    assert chosen(None, tmp_path, resume=False, load_from=older) == (False, older)
    assert chosen('https://host/a.pth', tmp_path) == (True, 'https://host/a.pth')


def test_a_run_without_a_checkpoint_begins_as_the_config_says(tmp_path):
    assert chosen('auto', tmp_path, load_from='pretrained.pth') == (False, 'pretrained.pth')
    with pytest.raises(SystemExit, match='--resume previous: .* has no checkpoint before the latest; give a path'):
        chosen('previous', tmp_path)


def test_a_truncated_checkpoint_is_refused_and_the_one_before_is_named(tmp_path):
    older, latest = save(tmp_path, 4, 6)
    cut(latest)
    with pytest.raises(SystemExit) as error:
        chosen('auto', tmp_path)
    assert str(error.value) == (
        f'--resume: {latest} is truncated, damaged or not a checkpoint: File is not a zip file; '
        'copy or download it again, or give another checkpoint; '
        f'use --resume previous to continue from {older}'
    )
    assert chosen('previous', tmp_path) == (True, str(older))
    cut(older)
    with pytest.raises(SystemExit, match=r'iter_4.pth is truncated.*another checkpoint; or start a new run, without --resume'):
        chosen('previous', tmp_path)


def arguments(path, *options):
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_common_arguments(parser)
    return parser.parse_args([str(path), *options])


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """A config; and LOCAL_RANK, which reading it sets, is taken back after the test."""
    monkeypatch.setenv('LOCAL_RANK', '')
    monkeypatch.delenv('LOCAL_RANK')
    path = tmp_path / 'stock.py'
    path.write_text("default_scope = 'mmpretrain'\nlr = 1\ntrain_dataloader = dict(num_workers=2)\n")
    return path


def test_options_of_the_command_line_win(stock):
    cfg = load_config(arguments(stock, '--cfg-options', 'lr=2', 'a.b=[3,4]', '--work-dir', 'here', '--launcher', 'none'))
    assert (cfg.lr, cfg.a.b, cfg.work_dir, cfg.launcher) == (2, [3, 4], 'here', 'none')
    assert load_config(arguments(stock)).work_dir == 'work_dirs/stock'
    assert load_config(arguments(stock, '--cfg-options', 'work_dir=there')).work_dir == 'there'
    assert cfg.train_dataloader.persistent_workers and cfg.train_dataloader.collate_fn.type == 'default_collate'


@pytest.mark.parametrize(
    ('launcher', 'variables', 'rank'),
    [
        ('none', {}, '3'),
        ('pytorch', {'LOCAL_RANK': '5'}, '5'),
        ('slurm', {'SLURM_LOCALID': '6'}, '6'),
        ('mpi', {'OMPI_COMM_WORLD_LOCAL_RANK': '7'}, '7'),
        ('slurm', {'SLURM_LOCALID': '6', 'LOCAL_RANK': '1'}, '1'),
    ],
)
def test_the_local_rank_is_the_launchers(launcher, variables, rank, stock, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    load_config(arguments(stock, '--launcher', launcher, '--local_rank', '3'))
    assert os.environ['LOCAL_RANK'] == rank


def test_files_that_are_missing_end_the_program(tmp_path):
    with pytest.raises(SystemExit, match='no config at .*none.py; give the path of'):
        load_config(arguments(tmp_path / 'none.py'))
    with pytest.raises(SystemExit, match='^--load-from: no checkpoint at .*none.pth'):
        check_checkpoint(str(tmp_path / 'none.pth'), '--load-from')
    assert check_checkpoint('https://host/a.pth', '--load-from') == 'https://host/a.pth'


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ConfigError('set a\nand b'), 'ConfigError: set a and b'),
        (CheckpointError('is empty'), 'a.pth: is empty'),
        (CheckpointError('a.pth is empty'), 'a.pth is empty'),
        (CheckpointError('cannot resume: it is empty'), 'a.pth: cannot resume: it is empty'),
        (CheckpointWriteError('cannot write b.pth'), 'cannot write b.pth'),
    ],
)
def test_an_error_of_ours_ends_the_program_with_one_line(error, text):
    with pytest.raises(SystemExit) as end, end_on_error('a.pth'):
        raise error
    assert str(end.value) == text


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), end_on_error('a.pth'):
        raise ZeroDivisionError


def test_types_are_names_with_a_scope_or_classes():
    assert type_name(ConfigDict(type='mmengine.EpochBasedTrainLoop')) == 'EpochBasedTrainLoop'
    assert type_name(ConfigDict(type=EpochBasedTrainLoop)) == 'EpochBasedTrainLoop'
    assert type_name(ConfigDict(), 'OptimWrapper') == 'OptimWrapper'
    assert is_pipeline(Config({'runner_type': 'mmman.PipelineRunner'}))
    assert not is_pipeline(Config({'runner_type': 'Runner'})) and not is_pipeline(Config({}))


def test_a_single_process_and_a_pipeline_have_no_watchdog(monkeypatch):
    monkeypatch.setattr('mmman.runtime.launch.start_watchdog', lambda *args: pytest.fail('a watchdog was started'))
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    for cfg in ({'launcher': 'none'}, {'launcher': 'pytorch'}, {'launcher': 'pytorch', 'runner_type': 'mmman.PipelineRunner'}):
        with watch_peers(Config(cfg)) as watchdog:
            assert watchdog is None
    monkeypatch.delenv('RANK')
    with pytest.raises(SystemExit, match="'RANK' is not set"), watch_peers(Config({'launcher': 'pytorch'})):
        pass


@pytest.mark.parametrize(
    ('optim_wrapper', 'processor', 'expected'),
    [
        ('mmman.LocalLearningOptimWrapper', None, {'type': 'mmman.LocalLogProcessor'}),
        ('mmman.LocalLearningOptimWrapper', {'by_epoch': False}, {'type': 'mmman.LocalLogProcessor', 'by_epoch': False}),
        ('mmman.LocalLearningOptimWrapper', {'type': 'LogProcessor'}, {'type': 'mmman.LocalLogProcessor'}),
        ('mmman.LocalLearningOptimWrapper', {'type': 'MyProcessor'}, {'type': 'MyProcessor'}),
        ('OptimWrapper', {'type': 'LogProcessor'}, {'type': 'LogProcessor'}),
        ('OptimWrapper', None, None),
    ],
)
def test_local_losses_are_kept_out_of_the_console_line(optim_wrapper, processor, expected):
    cfg = Config({'optim_wrapper': {'type': optim_wrapper}, **({} if processor is None else {'log_processor': processor})})
    _set_log_processor(cfg)
    assert cfg.get('log_processor') == expected
    check_config(cfg)  # again before the first step


def test_a_library_config_is_a_file_on_the_command_line():
    pytest.importorskip('mmdet')
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_common_arguments(parser)
    cfg = load_config(parser.parse_args(['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py']))
    assert cfg.model.backbone.depth == 18 and cfg.work_dir == os.path.join('work_dirs', 'retinanet_r18_fpn_1x_coco')
    with pytest.raises(argparse.ArgumentTypeError, match="no installed library 'mmlib'"):
        config_argument('mmlib::a/b.py')
