"""Builds a runner from command line arguments: code shared by ``tools/train.py`` and ``tools/test.py``.

Invalid arguments end the program with one line that says what to change (``SystemExit``), not with a traceback.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.distributed.constants import default_pg_timeout

from mmman.analysis.dummy_model import scope_of
from mmman.engine.config_check import check_config
from mmman.errors import CheckpointError, CheckpointWriteError, ConfigError, LocalLearningError, PeerError
from mmman.messages import one_line
from mmman.runtime.checkpoint_files import check_training_checkpoint, latest_checkpoint, previous_checkpoint
from mmman.runtime.stock_config import config_path
from mmman.runtime.weights_hook import WeightsHook
from mmman.watchdog.hook import WatchdogHook, start_watchdog, timeout_of
from mmman.watchdog.monitor import Watchdog
from mmman.watchdog.rendezvous import RANK_VARIABLES, find_rank

LOCAL_LEARNING = 'LocalLearningOptimWrapper'
MAX_ERROR_LENGTH = 2000  # maximum number of characters of an error line


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument('--work-dir', help='folder of logs and results; default: work_dirs/<name of the config>')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, for example train_cfg.max_epochs=1 or key="[a,b]" (no white space)',
    )
    parser.add_argument('--launcher', choices=['none', *RANK_VARIABLES], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')


def config_argument(name: str) -> Path:
    """Argument type of a config: ``library::path`` of a library's config, or the path of a file, as the path of the file."""
    try:
        return config_path(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load_config(args: argparse.Namespace) -> Config:
    """Read the config named on the command line, and apply the arguments of :func:`add_common_arguments` to it."""
    try:
        path = config_path(args.config)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    cfg = Config.fromfile(path)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs', path.stem))
    if scope_of(cfg) == 'mmpretrain':
        set_mmpretrain_loaders(cfg)
    # The runner reads LOCAL_RANK, which torchrun sets, under every launcher. Without it, all MPI processes would have rank 0.
    local_rank = RANK_VARIABLES[args.launcher][-1] if args.launcher != 'none' else 'LOCAL_RANK'
    os.environ.setdefault('LOCAL_RANK', os.environ.get(local_rank, str(args.local_rank)))
    return cfg


def check_checkpoint(path: str, option: str) -> str:
    """Return ``path``; end the program if it is a local file that doesn't exist."""
    if '://' not in path and not Path(path).is_file():
        raise SystemExit(f'{option}: no checkpoint at {path}; give the path or URL of a .pth file')
    return path


def set_resume(cfg: Config, choice: str | None) -> None:
    """Set the checkpoint to resume from in a config, if any; end the program if it can't be used.

    Args:
        cfg: The config. If ``choice`` is None, its own ``resume`` and ``load_from`` apply.
        choice: ``'auto'`` for the latest checkpoint of the work folder, or a new run if there is none;
            ``'previous'`` for the one before the latest; or a path or URL.
    """
    if choice is None:
        if not cfg.get('resume'):
            return
        choice = cfg.get('load_from') or 'auto'
    cfg.resume = True
    out_dir = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('out_dir')
    if choice == 'auto':
        path = latest_checkpoint(cfg.work_dir, out_dir)
        if path is None:  # keep load_from: a new run starts from it
            cfg.resume = False
            return
    elif choice == 'previous':
        path = previous_checkpoint(cfg.work_dir, out_dir)
        if path is None:
            raise SystemExit(f'--resume previous: {cfg.work_dir} has no checkpoint before the latest; give a path')
    else:
        path = check_checkpoint(choice, '--resume')
    cfg.load_from = str(path)
    if '://' in cfg.load_from:
        return
    try:
        check_training_checkpoint(path)
    except CheckpointError as error:
        previous = previous_checkpoint(cfg.work_dir, out_dir) if choice == 'auto' else None
        remedy = f'use --resume previous to continue from {previous}' if previous else 'or start a new run, without --resume'
        raise SystemExit(one_line(f'--resume: {error}; {remedy}', MAX_ERROR_LENGTH)) from None


@contextmanager
def end_on_error(checkpoint: str | None) -> Iterator[None]:
    """Context that ends the program with one line if mmman raises an error.

    Args:
        checkpoint: The checkpoint that the run loads, if any. Errors about the checkpoint name it.
    """
    try:
        yield
    except LocalLearningError as error:
        text = str(error)
        if not isinstance(error, CheckpointError) and not text.startswith('cannot resume'):
            text = f'{type(error).__name__}: {text}'
        elif checkpoint and checkpoint not in text and not isinstance(error, CheckpointWriteError):
            text = f'{checkpoint}: {text}'
        raise SystemExit(one_line(text, MAX_ERROR_LENGTH)) from error


def type_name(cfg: ConfigDict, default: str = '') -> str:
    """Return the class name in ``cfg.type`` without its scope. New-style configs contain the class instead of a string."""
    kind = cfg.get('type', default)
    return kind.rpartition('.')[-1] if isinstance(kind, str) else kind.__name__


@contextmanager
def watch_peers(cfg: Config) -> Iterator[Watchdog | None]:
    """Context of a run that ends all data parallel processes if one is lost or stuck.

    Yields:
        The watchdog, for :func:`build_runner`; None for a single process and for a pipeline, which has its own watchdog.
    """
    if cfg.launcher == 'none' or is_pipeline(cfg):
        yield None
        return
    try:
        rank, world_size = find_rank(cfg.launcher)
        timeout = timeout_of(cfg)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    if world_size == 1:
        yield None
        return
    watchdog = start_watchdog(rank, world_size, timeout)
    try:
        with watchdog.reporting():
            yield watchdog
    except PeerError:  # the watchdog has printed the error
        raise SystemExit(1) from None
    watchdog.leave()


def build_runner(cfg: Config, watchdog: Watchdog | None = None) -> Runner:
    """Build the runner for any launcher, with or without a GPU.

    Args:
        cfg: The config.
        watchdog: The watchdog from :func:`watch_peers`.

    Raises:
        LocalLearningError: The config is invalid. The message says what to change.
    """
    check_config(cfg)
    _set_log_processor(cfg)
    if cfg.launcher != 'none' and not is_pipeline(cfg):
        _set_model_wrapper(cfg)
        if get_device() == 'cpu':
            _init_gloo(cfg.launcher, cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout'))
        else:
            _record_collectives()
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if watchdog is not None:
        runner.register_hook(WatchdogHook(watchdog))
    if not is_pipeline(cfg):  # the checkpoint may have no tensor of a stage
        runner.register_hook(WeightsHook())
    return runner


def is_pipeline(cfg: Config) -> bool:
    """Whether a config trains one block per process. Its runner then creates the process groups itself."""
    return bool(cfg.get('runner_type')) and type_name(ConfigDict(type=cfg.runner_type)) == 'PipelineRunner'


def leave_process_group() -> None:
    """Wait for all processes, then leave the group: a process that leaves early may end others that are still writing."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _set_log_processor(cfg: Config) -> None:
    """Keep the local losses out of the console line, unless the config has a log processor of its own."""
    processor = cfg.get('log_processor') or {}
    if type_name(cfg.get('optim_wrapper') or {}) == LOCAL_LEARNING and type_name(processor, 'LogProcessor') == 'LogProcessor':
        cfg.log_processor = dict(processor, type='mmman.LocalLogProcessor')


def _set_model_wrapper(cfg: Config) -> None:
    """Set the model wrapper if the config has none, and disable its ``device_ids`` if there is no GPU."""
    if not cfg.get('model_wrapper_cfg'):
        is_local = type_name(cfg.get('optim_wrapper') or {}) == LOCAL_LEARNING
        cfg.model_wrapper_cfg = dict(
            type='mmman.LocalDistributedDataParallel' if is_local else 'MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if get_device() == 'cpu':
        cfg.model_wrapper_cfg.setdefault('device_ids', None)


def _init_gloo(launcher: str, timeout: float | None) -> None:
    """Create the process group before the runner does, because the runner sets a CUDA device even for gloo.

    The watchdog ends the run if a process is lost or stuck. Collectives may therefore wait longer, at least torch's default,
    for a process that is neither, for example in a long evaluation.
    """
    try:
        rank, world_size = find_rank(launcher)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    collective_timeout = max(timedelta(seconds=timeout or 0), default_pg_timeout)
    dist.init_process_group('gloo', rank=rank, world_size=world_size, timeout=collective_timeout)


def _record_collectives() -> None:
    """Let NCCL's flight recorder write the last collectives on a timeout, unless the user has set its variables."""
    for name, value in (('TORCH_NCCL_TRACE_BUFFER_SIZE', '2000'), ('TORCH_NCCL_DUMP_ON_TIMEOUT', '1')):
        os.environ.setdefault(name, value)


def set_mmpretrain_loaders(cfg: Config) -> None:
    """Set the defaults of data loaders that the tools of mmpretrain set, in a config of mmpretrain."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader:
            loader.setdefault('pin_memory', torch.cuda.is_available())
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
            loader.setdefault('collate_fn', dict(type='default_collate'))
