"""The cuts that make the peak of a training step smallest, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product

from mmman.errors import CostError
from mmman.planning.costs import Again, HeadCost, MemoryPlan, StepCost, moments, peak_of


@dataclass(frozen=True)
class _Suffix:
    """Blocks at the end of the network.

    ``peak`` leaves out all that is static, and the gradients of local heads in front; ``flops`` the task's.
    """

    static: int
    peak: int
    flops: int
    plan: MemoryPlan

    def key(self, with_flops: bool) -> tuple[int, ...]:
        return (self.static, self.peak, self.flops) if with_flops else (self.static, self.peak)


def smallest_peak(step: StepCost, blocks: int | None = None, overhead: float | None = None) -> MemoryPlan:
    """The plan with the smallest peak; among equal peaks the one with the fewest FLOPs.

    Args:
        step: The costs.
        blocks: K; default: any.
        overhead: :meth:`StepCost.overhead` at most.

    Raises:
        CostError: K is not between 1 and the number of candidates and one, or no plan is within the overhead.
    """
    _check_blocks(step, blocks)
    found = _undominated_plans(step, blocks, None, overhead)
    if not found:
        asked = 'cuts' if blocks is None else f'cuts into {blocks} blocks'
        raise CostError(
            f'no {asked} cost at most {overhead:.1%} more FLOPs: raise the overhead, ask for fewer blocks, or recompute less'
        )
    return min(found, key=lambda one: (one.static + one.peak, one.flops, one.plan.cuts)).plan


def fewest_flops(step: StepCost, target: int, blocks: int | None = None) -> MemoryPlan:
    """The plan with the fewest FLOPs whose peak is at most ``target`` bytes; among equal ones the smallest peak.

    Args:
        step: The costs.
        target: Bytes.
        blocks: K; default: any.

    Raises:
        CostError: No plan reaches it, or K is not between 1 and the number of candidates and one.
    """
    _check_blocks(step, blocks)
    found = _undominated_plans(step, blocks, target, None)
    if not found:
        reachable = peak_of(step, smallest_peak(step, blocks)).total
        raise CostError(
            f'no cuts reach {target / 1e6:.1f} MB: the smallest peak is {reachable / 1e6:.1f} MB; '
            'use fewer or smaller images, or a leaner local head'
        )
    return min(found, key=lambda one: (one.flops, one.static + one.peak, one.plan.cuts)).plan


def _check_blocks(step: StepCost, blocks: int | None) -> None:
    most = len(step.candidates) + 1
    if blocks is not None and not 1 <= blocks <= most:
        raise CostError(f'{blocks} blocks: choose from 1 to {most}, one more than the units there are to cut after')


def _undominated_plans(step: StepCost, blocks: int | None, target: int | None, overhead: float | None) -> list[_Suffix]:
    """All plans that no other one beats in static bytes, peak and, where these count, FLOPs.

    Blocks are put in front of each other from the last to the first. So a block's own peak is known when it is put in front,
    the gradients of its head only raise the peak of what follows (if they stay that long), and of two plans for the same
    units one that is not better in anything is dropped. What is smallest among the strides of the cuts is assumed, each
    possible value in turn.
    """
    choices = step.choices
    with_flops = len(choices) > 1 or target is not None or overhead is not None
    spans = _Spans(step)

    def fits(one: _Suffix) -> bool:
        is_small = target is None or step.base + one.static + one.peak <= target
        return is_small and (overhead is None or step.overhead_with(one.flops) <= overhead)

    ends = {start: [spans.end(start, again) for again in choices] for start in (0, *(cut + 1 for cut in step.candidates))}
    found = [whole for whole in ends[0] if fits(whole)] if blocks in (None, 1) else []
    for smallest in {step.strides[cut] for cut in step.candidates}:
        cuts = [cut for cut in step.candidates if step.strides[cut] >= smallest]
        starts = [0, *(cut + 1 for cut in cuts)]
        # by first unit; then by number of blocks (where asked for), stride of the first cut, the next larger stride, and
        # what the first block computes again
        suffixes: dict[int, dict[tuple, list[_Suffix]]] = {start: {} for start in starts}
        for start in starts[1:]:
            suffixes[start] = {(1, None, None, end.plan.again[0]): [end] for end in ends[start]}
        for cut in reversed(cuts):
            stride = step.strides[cut]
            for (count, nearest, larger, copied), others in suffixes[cut + 1].items():
                if blocks is not None and count == blocks:
                    continue
                following = larger if nearest == stride else nearest
                head = step.head(cut, following, stride == smallest, copied)
                front = _undominated(others, with_flops)
                for again, start in product(choices, (start for start in starts if start <= cut)):
                    state = (count + 1 if blocks is not None else 1, stride, following, again)
                    for behind in front:
                        new = spans.in_front(start, cut, again, head, behind)
                        if fits(new):
                            suffixes[start].setdefault(state, []).append(new)
        for (count, nearest, *_), plans in suffixes[0].items():
            if nearest == smallest and blocks in (None, count):
                found += plans
    return found


class _Spans:
    """Peaks of single blocks, without what is static and without the gradients of local heads in front."""

    def __init__(self, step: StepCost) -> None:
        self.step = step
        self._known: dict[tuple[int, int, Again], tuple[int, int, int]] = {}
        self._made = [0, *accumulate(unit.gradient for unit in step.units)]
        self._flops = {again: [0, *accumulate(unit.flops for unit in step.units_of(again))] for again in step.choices}

    def in_front(self, start: int, end: int, again: Again, head: HeadCost, behind: _Suffix) -> _Suffix:
        """What a block with a local head becomes together with what follows it."""
        gradients = 0 if self.step.is_immediate else head.gradient
        return _Suffix(
            head.static + behind.static,
            max(behind.peak + gradients, self._local(start, end, again, head)),
            self._flops_of(start, end, again) + head.flops + behind.flops,
            MemoryPlan((end, *behind.plan.cuts), (again, *behind.plan.again)),
        )

    def end(self, start: int, again: Again) -> _Suffix:
        """The last block with the task's head; and the optimizer's step, if that is more."""
        step, end = self.step, len(self.step.units) - 1
        peak = max(sum(sizes) for _, *sizes in moments(step, start, end, again, step.task, is_last=True))
        gradients = self._made[-1] - self._made[start] + step.task.gradient
        peak = self._before(start) + max(peak, gradients + step.update)
        return _Suffix(0, peak, self._flops_of(start, end, again), MemoryPlan((), (again,)))

    def _local(self, start: int, end: int, again: Again, head: HeadCost) -> int:
        """The peak of a block with a local head."""
        if (start, end, again) not in self._known:
            peaks = {'forward': 0, 'head': 0, 'afterwards': 0}
            for phase, *sizes in moments(self.step, start, end, again, HeadCost(0, 0, 0), is_last=False):
                phase = phase if phase in peaks else 'afterwards'
                peaks[phase] = max(peaks[phase], sum(sizes))
            self._known[start, end, again] = tuple(peaks.values())
        forward, at_head, afterwards = self._known[start, end, again]
        return self._before(start) + max(forward, at_head + head.peak, afterwards + head.gradient)

    def _flops_of(self, start: int, end: int, again: Again) -> int:
        return self._flops[again][end + 1] - self._flops[again][start]

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
