"""Seeded data loading: any batch of a run can be reproduced from the run's seed and position, without the previous batches.

mmengine seeds its workers once, so a random transform depends on everything that the same worker drew before. Here, every
sample has its own seed. The batch sampler derives the seed, and the dataset applies it in the process that loads the sample.
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

# The purpose of a seed: equal numbers give different seeds for different purposes.
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
    """Seed Python, NumPy and torch from one 64-bit seed, including accelerators unless ``devices=False``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def run_seed(runner: Runner) -> int:
    """Return the seed of a run, which is equal on all ranks."""
    return runner.seed - (get_rank() if runner._randomness_cfg.get('diff_rank_seed') else 0)


def seed_iteration(runner: Runner, iteration: int, *stream: int) -> None:
    """Seed the process for one training iteration, independent of what it drew before.

    Args:
        runner: The runner, for the run's seed.
        iteration: The iteration, from 0.
        stream: Numbers that distinguish this process: its rank and, if the model is split, its stage.
    """
    seed_process(*derive_seeds(ITERATION, run_seed(runner), iteration, *stream))


class SeededIndex(NamedTuple):
    """The index passed to the dataset: the index of the wrapped sampler, of any type, and the sample's seed."""

    index: Any
    seed: int


class SeededDataset:
    """A dataset that seeds the process with the sample's seed before it loads a sample.

    All other attributes are read from and set on the wrapped dataset, which hooks that switch pipelines need.

    Args:
        dataset: A map-style dataset of any library, wrapped or not.
    """

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, '_seeded', dataset)

    def __getitem__(self, item: SeededIndex) -> Any:
        seed_process(item.seed, devices=False)
        return self._seeded[item.index]

    def __len__(self) -> int:
        return len(self._seeded)

    def __getattr__(self, name: str) -> Any:
        # Special methods of the wrapped dataset (Subset's __getitems__, pickle's hooks) would bypass this class.
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
    """Wraps a batch sampler: starts at any batch, and adds to every index the seed of its sample.

    A sample's seed is a function of the run's seed, the rank, the pass over the data, the batch and the index in the batch.

    Args:
        batch_sampler: Any batch sampler over a sampler that draws a pass from its own ``seed``, as the libraries' samplers do.
    """

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self.rank = getattr(self.sampler, 'rank', get_rank())
        self.seed = self.epoch = self.to_skip = 0

    @property
    def sampler(self) -> Any:
        """The sampler of the batch sampler, on which mmengine sets the epoch, or the batch sampler itself if it has none."""
        return getattr(self.batch_sampler, 'sampler', self.batch_sampler)

    @property
    def is_reproducible(self) -> bool:
        """Whether a seed determines the order of samples, judged by the sampler's type and attributes."""
        return hasattr(self.sampler, 'seed') or isinstance(self.sampler, SequentialSampler)

    @property
    def batch_size(self) -> Any:
        return self.batch_sampler.batch_size

    def start(self, seed: int, epoch: int, batch: int) -> None:
        """Set the next pass over the data, and the number of its batches to skip.

        If the pass has fewer batches, ``to_skip`` is the remaining number after the pass.
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
    """A copy of a data loader over a :class:`SeededDataset`. Its workers start when the first batch is requested."""

    @classmethod
    def supports(cls, loader: DataLoader) -> bool:
        """Whether a loader can start at any position: torch's own loader class, with a map-style dataset and batches."""
        return (
            type(loader) is DataLoader and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
        )

    @classmethod
    def of(cls, loader: DataLoader) -> SeededDataLoader:
        options = {name: getattr(loader, name) for name in _LOADER_OPTIONS if hasattr(loader, name)}
        return cls(SeededDataset(loader.dataset), batch_sampler=SeededBatchSampler(loader.batch_sampler), **options)

    def __iter__(self) -> Iterator:
        yield from super().__iter__()
