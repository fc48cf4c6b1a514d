"""A short run of the toy network, for tests of what reads trained models."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmman.registry import DATASETS
from tests.toy import toy_config

COUNT = 24
ORDER = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
"""The order in which images are drawn from the data."""


@DATASETS.register_module()
class ToyImages(Dataset):
    """Noise with a class: the mean of the first channel tells it."""

    def __init__(self, count: int = COUNT) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 3
        self.images = torch.randn(count, 3, 16, 16, generator=generator)
        self.images[:, 0] += self.labels[:, None, None] * 2.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {'inputs': self.images[index], 'data_samples': self.labels[index]}


def loader(count: int = COUNT, size: int = 8) -> dict:
    return {
        'batch_size': size,
        'num_workers': 0,
        'sampler': {'type': 'DefaultSampler', 'shuffle': True},
        'dataset': {'type': 'mmman.ToyImages', 'count': count},
        'collate_fn': {'type': 'default_collate'},
    }


def train(folder: Path, hook: bool = True, **model) -> Path:
    """Train for four iterations into ``folder``: a checkpoint, scalars, mmengine's copy of the config. Returns it."""
    cfg = Config(
        {
            'model': toy_config(**model),
            'work_dir': str(folder),
            'randomness': {'seed': 0},
            'train_dataloader': loader(),
            'val_dataloader': loader(),
            'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': 4, 'val_interval': 99},
            'val_cfg': {'type': 'ValLoop'},
            'val_evaluator': [],
            'optim_wrapper': {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
            'custom_hooks': [
                {'type': 'mmman.EMABiasHook', 'momentum': 0.9},
                *[{'type': 'mmman.LocalInspectorHook', 'interval': 2}] * hook,
            ],
            'default_hooks': {
                'logger': {'type': 'LoggerHook', 'interval': 2},
                'checkpoint': {'type': 'CheckpointHook', 'interval': 4, 'by_epoch': False},
            },
            'visualizer': {'type': 'Visualizer', 'vis_backends': [{'type': 'LocalVisBackend'}]},
            'log_processor': {'by_epoch': False, 'window_size': 1},
            'experiment_name': f'{folder.parent.name}-{folder.name}',
            'custom_imports': {'imports': ['tests.trained']},
        }
    )
    Runner.from_cfg(cfg).train()
    return folder
