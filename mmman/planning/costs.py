"""The peak memory of one training step from the costs of its parts.

Pure arithmetic on numbers; :mod:`mmman.planning.profile` takes them from a model, :mod:`mmman.planning.search` finds the cuts
that make the peak smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Again(IntEnum):
    """What of a block's units is computed a second time in the backward pass."""

    NOTHING = 0
    SELECTED = 1
    ALL = 2


@dataclass(frozen=True)
class UnitCost:
    """What a unit needs on one batch, in bytes.

    Attributes:
        kept: What its forward pass leaves for the backward pass, its output included; its parameters and its input not.
        forward: The most that are alive while it runs forward, above what was alive before.
        backward: The most while it runs backward, the gradient of its output included and its parameters' included, above
            what was alive after its forward pass.
        output: Its output.
        tap: What stays alive of an output of a non-final block until the task loss's backward; 0 where it is no output.
        gradient: Gradients of its parameters.
        flops: Of its forward and backward pass.
        holds: Index of the unit whose output the backbone's forward pass holds while this one runs, below 0 for none: what
            its stage was called with.
        is_read: Of an output, whether neck, head or loss read it. One that they don't is gone when they run.
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


@dataclass(frozen=True)
class HeadCost:
    """What a local head, or neck, head and loss of the task, needs on one batch, in bytes.

    Attributes:
        static: Parameters, buffers and optimizer state. The task's are in :attr:`StepCost.base`.
        peak: The most that are alive while it runs forward and backward, above what was alive before.
        gradient: Gradients of its parameters.
        flops: Of its forward and backward pass.
    """

    static: int
    peak: int
    gradient: int
    flops: int = 0


@dataclass(frozen=True)
class StepCost:
    """All parts of a training step.

    Attributes:
        base: Bytes that are always alive: parameters, buffers and optimizer state without local heads, and the batch.
        units: The units of the backbone.
        task: Neck, head and loss.
        head: The cost of the local head after a unit, given its index, the smallest stride among the cuts that is larger than
            its own (None if there is none), whether no cut has a smaller one, and what the next block, whose first unit it
            copies, computes again. Heads of detectors depend on the strides.
        strides: For every unit, the stride that a local head after it sees; not descending.
        flops: Of end-to-end training that computes nothing twice: what overheads are relative to.
        again: Where each block has the choice, the units with :attr:`Again.SELECTED` and with :attr:`Again.ALL`.
        first: The first unit with a trainable parameter.
        update: Bytes that the optimizer's step needs above parameters, state and gradients.
        is_immediate: Whether a block steps, and drops its gradients, before the next one starts.
        in_chunks: Whether neck, head and loss run on a few images at a time: the gradients of all outputs that get one are then
            there while they run.
    """

    base: int
    units: tuple[UnitCost, ...]
    task: HeadCost
    head: Callable[[int, int | None, bool, Again], HeadCost]
    strides: tuple[int, ...]
    flops: int
    again: tuple[tuple[UnitCost, ...], tuple[UnitCost, ...]] | tuple[()] = ()
    first: int = 0
    update: int = 0
    is_immediate: bool = False
    in_chunks: bool = False

    @property
    def candidates(self) -> range:
        """Indices of the units to cut after: none is frozen, and the last block makes an output."""
        return range(self.first, max(i for i, unit in enumerate(self.units) if unit.tap))

    @property
    def choices(self) -> tuple[Again, ...]:
        """What a block may compute again."""
        return tuple(Again)[: len(self.again) + 1]

    def units_of(self, again: Again) -> tuple[UnitCost, ...]:
        """The units where so much of them is computed again."""
        return (self.units, *self.again)[again]

    def heads(self, plan: MemoryPlan) -> list[HeadCost]:
        """The local heads of a plan."""
        strides = [self.strides[cut] for cut in plan.cuts]
        larger = [min((s for s in strides if s > own), default=None) for own in strides]
        smallest = [s == min(strides) for s in strides]
        return [self.head(*at) for at in zip(plan.cuts, larger, smallest, plan.again[1:], strict=True)]

    def overhead(self, plan: MemoryPlan) -> float:
        """How many more FLOPs there are than in end-to-end training that computes nothing twice, relative to those."""
        units = sum(unit.flops for start, end, again in self.blocks(plan) for unit in self.units_of(again)[start : end + 1])
        return self.overhead_with(units + sum(head.flops for head in self.heads(plan)))

    def overhead_with(self, flops: int) -> float:
        """The overhead where units and local heads have so many FLOPs."""
        return (self.task.flops + flops) / self.flops - 1

    def blocks(self, plan: MemoryPlan) -> Iterator[tuple[int, int, Again]]:
        """First unit, last unit, and what is computed again, of every block."""
        return zip([0, *(cut + 1 for cut in plan.cuts)], [*plan.cuts, len(self.units) - 1], plan.again, strict=True)


@dataclass(frozen=True)
class MemoryPlan:
    """How a backbone is cut.

    Attributes:
        cuts: Indices of the last units of the first K-1 blocks, ascending.
        again: For every block what is computed again; by default nothing.
    """

    cuts: tuple[int, ...] = ()
    again: tuple[Again, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, 'again', self.again or (Again.NOTHING,) * (len(self.cuts) + 1))


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most bytes are alive.

    Attributes:
        total: Bytes.
        moment: What runs, e.g. ``local head 2``.
        parts: What the bytes are; the sum is ``total``.
    """

    total: int
    moment: str
    parts: dict[str, int]


