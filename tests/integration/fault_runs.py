"""Data parallel runs in which one process gets lost or stuck."""

import os
import runpy
import sys
import time

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS
from mmengine.runner import Runner
from torch import multiprocessing

from mmman.watchdog import monitor as watchdog
from mmman.watchdog.hook import SHARE_OF_TIMEOUT
from tests.conftest import ROOT
from tests.parity.pipeline_runs import ToyAccuracy, ToyImages, environment, free_port, toy_run, with_epochs

TIMEOUT = 8.0
"""Of the watchdog, in seconds."""


@DATASETS.register_module()
class FaultyImages(ToyImages):
    """Images of which rank 1 gets ten batches of four; then it exits, or runs in a loop for good."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault, self.left = fault if os.environ['RANK'] == '1' else None, 40

    def __getitem__(self, index):
        self.left -= 1
        if self.fault and self.left < 0:
            self.fail()
        return super().__getitem__(index)

    def fail(self):
        if self.fault == 'exit':
            sys.exit(3)
        while True:
            self.left -= 1


@METRICS.register_module()
class SlowAccuracy(ToyAccuracy):
    """Takes its time on the first rank, for which the others wait."""

    def compute_metrics(self, results):
        time.sleep(2 * TIMEOUT)
        return super().compute_metrics(results)


def dist_config(folder, fault=None, is_local=True):
    """The config of a data parallel run of the toy classifier, which takes very long."""
    cfg = toy_run(folder / 'run', iters=10**6)
    cfg.pop('runner_type'), cfg.pop('pipeline')
    if not is_local:
        cfg.model = {'type': 'mmman.ToyClassifier', 'backbone': {'type': 'mmman.ToyNet'}}
        cfg.optim_wrapper.type, cfg.custom_hooks = 'OptimWrapper', []
    cfg.custom_imports.imports = [__name__]
    cfg.train_dataloader.dataset = {'type': 'FaultyImages', 'fault': fault}
    cfg.env_cfg = {'dist_cfg': {'backend': 'gloo', 'timeout': TIMEOUT / SHARE_OF_TIMEOUT}}
    cfg.default_hooks.checkpoint.update(interval=10, max_keep_ckpts=1)
    return cfg


def evaluated(cfg):
    """One epoch, then an evaluation that takes longer than the watchdog's timeout."""
    cfg = with_epochs(cfg, epochs=1)
    cfg.val_evaluator.type = 'SlowAccuracy'
    return cfg


class Job:
    """Processes that train, started as by a launcher, but one that doesn't end the others by itself.

    They are forked from one that has the libraries loaded.

    Args:
        cfg: The config.
        folder: Where to write it, and what the processes write to stderr.
        ranks: How many processes.
        train: ``tools_train`` or ``stock_train``.
    """

    def __init__(self, cfg, folder, ranks, train):
        cfg.dump(folder / 'config.py')
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload([__name__])
        port = free_port()
        self.errors = [folder / f'{rank}.err' for rank in range(ranks)]
        self.processes = [
            context.Process(target=_start, args=(train, folder, rank, environment(rank, ranks, port))) for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def finish(self, seconds, but=()):
        """Exit codes, and what the processes wrote to stderr; none may outlive the deadline, but those that are suspended."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank not in but:
                process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes, [path.read_text() for path in self.errors]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


def _start(train, folder, rank, variables):
    torch.set_num_threads(1)
    watchdog.GRACE_S = 2.0
    os.environ.update(variables)
    os.dup2(os.open(folder / f'{rank}.err', os.O_WRONLY | os.O_CREAT), 2)
    train(folder / 'config.py')


def tools_train(config):
    """What ``tools/train.py`` does."""
    sys.argv = ['train.py', str(config), '--launcher', 'pytorch']
    runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')


def stock_train(config):
    """What the train script of a library does."""
    dist.init_process_group('gloo')
    cfg = Config.fromfile(config)
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = {'type': 'mmman.LocalDistributedDataParallel'}
    Runner.from_cfg(cfg).train()
