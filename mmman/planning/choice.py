"""The ways to train a config in less memory, with their predicted cost, and the choice of one that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmman.errors import CostError
from mmman.planning.costs import Peak

SAME = 'the same'
LOCAL = 'MAN++'
BY_CHUNK = 'as on more GPUs'
END_TO_END = 'end to end'
AS_IT_IS = 'the config as it is'
WITH_CP = "the stock backbone's with_cp"


@dataclass(frozen=True)
class Changes:
    """What a child config changes in its base.

    Attributes:
        stock: Options of the stock backbone.
        local: Options of ``mmman.LocalBackbone``, without local head and transfer. Empty: the backbone is the stock one.
        optim_wrapper: Options of the optim wrapper.
    """

    stock: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    optim_wrapper: dict[str, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return self.local.get('num_blocks', 1)


@dataclass(frozen=True)
class FitRow:
    """One way to train a config, and its predicted cost.

    Attributes:
        name: What is changed, in a few words.
        trains: How it trains: :data:`SAME` as the config; :data:`BY_CHUNK`, with losses normalised chunk by chunk;
            :data:`LOCAL`; for a localised config :data:`END_TO_END`; or what else differs.
        changes: The changes of the config.
        peak: The peak of a training step. None if it can't be predicted.
        flops: FLOPs of a training step, without the optimizer.
        operators: Number of operators of a training step, without views and the optimizer: about the kernel launches.
        time: Nanoseconds of a training step on a device, without the optimizer. 0 if no device was asked for.
        note: Why the peak can't be predicted, or why the row is not available.
        is_available: Whether the config can be trained in this way.
    """

    name: str
    trains: str
    changes: Changes
    peak: Peak | None = None
    flops: int = 0
    operators: int = 0
    time: int = 0
    note: str = ''
    is_available: bool = True


@dataclass(frozen=True)
class Limits:
    """What a training step may cost.

    Attributes:
        memory: Largest peak, bytes. None: no limit; the smallest peak is wanted.
        overhead: Largest share of FLOPs in addition to those of the config as it is. None: no limit.
        slowdown: The same for the time on a device.
    """

    memory: int | None = None
    overhead: float | None = None
    slowdown: float | None = None

    def fits(self, row: FitRow, base: FitRow) -> bool:
        """Whether a row is within the limits. ``base`` is the config as it is."""
        if row.peak is None or (self.memory is not None and row.peak.total > self.memory):
            return False
        if self.slowdown is not None and row.time > (1 + self.slowdown) * base.time:
            return False
        return self.overhead is None or row.flops <= (1 + self.overhead) * base.flops


def choose_row(rows: Sequence[FitRow], limits: Limits, batch: int, number: int | None = None) -> FitRow:
    """The row with a number, counted from 1. By default the first within the limits; without a memory limit, the smallest.

    Raises:
        CostError: No row has this number, the row is not available, or no row is within the limits. The message then tells what
            would fit of a step of ``batch`` images.
    """
    if number is not None:
        if not 1 <= number <= len(rows):
            raise CostError(f'--choose {number}: choose a row from 1 to {len(rows)}')
        row = rows[number - 1]
        if not row.is_available:
            raise CostError(f'--choose {number}: {row.name}: {row.note}')
        return row
    fitting = [row for row in rows if limits.fits(row, rows[0])]
    if not fitting:
        raise CostError(f'nothing fits: {what_would_fit(rows, limits, batch)}')
    return fitting[0] if limits.memory is not None else min(fitting, key=lambda row: row.peak.total)


def what_would_fit(rows: Sequence[FitRow], limits: Limits, batch: int) -> str:
    """Describe how far the smallest row of a step of ``batch`` images is above the memory limit, and what would be below it."""
    known = [row for row in rows if row.peak is not None and replace(limits, memory=None).fits(row, rows[0])]
    smallest = min(known, key=lambda row: row.peak.total)
    too_much = (smallest.peak.total - limits.memory) / 1e6
    text = f'the smallest peak is {smallest.peak.total / 1e6:.1f} MB ({smallest.name}), {too_much:.1f} MB too much'
    if any(row.changes.optim_wrapper.get('images_per_chunk', 1) > 1 for row in known):
        text += '; fewer images a chunk may take less (--images-per-chunk 1)'
    if batch > 1:
        images = max(images_that_fit(row, limits.memory, batch) for row in known)
        text += f'; about {images} of {batch} images would fit (--batch {images})' if images else '; no batch would fit'
    return text


def images_that_fit(row: FitRow, memory: int, batch: int) -> int:
    """About how many images fit into ``memory``: activations grow with their number, the rest of the peak doesn't."""
    parts = row.peak.parts
    images = parts['activations and outputs'] + parts['transient']
    return min(batch, int(batch * (memory - row.peak.total + images) / images)) if memory > row.peak.total - images else 0
