"""Compute the peak memory of one training step from the costs of its parts.

This module is pure arithmetic. :mod:`mmman.planning.profile` measures the costs on a model. :mod:`mmman.planning.search` finds
the cuts with the smallest peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum


class RecomputeMode(IntEnum):
    """How much of a block's forward pass is recomputed in the backward pass."""

    NONE = 0
    SELECTIVE = 1
    FULL = 2


@dataclass(frozen=True)
class UnitCost:
    """Memory, in bytes, and work of one unit on one batch.

    Attributes:
        kept: Tensors that the forward pass saves for the backward pass, including the output, excluding parameters and input.
        forward: Peak of the forward pass, above what was alive before it.
        backward: Peak of the backward pass, above what was alive after the forward pass. Includes the gradients of the output
            and of the parameters.
        output: The output.
        tap: For a unit that makes a backbone output in a non-final block: what stays alive of that output until the backward
            pass of the task loss. 0 for other units.
        gradient: Gradients of the parameters.
        flops: FLOPs of the forward and backward pass.
        holds: Index of the unit whose output is the input of this unit's stage. The backbone's forward pass holds that tensor
            while this unit runs. Below 0 if there is none.
        is_read: Whether neck, head or loss read the backbone output that this unit makes. An unread output is freed before they
            run.
        backward_held: Like ``backward``, but the output stays alive until the end of the backward pass.
        operators: Number of operators of the forward and backward pass, without views.
        time: Nanoseconds of the forward and backward pass on a device. 0 if no device was asked for.
    """

    kept: int
    forward: int
    backward: int
    output: int
    tap: int = 0
    gradient: int = 0
    flops: int = 0
    holds: int = -1
    is_read: bool = True
    backward_held: int = 0
    operators: int = 0
    time: int = 0


@dataclass(frozen=True)
class HeadCost:
    """Memory, in bytes, and work of one head on one batch: a local head, or the task's neck, head and loss.

    Attributes:
        static: Parameters, buffers and optimizer state. 0 for the task, whose static bytes are in :attr:`StepCost.base`.
        peak: Peak of the forward and backward pass, above what was alive before.
        gradient: Gradients of the parameters.
        flops: FLOPs of the forward and backward pass.
        operators: Number of operators of the forward and backward pass, without views.
        time: Nanoseconds of the forward and backward pass on a device. 0 if no device was asked for.
    """

    static: int
    peak: int
    gradient: int
    flops: int = 0
    operators: int = 0
    time: int = 0


