"""Classification: CIFAR ResNets on all of CIFAR-10, which is decoded once and augmented in batches."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from training_rows.task import CONFIGS, Metric, Recipe, RowSource, Task, loader

ROWS = {
    'e2e': 'table1/cifar10_resnet32_e2e',
    'dgl': 'table7/cifar10_resnet32_k16_dgl',
    'ema': 'table7/cifar10_resnet32_k16_ema',
    'man': 'table7/cifar10_resnet32_k16_man',
    'manpp': 'table7/cifar10_resnet32_k16_manpp',
    'infopro_manpp': 'table1/cifar10_resnet32_k16_infopro_manpp',
    'light': CONFIGS / 'resnet32_manpp_k16_cifar10.py',
}


def fit_model(cfg: Config) -> None:
    """Augment on the device of the model: pad by 4 pixels, crop and flip at random, normalise."""
    cfg.data_preprocessor = {
        'type': 'mmman.BatchCropFlip',
        'preprocessor': {'type': 'ClsDataPreprocessor', **cfg.data_preprocessor},
    }


def set_data(cfg: Config, root: Path) -> None:
    """Read CIFAR-10 from ``train.npz`` and ``test.npz``."""
    train, val = (
        {'type': 'mmman.PackedImageDataset', 'ann_file': str(root / f'{split}.npz'), 'pipeline': [{'type': 'PackInputs'}]}
        for split in ('train', 'test')
    )
    cfg.train_dataloader = loader(train, shuffle=True)
    cfg.val_dataloader = loader({**val, 'test_mode': True}, batch_size=500)
    cfg.val_evaluator = {'type': 'Accuracy', 'topk': (1,)}


def cosine(epochs: int) -> list[dict]:
    """A cosine to 0, updated every iteration."""
    return [{'type': 'CosineAnnealingLR', 'T_max': epochs, 'begin': 0, 'end': epochs, 'convert_to_iter_based': True}]


TASK = Task(
    name='classification',
    rows={name: RowSource(source) for name, source in ROWS.items()},
    metrics=(Metric('accuracy/top1', 'top-1 accuracy, %'),),
    recipe=Recipe(
        unit='epochs',
        length=15,
        validations=5,
        batch_size=128,
        optimizer={'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 1e-4},
        schedule=cosine,
    ),
    files=('train.npz', 'test.npz'),
    set_data=set_data,
    fit_model=fit_model,
)
