"""What a training is given: its length, images, batch and learning rate. Rows are comparable at one budget only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmengine.config import Config, ConfigDict

from mmman.runtime.launch import type_name

SHARED = ('train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator', 'param_scheduler', 'auto_scale_lr')
"""Settings in which rows of one table must be equal, beside the optimizer."""

SCALABLE = ('CosineAnnealingLR', 'LinearLR', 'MultiStepLR')


@dataclass(frozen=True)
class Budget:
    """The numbers of a budget, for tables.

    Attributes:
        length: Number of ``unit``, which is ``'iterations'`` or ``'epochs'``.
        options: Other settings that the command line overrides for all rows.
    """

    length: int
    unit: str
    train_images: int
    val_images: int
    batch_size: int
    lr: float
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: dict) -> Budget:
        """The budget in a ``result.json``."""
        return cls(**{**result['budget'], 'options': tuple(result['budget']['options'])})

    def __str__(self) -> str:
        images = f'{self.train_images} train and {self.val_images} validation images'
        return ', '.join([f'{self.length} {self.unit}', f'batch {self.batch_size}', f'lr {self.lr:g}', images, *self.options])

    @property
    def folder(self) -> str:
        """The budget as the name of a folder, without the options."""
        images = f'{self.train_images}train_{self.val_images}val'
        return f'{self.length}{self.unit}_{images}_batch{self.batch_size}_lr{self.lr:g}'


def shared_settings(cfg: Config) -> dict:
    """The settings of a config that all rows of a table share, by dotted key."""
    shared = {key: cfg.get(key) for key in SHARED} | {'optim_wrapper.optimizer': cfg.optim_wrapper.optimizer}
    return _flat(Config(shared).to_dict())


def _flat(value: object, key: str = '') -> dict:
    """Nested dicts and sequences as one dict by dotted key."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    flat = {}
    for name, child in children:
        flat |= _flat(child, f'{key}.{name}' if key else str(name))
    return flat if children else {key: value}


def differences(settings: dict, wanted: dict) -> list[str]:
    """What differs between flat settings, one line a key."""
    keys = dict.fromkeys([*settings, *wanted])
    return [f'{key} is {wanted.get(key)}, not {settings.get(key)}' for key in keys if settings.get(key) != wanted.get(key)]


def take_images(dataset: ConfigDict, total: int, count: int) -> None:
    """Keep ``count`` of a dataset's ``total`` images."""
    if count > total:
        raise SystemExit(f'{count} images wanted, but {type_name(dataset)} has {total}')
    if count < total:
        if {'dataset', 'datasets', 'indices'} & set(dataset):
            raise SystemExit(f'fewer images: {type_name(dataset)} wraps or cuts a dataset already')
        dataset.indices = spread(total, count)


def spread(total: int, count: int) -> list[int]:
    """``count`` indices, evenly spaced over ``range(total)``: a dataset that is sorted by class keeps its mix of classes."""
    return [i * total // count for i in range(count)]


def scale_scheduler(scheduler: dict, own: int, epochs: int, iterations: int) -> dict:
    """A scheduler of a training of ``own`` epochs, scaled to one of ``epochs`` with ``iterations`` iterations each.

    Points in time are rounded to epochs or, with ``convert_to_iter_based``, to iterations; none but 0 becomes 0. A LinearLR
    lasts at least two of them, because mmengine leaves its first factor in place after one.
    """
    name, by_epoch, scheduler = type_name(scheduler), scheduler.get('by_epoch', True), dict(scheduler)
    if name not in SCALABLE or not by_epoch:
        unit = '' if by_epoch else ' that counts iterations'
        raise SystemExit(f'--epochs: cannot scale a {name}{unit}, only {", ".join(SCALABLE)} that count epochs')
    scheduler['by_epoch'] = not scheduler.pop('convert_to_iter_based', False)
    steps = 1 if scheduler['by_epoch'] else iterations

    def scale(point: float) -> int:
        return max(1, round(point * epochs * steps / own)) if point else 0

    begin = scheduler.get('begin', 0)
    if 'T_max' in scheduler:
        scheduler['T_max'] = scale(begin + scheduler['T_max']) - scale(begin)
    if 'milestones' in scheduler:
        scheduler['milestones'] = [scale(point) for point in scheduler['milestones']]
    scheduler |= {key: scale(scheduler[key]) for key in ('begin', 'end') if key in scheduler}
    if name == 'LinearLR' and 'end' in scheduler:
        scheduler['end'] = max(scheduler['end'], scale(begin) + 2)
    if scheduler.get('end', math.inf) <= scale(begin) or scheduler.get('T_max', 1) < 1:
        raise SystemExit(f'--epochs: {epochs} are too few for the {name} that begins at epoch {begin} of {own}')
    return scheduler
