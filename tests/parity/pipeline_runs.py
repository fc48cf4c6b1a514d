"""Runs for the pipeline's tests: the same config in one process, or one stage a process."""

import copy
import os
import socket
from collections import deque
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, HOOKS, METRICS
from torch import multiprocessing
from torch.utils.data import Dataset

from mmman import EMABiasHook
from mmman.runtime.launch import build_runner, leave_process_group
from mmman.runtime.resume import use_exact_resume
from tests.toy import CLASSES, toy_config


@DATASETS.register_module()
class ToyImages(Dataset):
    def __init__(self, count=24, pixels=16):
        self.metainfo = {'classes': tuple('abcde')}
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, pixels, pixels, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'inputs': self.images[index], 'data_samples': self.labels[index]}


@METRICS.register_module()
class ToyAccuracy(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        labels = data_batch['data_samples']
        self.results += [int(logits.argmax() == label) for logits, label in zip(data_samples, labels, strict=True)]

    def compute_metrics(self, results):
        return {'accuracy': sum(results) / len(results)}


@HOOKS.register_module()
class StaleEMAHook(EMABiasHook):
    """What the pipeline states of its momentum copies, in one process: a step counts S iterations late, or at a flush.

    Plain torch on clones of the parameters; flushes are those of the given iterations' ends.
    """

    def __init__(self, momentum, staleness, flush_every=10**9):
        super().__init__(momentum)
        self.staleness, self.flush_every, self.waiting = staleness, flush_every, deque()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        backbone = runner.model.backbone
        stepped, self._last_steps = runner.optim_wrapper.steps != self._last_steps, runner.optim_wrapper.steps
        states = [copy.deepcopy(head.source.of(backbone).state_dict()) for head in backbone.local.values()]
        self.waiting.append(states if stepped else None)
        while len(self.waiting) > (0 if (runner.iter + 1) % self.flush_every == 0 else self.staleness):
            states = self.waiting.popleft() or []
            for head, state in zip(backbone.local.values() if states else [], states, strict=True):
                for name, value in head.transfer.momentum.state_dict().items():
                    if value.is_floating_point():
                        value.copy_(torch.lerp(value, state[name], 1 - self.momentum))


def toy_run(work_dir, iters=6, batch_size=4, staleness=1, hook=None, wrapper=None, model=None, **options):
    """Config of a run of the toy classifier, one stage a process."""
    loader = {
        'dataset': {'type': 'ToyImages'},
        'batch_size': batch_size,
        'num_workers': 0,
        'sampler': {'type': 'DefaultSampler', 'shuffle': True},
        'collate_fn': {'type': 'default_collate'},
    }
    return Config(
        {
            'custom_imports': {'imports': [__name__]},
            'runner_type': 'mmman.PipelineRunner',
            'pipeline': {'staleness': staleness, 'timeout': 20},
            'model': toy_config(**(model or {})),
            'work_dir': str(work_dir),
            'train_dataloader': loader,
            'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': iters, 'val_interval': 10**9},
            'optim_wrapper': {
                'type': 'mmman.LocalLearningOptimWrapper',
                'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-3},
                **(wrapper or {}),
            },
            'param_scheduler': [{'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'begin': 0, 'end': 5}],
            'custom_hooks': [hook or {'type': 'mmman.EMABiasHook', 'momentum': 0.9}],
            'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'interval': iters, 'by_epoch': False}},
            'randomness': {'seed': 0},
            'log_level': 'WARNING',
            'experiment_name': Path(work_dir).name,
            **options,
        }
    )


def with_epochs(cfg, epochs):
    """The same run by epochs of six batches, each with a validation and a checkpoint at its end."""
    cfg.train_cfg = {'type': 'EpochBasedTrainLoop', 'max_epochs': epochs}
    cfg.val_cfg = {'type': 'ValLoop'}
    cfg.val_evaluator = {'type': 'ToyAccuracy'}
    cfg.val_dataloader = {**cfg.train_dataloader, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}}
    cfg.default_hooks.checkpoint = {'type': 'CheckpointHook', 'interval': 1, 'save_best': 'toy/accuracy'}
    return cfg


def run_alone(cfg):
    """Train in this process, all blocks, and return the last checkpoint."""
    for key in ('runner_type', 'pipeline'):
        cfg.pop(key, None)
    train(cfg)
    return last_checkpoint(cfg.work_dir)


def train(cfg):
    torch.set_num_threads(1)
    cfg.setdefault('launcher', 'none')
    use_exact_resume(cfg)
    build_runner(cfg).train()
    leave_process_group()


def last_checkpoint(work_dir):
    return torch.load(Path(work_dir, 'last_checkpoint').read_text())


def run_in_processes(cfgs):
    """Train configs one after the other, each in as many processes as given beside it."""
    runs = [(cfg.to_dict(), processes, free_port()) for cfg, processes in cfgs]
    multiprocessing.spawn(_worker, (runs,), nprocs=max(processes for _, processes in cfgs))


def _worker(rank, runs):
    for cfg, processes, port in runs:
        if rank < processes:
            os.environ.update(environment(rank, processes, port))
            train(Config({**cfg, 'launcher': 'pytorch'}))


def environment(rank, processes, port):
    """What a launcher tells a process."""
    numbers = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': processes, 'MASTER_PORT': port}
    return {'MASTER_ADDR': '127.0.0.1', **{name: str(number) for name, number in numbers.items()}}


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