@dataclass(frozen=True)
class StepCost:
    """Costs of all parts of a training step.

    Attributes:
        base: Bytes that are always alive: the batch, and parameters, buffers and optimizer state of everything but local heads.
        units: Costs of the backbone's units, without recomputation.
        task: Cost of neck, head and loss.
        head: Returns the cost of the local head after a unit. Arguments: the unit's index; the smallest stride of a cut that is
            larger than the stride at this cut, or None; whether no cut has a smaller stride; the recompute mode of the next
            block, whose first unit the head copies. The strides matter for heads of detectors.
        strides: For every unit, the stride that a local head after it sees; never decreasing.
        flops: FLOPs of end-to-end training without recomputation, the reference for overheads.
        recomputed: Costs of the units under :attr:`RecomputeMode.SELECTIVE` and :attr:`RecomputeMode.FULL`. Empty if plans
            don't choose a mode.
        first: Index of the first unit with a trainable parameter.
        update: Bytes that an optimizer step needs in addition to parameters, state and gradients.
        is_immediate: Whether a block takes its optimizer step and frees its gradients before the next block starts.
        in_chunks: Whether neck, head and loss run on a few images at a time. The gradients of all backbone outputs that receive
            one are then alive while they run.
        time: Nanoseconds of end-to-end training without recomputation and without chunks. 0 if no device was asked for.
        work: What ``flops`` counts.
        end: Index of the first unit that is not cut after. None: of the one that makes the last backbone output.
    """

    base: int
    units: tuple[UnitCost, ...]
    task: HeadCost
    head: Callable[[int, int | None, bool, RecomputeMode], HeadCost]
    strides: tuple[int, ...]
    flops: int
    recomputed: tuple[tuple[UnitCost, ...], tuple[UnitCost, ...]] | tuple[()] = ()
    first: int = 0
    update: int = 0
    is_immediate: bool = False
    in_chunks: bool = False
    time: int = 0
    work: str = 'FLOPs'
    end: int | None = None

    def timed(self) -> StepCost:
        """These costs with nanoseconds in place of FLOPs, to plan by time."""
        units, *recomputed = (tuple(map(_timed, own)) for own in (self.units, *self.recomputed))
        head, task = (lambda *at: _timed(self.head(*at))), _timed(self.task)
        return replace(self, units=units, recomputed=tuple(recomputed), head=head, task=task, flops=self.time, work='time')

    @property
    def candidates(self) -> range:
        """Indices of the units to cut after: from the first trainable unit to the one before the last backbone output."""
        return range(self.first, max(i for i, unit in enumerate(self.units) if unit.tap) if self.end is None else self.end)

    def before_outputs(self) -> StepCost:
        """These costs with only the cuts that leave all backbone outputs that are read to the last block."""
        return replace(self, end=next((i for i, unit in enumerate(self.units) if unit.tap and unit.is_read), None))

    @property
    def choices(self) -> tuple[RecomputeMode, ...]:
        """Recompute modes that a block may have."""
        return tuple(RecomputeMode)[: len(self.recomputed) + 1]

    def units_of(self, mode: RecomputeMode) -> tuple[UnitCost, ...]:
        """Costs of all units under a recompute mode."""
        return (self.units, *self.recomputed)[mode]

    def heads(self, plan: MemoryPlan) -> list[HeadCost]:
        """Costs of the local heads of a plan."""
        strides = [self.strides[cut] for cut in plan.cuts]
        larger = [min((s for s in strides if s > own), default=None) for own in strides]
        smallest = [s == min(strides) for s in strides]
        return [self.head(*at) for at in zip(plan.cuts, larger, smallest, plan.modes[1:], strict=True)]

    def overhead(self, plan: MemoryPlan) -> float:
        """FLOPs (time, of :meth:`timed` costs) beyond those of end-to-end training without recomputation, relative to them."""
        units = sum(unit.flops for start, end, mode in self.blocks(plan) for unit in self.units_of(mode)[start : end + 1])
        return self.overhead_with(units + sum(head.flops for head in self.heads(plan)))

    def total(self, plan: MemoryPlan) -> int:
        """FLOPs of a training step under a plan; nanoseconds of :meth:`timed` costs."""
        return round((1 + self.overhead(plan)) * self.flops)

    def overhead_with(self, flops: int) -> float:
        """The overhead for a given number of FLOPs of units and local heads."""
        return (self.task.flops + flops) / self.flops - 1

    def operators(self, plan: MemoryPlan) -> int:
        """Number of operators of the forward and backward pass, without views: about the number of kernel launches."""
        units = sum(unit.operators for start, end, mode in self.blocks(plan) for unit in self.units_of(mode)[start : end + 1])
        return units + sum(head.operators for head in self.heads(plan)) + self.task.operators

    def blocks(self, plan: MemoryPlan) -> Iterator[tuple[int, int, RecomputeMode]]:
        """Index of the first unit, index of the last unit, and recompute mode of every block."""
        return zip([0, *(cut + 1 for cut in plan.cuts)], [*plan.cuts, len(self.units) - 1], plan.modes, strict=True)


def _timed(cost: UnitCost | HeadCost) -> UnitCost | HeadCost:
    return replace(cost, flops=cost.time)


@dataclass(frozen=True)
class MemoryPlan:
    """Where a backbone is cut, and what each block recomputes.

    Attributes:
        cuts: Indices of the last units of the first K-1 blocks, ascending.
        modes: Recompute mode of each of the K blocks. Default: :attr:`RecomputeMode.NONE` for all.
    """

    cuts: tuple[int, ...] = ()
    modes: tuple[RecomputeMode, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, 'modes', self.modes or (RecomputeMode.NONE,) * (len(self.cuts) + 1))


@dataclass(frozen=True)
class Peak:
    """The moment of a training step at which the most bytes are alive.

    Attributes:
        total: Bytes alive.
        moment: What is running, e.g. ``local head 2``.
        parts: Bytes by kind; their sum is ``total``.
    """

    total: int
    moment: str
    parts: dict[str, int]


