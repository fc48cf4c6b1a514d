"""Choose cuts, what is recomputed, and the number of images per chunk within limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mmman.errors import CostError
from mmman.planning.choice import FitRow, Limits
from mmman.planning.costs import MemoryPlan, StepCost, peak_of
from mmman.planning.profile import Profile
from mmman.planning.search import fewest_flops, smallest_peak


@dataclass(frozen=True)
class ChunkPlan:
    """A memory plan, and how many images neck, head and loss run on at a time.

    Attributes:
        images: Images per chunk. None: there are no chunks.
        step: The costs of a training step with so many images per chunk.
        plan: The cuts, and what is recomputed.
    """

    images: int | None
    step: StepCost
    plan: MemoryPlan

    @cached_property
    def peak(self) -> int:
        """Bytes."""
        return peak_of(self.step, self.plan).total

    @cached_property
    def work(self) -> int:
        """Nanoseconds of a training step on the device, or FLOPs if there is none."""
        return _planned_by(self.step).total(self.plan)

    def __str__(self) -> str:
        return '' if self.images is None else f'{self.images} image{"s" * (self.images > 1)} a chunk'


def local_plan(
    profile: Profile, sizes: Sequence[int], blocks: int, last_units: Sequence[str] | None, limits: Limits, base: FitRow
) -> ChunkPlan:
    """The plan within the limits with the fewest FLOPs, on a device with the least time.

    Without a memory limit, or if no plan is within it, the plan with the smallest peak. With given cuts all blocks have one
    recompute mode; if no mode is within the limits, nothing is recomputed.

    Args:
        profile: The costs of the config's training step.
        sizes: Numbers of images per chunk to choose from. Empty: there are no chunks.
        blocks: Number of blocks K.
        last_units: Names of the last units of all blocks but one. Default: any.
        limits: What a step may cost. ``base`` is the config as it is.

    Raises:
        CostError: No plan with K blocks is within the limit of FLOPs or time, or the cuts leave the last block no output.
    """
    plans, refusal = [], None
    for images in sizes or (None,):
        step = profile.in_chunks_of(images)
        if last_units is not None:
            cuts = _cuts_after(profile, last_units)
            plans += [ChunkPlan(images, step, MemoryPlan(cuts, (mode,) * blocks)) for mode in step.choices]
            continue
        planned_by = _planned_by(step)
        largest = _largest_work(limits, base, planned_by)
        try:
            smallest = smallest_peak(planned_by, blocks, None if largest is None else largest / planned_by.flops - 1)
        except CostError as error:
            refusal = error
            continue
        plans.append(ChunkPlan(images, step, smallest))
        if limits.memory is not None and plans[-1].peak <= limits.memory:
            plans[-1] = ChunkPlan(images, step, fewest_flops(planned_by, limits.memory, blocks))
    if not plans:
        raise refusal
    return best_of(plans, limits, base)


def best_of(plans: Sequence[ChunkPlan], limits: Limits, base: FitRow) -> ChunkPlan:
    """Of the plans within the limits, that with the least work; without a memory limit, that with the smallest peak.

    If none is within the limit of memory, that with the smallest peak. If none is within the limit of work, the first.
    """
    affordable = [plan for plan in plans if _is_affordable(plan, limits, base)] or [plans[0]]
    within = [plan for plan in affordable if limits.memory is not None and plan.peak <= limits.memory]
    return min(within, key=lambda plan: (plan.work, plan.peak)) if within else min(affordable, key=lambda plan: plan.peak)


def _planned_by(step: StepCost) -> StepCost:
    return step.timed() if step.time else step


def _largest_work(limits: Limits, base: FitRow, step: StepCost) -> float | None:
    """Nanoseconds (FLOPs, without a device) that a step may take. None: no limit."""
    share, work = (limits.slowdown, base.time) if step.time else (limits.overhead, base.flops)
    return None if share is None else (1 + share) * work


def _is_affordable(plan: ChunkPlan, limits: Limits, base: FitRow) -> bool:
    largest = _largest_work(limits, base, plan.step)
    return largest is None or plan.work <= largest


def _cuts_after(profile: Profile, last_units: Sequence[str]) -> tuple[int, ...]:
    cuts = tuple(map(profile.names.index, last_units))
    if not set(cuts) <= set(profile.step.candidates):
        raise CostError(f'a cut after {profile.names[cuts[-1]]} leaves no backbone output to the last block')
    return cuts
