"""mmengine's train loops with exact resume: a run resumed at any iteration equals an uninterrupted one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from mmengine.runner import EpochBasedTrainLoop as MMEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMIterBasedTrainLoop
from torch.utils.data import DataLoader

from mmman.errors import CheckpointError, ConfigError
from mmman.registry import LOOPS
from mmman.runtime.resume import ExactResumeHook
from mmman.runtime.resume_record import ResumeRecordHook
from mmman.runtime.seeded import SeededDataLoader, run_seed, seed_iteration


class ResumableLoop(BaseLoop):
    """Base of both loops: seeded data, a seed for every iteration, and the position in the data from which to resume."""

    by_epoch: bool

    def __init__(self, runner: Runner, dataloader: DataLoader | dict) -> None:
        super().__init__(runner, dataloader)
        self.is_seeded = SeededDataLoader.supports(self.dataloader)
        reason = 'a custom loader or an iterable dataset'
        if self.is_seeded:
            self.dataloader = SeededDataLoader.of(self.dataloader)
            sampler = self.dataloader.batch_sampler
            reason = '' if sampler.is_reproducible else f'{type(sampler.sampler).__name__}, which has no seed'
        if reason:
            message = f'The training data comes from {reason}: a resumed run will not be exact'
            print_log(message, logger='current', level=logging.WARNING)
        self.resumed_batch = 0
        self._pass, self._pass_start = 0, 0
        runner.register_hook(ExactResumeHook())
        runner.register_hook(ResumeRecordHook())

    def data_signature(self) -> dict[str, int]:
        """Return the values that have to be equal for the rest of an epoch to be equal."""
        sampler = self.dataloader.batch_sampler
        return {
            'processes': get_world_size(),
            'batch size': getattr(sampler, 'batch_size', None) or 0,
            'dataset length': len(self.dataloader.dataset) if self.is_seeded else 0,
        }

    @property
    def batches(self) -> int:
        """Number of batches of a pass over the data, or 0 if unknown."""
        return len(self.dataloader) if hasattr(self.dataloader.dataset, '__len__') else 0

    @property
    def sampler_seed(self) -> int | None:
        """The seed that determines the order of samples, or None if the sampler has no seed."""
        return getattr(getattr(self.dataloader.batch_sampler, 'sampler', None), 'seed', None)

    def position(self, epoch: int, iteration: int) -> int:
        """Return the number of batches completed in the epoch of a checkpoint that stores this epoch and iteration."""
        return iteration - self._pass_start if epoch == self._pass else 0

    def is_regular(self, epoch: int, iteration: int, batch: int) -> bool:
        """Whether a run whose epochs all have the current number of batches reaches this position."""
        return batch <= self.batches and iteration == epoch * self.batches + batch

    def is_possible(self, epoch: int, iteration: int, batch: int) -> bool:
        """Whether a run whose epochs have different numbers of batches can reach this position."""
        return epoch <= iteration - batch if epoch else iteration == batch

    def _start_pass(self, epoch: int, batch: int) -> None:
        """Position the data at a batch of a pass. ``_iter`` is that batch's iteration."""
        self._pass, self._pass_start = epoch, self._iter - batch
        if self.is_seeded:
            self.dataloader.batch_sampler.start(run_seed(self.runner), epoch, batch)
        elif batch:
            raise CheckpointError(
                f'cannot resume in the middle of an epoch (batch {batch}): the training data has no batch sampler to position; '
                'resume from a checkpoint at the end of an epoch'
            )


@LOOPS.register_module()
class EpochBasedTrainLoop(MMEpochBasedTrainLoop, ResumableLoop):
    """mmengine's epoch-based loop that can also resume within an epoch. The arguments are those of mmengine's loop."""

    by_epoch = True
    _first = 0

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of the epoch after a resume."""
        self._first, self.resumed_batch = self.resumed_batch, 0
        self._start_pass(self._epoch, self._first)
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: list[dict]) -> None:
        """Train one batch.

        Args:
            idx: The batch's index among the batches of the epoch that this process has loaded since it started or resumed.
            data_batch: The batch.
        """
        seed_iteration(self.runner, self._iter, get_rank())
        super().run_iter(self._first + idx, data_batch)


@LOOPS.register_module()
class IterBasedTrainLoop(MMIterBasedTrainLoop, ResumableLoop):
    """mmengine's iteration-based loop. On resume it loads no batch that was trained already. Arguments: see mmengine's loop."""

    by_epoch = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.is_seeded:
            self.dataloader_iterator = self._endless_batches()

    def position(self, epoch: int, iteration: int) -> int:
        """Return the number of batches so far, as there are no epochs."""
        return iteration

    def is_regular(self, epoch: int, iteration: int, batch: int) -> bool:
        """Whether the position is possible: all batches so far count, and the whole run is one epoch."""
        return iteration == batch and epoch <= 1

    is_possible = is_regular

    def run_iter(self, data_batch: list[dict]) -> None:
        """Train one batch."""
        seed_iteration(self.runner, self._iter, get_rank())
        super().run_iter(data_batch)

    def _endless_batches(self) -> Iterator:
        """Yield batches of one pass after another, from the iteration of the resumed checkpoint on."""
        epoch, to_skip = 0, self._iter
        for _ in range(to_skip):
            yield None  # mmengine advances the iterator past the trained batches
        while True:
            before = self._iter, to_skip
            self._start_pass(epoch, to_skip)
            yield from self.dataloader
            epoch, to_skip = epoch + 1, self.dataloader.batch_sampler.to_skip
            if (self._iter, to_skip) == before:
                raise ConfigError(
                    'the training data yields no batch: lower train_dataloader.batch_size, or set drop_last=False'
                )