def peak_of(step: StepCost, plan: MemoryPlan) -> Peak:
    """The peak of a training step under a plan. A plan without cuts is end-to-end training."""
    heads = [*step.heads(plan), step.task]
    static = {'without local heads': step.base, 'local heads': sum(head.static for head in heads[:-1])}
    gradients, found = 0, []
    for j, ((start, end, mode), head) in enumerate(zip(step.blocks(plan), heads, strict=True), start=1):
        gradients = 0 if step.is_immediate else gradients
        for phase, activations, extra, own in moments(step, start, end, mode, head, is_last=j == len(heads)):
            what = f'block {j}, {phase}' if phase != 'head' else f'local head {j}' if j < len(heads) else 'neck, head, loss'
            parts = {'gradients': gradients + own, 'activations and outputs': activations, 'transient': extra}
            found.append((what, parts))
        gradients += head.gradient + sum(unit.gradient for unit in step.units[start : end + 1])
    found.append(('optimizer step', {'gradients': gradients, 'activations and outputs': 0, 'transient': step.update}))
    moment, parts = max(found, key=lambda one: sum(one[1].values()))
    return Peak(sum(static.values()) + sum(parts.values()), moment, {**static, **parts})


def moments(
    step: StepCost, start: int, end: int, mode: RecomputeMode, head: HeadCost, is_last: bool
) -> Iterator[tuple[str, int, int, int]]:
    """Yield the moments of one block's training: phase, bytes of activations, of transients, of the block's gradients so far.

    The optimizer step is included only for a non-final block with immediate updates. Neither the joint step of all blocks nor
    the last block's step is included; at both, only gradients are alive.
    """
    units = step.units_of(mode)
    taps = sum(unit.tap for unit in units[:start])
    given = units[start - 1].output if start and not units[start - 1].tap else 0
    alive = [taps + given]
    for i in range(start, end + 1):
        yield 'forward', alive[-1] + _stage_input(units, start, i), units[i].forward, 0
        alive.append(alive[-1] + units[i].kept)
    if is_last:
        beside = -sum(unit.tap for unit in units[: max(start - 1, 0)] if not unit.is_read)
        read = [units[i].output for i in range(start, len(units)) if _gets_gradient(step, i)]
        sent = sum(read[:-1]) if step.in_chunks else 0  # head.peak includes the last output's gradient
    else:
        beside, sent = _stage_input(units, start, end), 0
    yield 'head', alive[-1] + beside + sent, head.peak, 0
    gradients, held = head.gradient, _held(step, mode, start, end, is_last)
    for i in range(end, max(start, step.first) - 1, -1):
        of_others = sum(size for j, size in held.items() if (j < i if is_last else j > i))
        backward = max(units[i].backward, units[i].backward_held if i in held and not is_last else 0)
        yield 'backward', alive[i - start + 1] + beside + of_others, backward, gradients
        gradients += units[i].gradient
    if step.is_immediate and not is_last:
        yield 'optimizer step', alive[0] + beside + sum(held.values()), step.update, gradients


def _stage_input(units: Sequence[UnitCost], start: int, i: int) -> int:
    """Bytes of the input of unit i's stage, if it is from an earlier block and only the backbone's forward pass holds it."""
    held = units[i].holds
    return units[held].output if 0 <= held < start - 1 and not units[held].tap else 0


def _gets_gradient(step: StepCost, i: int) -> bool:
    """Whether the task loss computes a gradient of unit i's output: a backbone output that it reads and that isn't frozen."""
    return step.units[i].tap > 0 and step.units[i].is_read and i >= step.first


def _held(step: StepCost, mode: RecomputeMode, start: int, end: int, is_last: bool) -> dict[int, int]:
    """Bytes that stay alive outside the autograd graph until a block has run backward, by index of the unit that made them.

    In the last block these are the gradients of backbone outputs, which the task loss has already computed. In other blocks
    these are tensors that the suspended forward pass holds: outputs for the neck, the block's output, and the inputs of its
    last unit and last stage.
    """
    units, block = step.units_of(mode), range(start, end + 1)
    if is_last:
        return {i: units[i].output for i in block if _gets_gradient(step, i)}
    others = (end - 1, end, units[end].holds)
    return {i: units[i].tap if i < end and units[i].tap else units[i].output for i in block if units[i].tap or i in others}