def peak_of(step: StepCost, plan: MemoryPlan) -> Peak:
    """The peak of a step of the model that is cut as planned; without cuts that of end-to-end training."""
    heads = [*step.heads(plan), step.task]
    static = {'without local heads': step.base, 'local heads': sum(head.static for head in heads[:-1])}
    gradients, found = 0, []
    for j, ((start, end, again), head) in enumerate(zip(step.blocks(plan), heads, strict=True), start=1):
        gradients = 0 if step.is_immediate else gradients
        for phase, activations, extra, own in moments(step, start, end, again, head, is_last=j == len(heads)):
            what = f'block {j}, {phase}' if phase != 'head' else f'local head {j}' if j < len(heads) else 'neck, head, loss'
            parts = {'gradients': gradients + own, 'activations and outputs': activations, 'transient': extra}
            found.append((what, parts))
        gradients += head.gradient + sum(unit.gradient for unit in step.units[start : end + 1])
    found.append(('optimizer step', {'gradients': gradients, 'activations and outputs': 0, 'transient': step.update}))
    moment, parts = max(found, key=lambda one: sum(one[1].values()))
    return Peak(sum(static.values()) + sum(parts.values()), moment, {**static, **parts})


def moments(
    step: StepCost, start: int, end: int, again: Again, head: HeadCost, is_last: bool
) -> Iterator[tuple[str, int, int, int]]:
    """The moments of a block's training: phase, bytes of activations, of transients, of its own gradients so far.

    A step of all blocks is none of them; nor is the last block's, after which nothing is left but gradients.
    """
    units = step.units_of(again)
    taps = sum(unit.tap for unit in units[:start])
    given = units[start - 1].output if start and not units[start - 1].tap else 0
    alive = [taps + given]
    for i in range(start, end + 1):
        yield 'forward', alive[-1] + _stage_input(units, start, i), units[i].forward, 0
        alive.append(alive[-1] + units[i].kept)
    if is_last:
        beside = -sum(unit.tap for unit in units[: max(start - 1, 0)] if not unit.is_read)
        read = [unit.output for unit in units[start:] if unit.tap and unit.is_read]
        sent = sum(read[:-1]) if step.in_chunks else 0  # head.peak has the last
    else:
        beside, sent = _stage_input(units, start, end), 0
    yield 'head', alive[-1] + beside + sent, head.peak, 0
    gradients, held = head.gradient, _held(units, start, end, is_last)
    for i in range(end, max(start, step.first) - 1, -1):
        of_others = sum(size for j, size in held.items() if (j < i if is_last else j > i))
        backward = max(units[i].backward, units[i].backward_held if i in held and not is_last else 0)
        yield 'backward', alive[i - start + 1] + beside + of_others, backward, gradients
        gradients += units[i].gradient
    if step.is_immediate and not is_last:
        yield 'optimizer step', alive[0] + beside + sum(held.values()), step.update, gradients


def _stage_input(units: Sequence[UnitCost], start: int, i: int) -> int:
    """Bytes of what the forward pass holds while unit i of a block runs, if nothing else does: it is from an earlier block."""
    held = units[i].holds
    return units[held].output if 0 <= held < start - 1 and not units[held].tap else 0


def _held(units: Sequence[UnitCost], start: int, end: int, is_last: bool) -> dict[int, int]:
    """Bytes that stay alive beside the graph until a block has run backward, by the unit they are of.

    The last block: gradients of outputs that the task loss has sent to earlier units. Others: what the interrupted forward pass
    holds, which is outputs for the neck, the block's output, the input of its last unit and that of its last stage.
    """
    block = range(start, end + 1)
    if is_last:
        return {i: units[i].output for i in block if units[i].tap and units[i].is_read}
    others = (end - 1, end, units[end].holds)
    return {i: units[i].tap if i < end and units[i].tap else units[i].output for i in block if units[i].tap or i in others}
