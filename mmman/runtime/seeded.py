"""Data that is a function of the run's seed and of a position: any batch of a run can be made again without the ones before it.

mmengine seeds its workers once, so what a random transform draws depends on everything that the same worker drew before. Here
every sample has a seed of its own, which the batch sampler derives and the dataset applies, in whatever process loads it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

# What a seed is for: the same numbers give other seeds for other purposes.
SAMPLE, ITERATION = 1, 2

_LOADER_OPTIONS = (
    'num_workers',
    'collate_fn',
    'pin_memory',
    'timeout',
    'worker_init_fn',
    'multiprocessing_context',
    'generator',
    'prefetch_factor',
    'persistent_workers',
    'pin_memory_device',
    'in_order',
)


def derive_seeds(*numbers: int, count: int = 1) -> list[int]:
    """Derive ``count`` independent 64-bit seeds from non-negative numbers."""
    return np.random.SeedSequence(numbers).generate_state(count, np.uint64).tolist()


def seed_process(seed: int, devices: bool = True) -> None:
    """Seed Python, NumPy and torch from one 64-bit seed; the accelerators too, unless ``devices=False``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def run_seed(runner: Runner) -> int:
    """The seed of a run, the same on all ranks."""
    return runner.seed - (get_rank() if runner._randomness_cfg.get('diff_rank_seed') else 0)


def seed_iteration(runner: Runner, iteration: int, *stream: int) -> None:
    """Seed the process for one training iteration, whatever it drew before.

    Args:
        runner: The runner, for the run's seed.
        iteration: The iteration, from 0.
        stream: Numbers that make this process's draws its own: its rank and, where a model is split, its stage.
    """
    seed_process(*derive_seeds(ITERATION, run_seed(runner), iteration, *stream))


class SeededIndex(NamedTuple):
    """What the batch sampler asks of the dataset: the wrapped sampler's index, whatever it is, and the sample's seed."""

    index: Any
    seed: int


class SeededDataset:
    """A dataset whose samples are each drawn from their own seed.

    Reading or setting any other attribute is reading or setting it on the wrapped dataset, as hooks that switch pipelines do.

    Args:
        dataset: A map-style dataset, of any library, wrapped or not.
    """

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, '_seeded', dataset)

    def __getitem__(self, item: SeededIndex) -> Any:
        seed_process(item.seed, devices=False)
        return self._seeded[item.index]

    def __len__(self) -> int:
        return len(self._seeded)

    def __getattr__(self, name: str) -> Any:
        # A special method found on the wrapped dataset (Subset's __getitems__, pickle's hooks) would bypass this class.
        if name == '_seeded' or (name.startswith('__') and name.endswith('__')):
            raise AttributeError(name)
        return getattr(self._seeded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._seeded, name, value)

    def __getstate__(self) -> Any:
        return self._seeded

    def __setstate__(self, dataset: Any) -> None:
        object.__setattr__(self, '_seeded', dataset)


class SeededBatchSampler:
    """Another batch sampler's batches, from any batch on, every index with the seed of its sample.

    A sample's seed is a function of the run's seed, the rank, the pass over the data, the batch and the place in the batch.

    Args:
        batch_sampler: Any batch sampler over a sampler that draws a pass from its own ``seed``, as those of the libraries do.
    """

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self.rank = getattr(self.sampler, 'rank', get_rank())
        self.seed = self.epoch = self.to_skip = 0

    @property
    def sampler(self) -> Any:
        """The sampler that batches are made from; mmengine sets the epoch on it. A batch sampler may be its own."""
        return getattr(self.batch_sampler, 'sampler', self.batch_sampler)

    @property
    def is_reproducible(self) -> bool:
        """Whether the order of samples is known to follow from a seed, as far as the sampler's attributes tell."""
        return hasattr(self.sampler, 'seed') or isinstance(self.sampler, SequentialSampler)

    @property
    def batch_size(self) -> Any:
        return self.batch_sampler.batch_size

    def start(self, seed: int, epoch: int, batch: int) -> None:
        """Say which pass over the data comes next, and how many of its batches to leave out.

        Where the pass is shorter, ``to_skip`` is, after it, the rest.
        """
        self.seed, self.epoch, self.to_skip = seed, epoch, batch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        for position, batch in enumerate(self.batch_sampler):
            if self.to_skip:
                self.to_skip -= 1
                continue
            seeds = derive_seeds(SAMPLE, self.seed, self.rank, self.epoch, position, count=len(batch))
            yield [SeededIndex(index, seed) for index, seed in zip(batch, seeds, strict=True)]

    def __len__(self) -> int:
        return len(self.batch_sampler)


class SeededDataLoader(DataLoader):
    """A data loader's double over a :class:`SeededDataset`; its workers start when the first batch is asked for."""

    @classmethod
    def supports(cls, loader: DataLoader) -> bool:
        """Whether a loader's data can be had from any position: map-style, in batches, by torch's own loader."""
        return (
            type(loader) is DataLoader and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
        )

    @classmethod
    def of(cls, loader: DataLoader) -> SeededDataLoader:
        options = {name: getattr(loader, name) for name in _LOADER_OPTIONS if hasattr(loader, name)}
        return cls(SeededDataset(loader.dataset), batch_sampler=SeededBatchSampler(loader.batch_sampler), **options)

    def __iter__(self) -> Iterator:
        yield from super().__iter__()
