"""Data parallel runs in which one process gets lost or stuck."""

import os
import runpy
import sys
import time

import torch
from mmengine.registry import DATASETS, METRICS
from torch import multiprocessing

from mmman.parallel import watchdog
from tests.conftest import ROOT
from tests.parity.pipeline_runs import ToyAccuracy, ToyImages, environment, free_port, toy_run, with_epochs

TIMEOUT = 6.0
"""Of the watchdog, in seconds."""


@DATASETS.register_module()
class FaultyImages(ToyImages):
    """Images that a rank, having loaded some, never gets: it exits, or runs in a loop for good."""

    def __init__(self, fault=None, rank=1, after=40, **options):
        super().__init__(**options)
        self.fault, self.left = fault if int(os.environ.get('RANK', 0)) == rank else None, after

    def __getitem__(self, index):
        self.left -= 1
        if self.fault and self.left < 0:
            self.fail()
        return super().__getitem__(index)

    def fail(self):
        if self.fault == 'exit':
            sys.exit(3)
        if self.fault == 'error':
            raise ValueError('no such image')
        while True:
            self.left -= 1


@METRICS.register_module()
class SlowAccuracy(ToyAccuracy):
    """Takes its time on the first rank, for which the others wait."""

    def compute_metrics(self, results):
        time.sleep(2 * TIMEOUT)
        return super().compute_metrics(results)


def dist_config(folder, fault=None, iters=10**6, is_local=True, **dataset):
    """The config of a data parallel run of the toy classifier, written to a file."""
    cfg = toy_run(folder / 'run', iters=iters, model={} if is_local else {'num_blocks': 1})
    cfg.pop('runner_type'), cfg.pop('pipeline')
    cfg.custom_imports.imports = [__name__]
    cfg.train_dataloader.dataset = {'type': 'FaultyImages', 'fault': fault, **dataset}
    cfg.env_cfg = {'dist_cfg': {'backend': 'gloo', 'timeout': TIMEOUT / 0.8}}
    cfg.default_hooks.checkpoint.update(interval=10, max_keep_ckpts=1)
    return cfg


def evaluated(cfg):
    """One epoch, then an evaluation that takes longer than the watchdog's timeout."""
    cfg = with_epochs(cfg, epochs=1)
    cfg.val_evaluator.type = 'SlowAccuracy'
    return cfg


class Job:
    """Processes that run ``tools/train.py`` as a launcher would start them, but one that doesn't end the others by itself.

    They are forked from one that has the libraries loaded.
    """

    def __init__(self, cfg, folder, ranks):
        cfg.dump(folder / 'config.py')
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload([__name__])
        port = free_port()
        self.errors = [folder / f'{rank}.err' for rank in range(ranks)]
        self.processes = [
            context.Process(
                target=_train, args=(str(folder / 'config.py'), str(self.errors[rank]), environment(rank, ranks, port))
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def finish(self, seconds, but=()):
        """The last line that each process wrote to stderr; none may outlive the deadline but those that are suspended."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if rank not in but:
                process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes, [path.read_text() for path in self.errors]


def _train(config, errors, variables):
    torch.set_num_threads(1)
    watchdog.GRACE_S = 2.0
    os.environ.update(variables)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ['train.py', config, '--launcher', 'pytorch']
    runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
