"""Cuts by memory: the peak of one training step from the costs of its parts, and the cuts that make it smallest.

Pure arithmetic on numbers; :mod:`mmman.analysis.profile` takes the numbers from a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mmman.errors import CostError


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
            its own (None if there is none), and whether no cut has a smaller one. Heads of detectors depend on both.
        strides: For every unit, the stride that a local head after it sees; not descending.
        flops: Of end-to-end training that computes nothing twice: what overheads are relative to.
        first: The first unit with a trainable parameter.
        update: Bytes that the optimizer's step needs above parameters, state and gradients.
        is_immediate: Whether a block steps, and drops its gradients, before the next one starts.
        in_chunks: Whether neck, head and loss run on a few images at a time: the gradients of all outputs that get one are then
            there while they run.
    """

    base: int
    units: tuple[UnitCost, ...]
    task: HeadCost
    head: Callable[[int, int | None, bool], HeadCost]
    strides: tuple[int, ...]
    flops: int
    first: int = 0
    update: int = 0
    is_immediate: bool = False
    in_chunks: bool = False

    @property
    def candidates(self) -> range:
        """Indices of the units to cut after: none is frozen, and the last block makes an output."""
        return range(self.first, max(i for i, unit in enumerate(self.units) if unit.tap))

    def heads(self, cuts: Sequence[int]) -> list[HeadCost]:
        """The local heads after the units ``cuts``, ascending."""
        strides = [self.strides[cut] for cut in cuts]
        larger = [min((s for s in strides if s > own), default=None) for own in strides]
        return [self.head(cut, *at) for cut, *at in zip(cuts, larger, (s == min(strides) for s in strides), strict=True)]

    def overhead(self, cuts: Sequence[int]) -> float:
        """How many more FLOPs there are than in end-to-end training that computes nothing twice, relative to those."""
        return self.overhead_with(sum(head.flops for head in self.heads(cuts)))

    def overhead_with(self, flops: int) -> float:
        """The overhead where local heads have so many FLOPs."""
        return (sum(unit.flops for unit in self.units) + self.task.flops + flops) / self.flops - 1


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


def peak_of(step: StepCost, cuts: Sequence[int]) -> Peak:
    """The peak of a step of the model cut after the units ``cuts``; without cuts that of end-to-end training."""
    heads = [*step.heads(cuts), step.task]
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(step.units) - 1]
    static = {'without local heads': step.base, 'local heads': sum(head.static for head in heads[:-1])}
    gradients, found = 0, []
    for j, (start, end, head) in enumerate(zip(starts, ends, heads, strict=True), start=1):
        gradients = 0 if step.is_immediate else gradients
        for phase, activations, extra, own in _moments(step, start, end, head, is_last=j == len(heads)):
            what = f'block {j}, {phase}' if phase != 'head' else f'local head {j}' if j < len(heads) else 'neck, head, loss'
            parts = {'gradients': gradients + own, 'activations and outputs': activations, 'transient': extra}
            found.append((what, parts))
        gradients += head.gradient + sum(unit.gradient for unit in step.units[start : end + 1])
    found.append(('optimizer step', {'gradients': gradients, 'activations and outputs': 0, 'transient': step.update}))
    moment, parts = max(found, key=lambda one: sum(one[1].values()))
    return Peak(sum(static.values()) + sum(parts.values()), moment, {**static, **parts})


