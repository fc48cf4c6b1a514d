"""Time a short run of the real pipeline on this machine, with one process per block and random data."""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import multiprocessing
from torch.utils.data import DataLoader

from mmman.analysis.dummy_model import build_dummy_model, model_config, random_batch
from mmman.parallel.pipeline import PipelineRunner

WARMUP = 6
"""Number of first iterations that aren't timed, while the pipeline fills."""


class StepTimes(Hook):
    """Record when each iteration of a stage ended, and how long the stage computed for it, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.computed: list[float] = []

    def before_train(self, runner: PipelineRunner) -> None:
        stage = runner.model
        begin = stage.comm.wait_credit

        def wait_credit(iteration: int) -> None:
            begin(iteration)
            self._began = time.perf_counter()

        stage.comm.wait_credit = wait_credit

    def after_train_iter(self, *args, **kwargs) -> None:
        self.ends.append(time.perf_counter())
        self.computed.append(self.ends[-1] - self._began)


def pipeline_seconds(
    cfg: Config, stages: int, batch: int, height: int, width: int, iterations: int
) -> tuple[float, list[float]]:
    """Time a filled pipeline with one thread per process.

    Args:
        cfg: Config whose model and optimizer are used. The images are random.
        stages: K, the number of blocks and of processes.
        batch: Images per iteration.
        height, width: Size of the images, pixels.
        iterations: Number of timed iterations.

    Returns:
        Mean seconds per iteration; and for each stage the mean seconds per iteration in which it computed.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_stage, (stages, port, folder, cfg, batch, height, width, iterations), nprocs=stages)
        found = [json.loads(Path(folder, f'{stage}.json').read_text()) for stage in range(stages)]
    return found[0][0], [computed for _, computed in found]


def _stage(
    rank: int, stages: int, port: int, folder: str, cfg: Config, batch: int, height: int, width: int, iterations: int
) -> None:
    torch.set_num_threads(1)
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    os.environ.update(zip(names, map(str, (rank, stages, rank, '127.0.0.1', port)), strict=True))
    model, _ = build_dummy_model(cfg, height, width)  # random_batch() reads the number of classes from it
    data = random_batch(model, cfg.default_scope, batch, height, width)
    times = StepTimes()
    count = WARMUP + iterations
    runner = PipelineRunner(
        model=model_config(cfg, height, width),
        work_dir=folder,
        train_dataloader=DataLoader([data] * count, batch_size=None),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': count},
        optim_wrapper=cfg.optim_wrapper,
        default_hooks=dict.fromkeys(['checkpoint', 'logger', 'sampler_seed']),
        custom_hooks=[{'type': 'mmman.EMABiasHook'}],
        launcher='pytorch',
        default_scope=cfg.default_scope,
        log_level='WARNING',
        cfg=Config({'pipeline': cfg.get('pipeline')}),
    )
    runner.register_hook(times)
    runner.train()
    seconds = (times.ends[-1] - times.ends[WARMUP - 1]) / iterations, statistics.mean(times.computed[WARMUP:])
    Path(folder, f'{rank}.json').write_text(json.dumps(seconds))