def _moments(step: StepCost, start: int, end: int, head: HeadCost, is_last: bool) -> Iterator[tuple[str, int, int, int]]:
    """The moments of a block's training: phase, bytes of activations, of transients, of its own gradients so far.

    A step of all blocks is none of them; nor is the last block's, after which nothing is left but gradients.
    """
    units = step.units
    taps = sum(unit.tap for unit in units[:start])
    given = units[start - 1].output if start and not units[start - 1].tap else 0
    alive = [taps + given]
    for i in range(start, end + 1):
        yield 'forward', alive[-1] + _stage_input(units, start, i), units[i].forward, 0
        alive.append(alive[-1] + units[i].kept)
    if is_last:
        beside = -sum(unit.tap for unit in units[: max(start - 1, 0)] if not unit.is_read)
        sent = sum([unit.output for unit in units[start:] if unit.tap][:-1]) if step.in_chunks else 0  # head.peak has the last
    else:
        beside, sent = _stage_input(units, start, end), 0
    yield 'head', alive[-1] + beside + sent, head.peak, 0
    gradients = head.gradient
    for i in range(end, max(start, step.first) - 1, -1):
        held = beside + _held(units, start, i, end, is_last)
        yield 'backward', alive[i - start + 1] + held, units[i].backward, gradients
        gradients += units[i].gradient
    if step.is_immediate and not is_last:
        yield 'optimizer step', alive[0] + beside + _held(units, start, start - 1, end, is_last), step.update, gradients


def _stage_input(units: Sequence[UnitCost], start: int, i: int) -> int:
    """Bytes of what the forward pass holds while unit i of a block runs, if nothing else does: it is from an earlier block."""
    held = units[i].holds
    return units[held].output if 0 <= held < start - 1 and not units[held].tap else 0


def _held(units: Sequence[UnitCost], start: int, i: int, end: int, is_last: bool) -> int:
    """Bytes beside the graph while unit i of a block runs backward.

    The last block: gradients of outputs that the task loss has sent to earlier units. Others: what the interrupted forward pass
    holds, which is outputs for the neck, the block's output and the input of its last unit.
    """
    if is_last:
        return sum(unit.output for unit in units[start:i] if unit.tap)
    taps = sum(unit.tap for unit in units[i + 1 : end])
    given = units[end - 1].output if i < end - 1 and not units[end - 1].tap else 0
    return taps + given + (units[end].output if i < end else 0)


@dataclass(frozen=True)
class _Suffix:
    """Blocks at the end of the network.

    ``peak`` leaves out all that is static, and the gradients of local heads in front.
    """

    static: int
    peak: int
    flops: int
    cuts: tuple[int, ...] = ()

    def key(self, with_flops: bool) -> tuple[int, ...]:
        return (self.static, self.peak, self.flops) if with_flops else (self.static, self.peak)


def smallest_peak(step: StepCost, blocks: int | None = None, overhead: float | None = None) -> tuple[int, ...]:
    """The cuts with the smallest peak; among equal peaks those with the fewest FLOPs.

    Args:
        step: The costs.
        blocks: K; default: any.
        overhead: :meth:`StepCost.overhead` at most.

    Raises:
        CostError: K is not between 1 and the number of candidates and one, or no cuts are within the overhead.
    """
    most = len(step.candidates) + 1
    if blocks is not None and not 1 <= blocks <= most:
        raise CostError(f'{blocks} blocks: choose from 1 to {most}, one more than the units there are to cut after')
    plans = _plans(step, blocks, None, overhead)
    if not plans:
        asked = 'cuts' if blocks is None else f'cuts into {blocks} blocks'
        raise CostError(
            f'no {asked} cost at most {overhead:.1%} more FLOPs: raise the overhead, ask for fewer blocks, or recompute less'
        )
    return min(plans, key=lambda plan: (plan.static + plan.peak, plan.flops, plan.cuts)).cuts


def fewest_flops(step: StepCost, target: int) -> tuple[int, ...]:
    """The cuts with the fewest FLOPs whose peak is at most ``target`` bytes; among equal ones the smallest peak.

    Raises:
        CostError: No cuts reach it.
    """
    plans = _plans(step, None, target, None)
    if not plans:
        reachable = peak_of(step, smallest_peak(step)).total
        raise CostError(
            f'no cuts reach {target / 1e6:.1f} MB: the smallest peak is {reachable / 1e6:.1f} MB; '
            'use fewer or smaller images, or a leaner local head'
        )
    return min(plans, key=lambda plan: (plan.flops, plan.static + plan.peak, plan.cuts)).cuts


def _plans(step: StepCost, blocks: int | None, target: int | None, overhead: float | None) -> list[_Suffix]:
    """All plans that no other one beats in static bytes, peak and, where they are limited, FLOPs.

    Blocks are put in front of each other from the last to the first. So a block's own peak is known when it is put in front,
    the gradients of its head only raise the peak of what follows (if they stay that long), and of two plans for the same
    units one that is not better in anything is dropped. What is smallest among the strides of the cuts is assumed, each
    possible value in turn.
    """
    with_flops = target is not None or overhead is not None
    spans = _Spans(step)

    def fits(plan: _Suffix) -> bool:
        is_small = target is None or step.base + plan.static + plan.peak <= target
        return is_small and (overhead is None or step.overhead_with(plan.flops) <= overhead)

    whole = _Suffix(0, spans.last(0), 0)
    found = [whole] if blocks in (None, 1) and fits(whole) else []
    for smallest in {step.strides[cut] for cut in step.candidates}:
        cuts = [cut for cut in step.candidates if step.strides[cut] >= smallest]
        starts = [0, *(cut + 1 for cut in cuts)]
        # by first unit; then by number of blocks (where asked for), stride of the first cut, and the next larger stride
        suffixes: dict[int, dict[tuple, list[_Suffix]]] = {start: {} for start in starts}
        for start in starts[1:]:
            suffixes[start][(1, None, None)] = [_Suffix(0, spans.last(start), 0)]
        for cut in reversed(cuts):
            stride = step.strides[cut]
            for (count, nearest, larger), plans in suffixes[cut + 1].items():
                if blocks is not None and count == blocks:
                    continue
                following = larger if nearest == stride else nearest
                head = step.head(cut, following, stride == smallest)
                state = (count + 1 if blocks is not None else 1, stride, following)
                for plan in _undominated(plans, with_flops):
                    static, flops = plan.static + head.static, plan.flops + head.flops
                    behind = plan.peak + (0 if step.is_immediate else head.gradient)
                    for start in starts:
                        if start > cut:
                            break
                        peak = max(behind, spans.local(start, cut, head))
                        new = _Suffix(static, peak, flops, (cut, *plan.cuts))
                        if fits(new):
                            suffixes[start].setdefault(state, []).append(new)
        for (count, nearest, _), plans in suffixes[0].items():
            if nearest == smallest and blocks in (None, count):
                found += plans
    return found


class _Spans:
    """Peaks of single blocks, without what is static and without the gradients of local heads in front."""

    def __init__(self, step: StepCost) -> None:
        self.step = step
        self._known: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._made = [0, *accumulate(unit.gradient for unit in step.units)]

    def local(self, start: int, end: int, head: HeadCost) -> int:
        """Of a block with a local head."""
        if (start, end) not in self._known:
            peaks = {'forward': 0, 'head': 0, 'afterwards': 0}
            for phase, *sizes in _moments(self.step, start, end, HeadCost(0, 0, 0), is_last=False):
                phase = phase if phase in peaks else 'afterwards'
                peaks[phase] = max(peaks[phase], sum(sizes))
            self._known[start, end] = tuple(peaks.values())
        forward, at_head, afterwards = self._known[start, end]
        return self._before(start) + max(forward, at_head + head.peak, afterwards + head.gradient)

    def last(self, start: int) -> int:
        """Of the last block with the task's head; and of the optimizer's step, if that is more."""
        step = self.step
        moments = _moments(step, start, len(step.units) - 1, step.task, is_last=True)
        peak, before = max(sum(sizes) for _, *sizes in moments), self._before(start)
        return before + max(peak, self._made[-1] - self._made[start] + step.task.gradient + step.update)

    def _before(self, start: int) -> int:
        """Gradients of the units in front."""
        return 0 if self.step.is_immediate else self._made[start]


def _undominated(plans: list[_Suffix], with_flops: bool) -> list[_Suffix]:
    """The plans of which none is as good or better in everything, in ascending order."""
    kept: list[tuple[int, ...]] = []
    front = []
    for plan in sorted(plans, key=lambda plan: (plan.key(with_flops), plan.flops)):
        key = plan.key(with_flops)
        if not any(all(a <= b for a, b in zip(other, key, strict=True)) for other in reversed(kept)):
            kept.append(key)
            front.append(plan)
    return front
