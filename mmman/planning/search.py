"""Find the plan with the smallest peak, or the fewest FLOPs, by exact search."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product

from mmman.errors import CostError
from mmman.planning.costs import HeadCost, MemoryPlan, RecomputeMode, StepCost, moments, peak_of


@dataclass(frozen=True)
class _Suffix:
    """A partial plan: the blocks at the end of the network.

    ``peak`` excludes static bytes and the gradients of earlier local heads. ``flops`` excludes those of the task.
    """

    static: int
    peak: int
    flops: int
    plan: MemoryPlan

    def key(self, with_flops: bool) -> tuple[int, ...]:
        return (self.static, self.peak, self.flops) if with_flops else (self.static, self.peak)


def smallest_peak(step: StepCost, blocks: int | None = None, overhead: float | None = None) -> MemoryPlan:
    """Find the plan with the smallest peak. Ties go to the plan with the fewest FLOPs.

    Args:
        step: Costs of the training step.
        blocks: Number of blocks K. Default: any.
        overhead: Upper limit of :meth:`StepCost.overhead`. Default: no limit.

    Raises:
        CostError: K is below 1 or above the number of candidates plus one, or every plan exceeds the overhead.
    """
    _check_blocks(step, blocks)
    found = _undominated_plans(step, blocks, None, overhead)
    if not found:
        asked = 'plan' if blocks is None else f'plan with {blocks} blocks'
        raise CostError(f'no {asked} stays within the limit of {step.work}: raise it, or ask for fewer blocks')
    return min(found, key=lambda one: (one.static + one.peak, one.flops, one.plan.cuts)).plan


def fewest_flops(step: StepCost, target: int, blocks: int | None = None) -> MemoryPlan:
    """Find the plan with the fewest FLOPs whose peak is at most ``target``. Ties go to the plan with the smallest peak.

    Args:
        step: Costs of the training step.
        target: Largest peak allowed, bytes.
        blocks: Number of blocks K. Default: any.

    Raises:
        CostError: K is below 1 or above the number of candidates plus one, or the peak of every plan exceeds ``target``.
    """
    _check_blocks(step, blocks)
    found = _undominated_plans(step, blocks, target, None)
    if not found:
        reachable = peak_of(step, smallest_peak(step, blocks)).total
        raise CostError(
            f'no plan fits in {target / 1e6:.1f} MB: the smallest peak is {reachable / 1e6:.1f} MB; '
            'use fewer or smaller images, or a leaner local head'
        )
    return min(found, key=lambda one: (one.flops, one.static + one.peak, one.plan.cuts)).plan


def _check_blocks(step: StepCost, blocks: int | None) -> None:
    most = len(step.candidates) + 1
    if blocks is not None and not 1 <= blocks <= most:
        raise CostError(f'{blocks} blocks: choose from 1 to {most}, the number of possible cuts plus one')


def _undominated_plans(step: StepCost, blocks: int | None, target: int | None, overhead: float | None) -> list[_Suffix]:
    """Find the Pareto-optimal plans in static bytes, peak and, if it matters, FLOPs, by dynamic programming.

    The search prepends blocks from the last to the first. A prepended block's own peak depends only on its units, its head and
    its mode. The gradients of its head raise the peak of all later blocks, unless updates are immediate. So of two partial
    plans for the same units and the same state, one that is better in nothing can be dropped. The smallest stride among the
    cuts is part of the problem: each possible value is tried in turn.
    """
    choices = step.choices
    with_flops = len(choices) > 1 or target is not None or overhead is not None
    spans = _Spans(step)

    def fits(one: _Suffix) -> bool:
        is_small = target is None or step.base + one.static + one.peak <= target
        return is_small and (overhead is None or step.overhead_with(one.flops) <= overhead)

    ends = {start: [spans.end(start, mode) for mode in choices] for start in (0, *(cut + 1 for cut in step.candidates))}
    found = [whole for whole in ends[0] if fits(whole)] if blocks in (None, 1) else []
    for smallest in {step.strides[cut] for cut in step.candidates}:
        cuts = [cut for cut in step.candidates if step.strides[cut] >= smallest]
        starts = [0, *(cut + 1 for cut in cuts)]
        # Keys: first unit; then number of blocks (if K is given), stride of the first cut, next larger stride among the cuts,
        # recompute mode of the first block.
        suffixes: dict[int, dict[tuple, list[_Suffix]]] = {start: {} for start in starts}
        for start in starts[1:]:
            suffixes[start] = {(1, None, None, end.plan.modes[0]): [end] for end in ends[start]}
        for cut in reversed(cuts):
            stride = step.strides[cut]
            for (count, nearest, larger, copied), others in suffixes[cut + 1].items():
                if blocks is not None and count == blocks:
                    continue
                following = larger if nearest == stride else nearest
                head = step.head(cut, following, stride == smallest, copied)
                front = _undominated(others, with_flops)
                for mode, start in product(choices, (start for start in starts if start <= cut)):
                    state = (count + 1 if blocks is not None else 1, stride, following, mode)
                    for behind in front:
                        new = spans.in_front(start, cut, mode, head, behind)
                        if fits(new):
                            suffixes[start].setdefault(state, []).append(new)
        for (count, nearest, *_), plans in suffixes[0].items():
            if nearest == smallest and blocks in (None, count):
                found += plans
    return found


class _Spans:
    """Peaks of single blocks, excluding static bytes and the gradients of earlier local heads."""

    def __init__(self, step: StepCost) -> None:
        self.step = step
        self._known: dict[tuple[int, int, RecomputeMode], tuple[int, int, int]] = {}
        self._made = [0, *accumulate(unit.gradient for unit in step.units)]
        self._flops = {mode: [0, *accumulate(unit.flops for unit in step.units_of(mode))] for mode in step.choices}

    def in_front(self, start: int, end: int, mode: RecomputeMode, head: HeadCost, behind: _Suffix) -> _Suffix:
        """Prepend a block with a local head to a partial plan."""
        gradients = 0 if self.step.is_immediate else head.gradient
        return _Suffix(
            head.static + behind.static,
            max(behind.peak + gradients, self._local(start, end, mode, head)),
            self._flops_of(start, end, mode) + head.flops + behind.flops,
            MemoryPlan((end, *behind.plan.cuts), (mode, *behind.plan.modes)),
        )

    def end(self, start: int, mode: RecomputeMode) -> _Suffix:
        """The partial plan of the last block alone. Its peak includes the task's head and the optimizer step."""
        step, end = self.step, len(self.step.units) - 1
        peak = max(sum(sizes) for _, *sizes in moments(step, start, end, mode, step.task, is_last=True))
        gradients = self._made[-1] - self._made[start] + step.task.gradient
        peak = self._before(start) + max(peak, gradients + step.update)
        return _Suffix(0, peak, self._flops_of(start, end, mode), MemoryPlan((), (mode,)))

    def _local(self, start: int, end: int, mode: RecomputeMode, head: HeadCost) -> int:
        """Peak of a block with a local head."""
        if (start, end, mode) not in self._known:
            peaks = {'forward': 0, 'head': 0, 'afterwards': 0}
            for phase, *sizes in moments(self.step, start, end, mode, HeadCost(0, 0, 0), is_last=False):
                phase = phase if phase in peaks else 'afterwards'
                peaks[phase] = max(peaks[phase], sum(sizes))
            self._known[start, end, mode] = tuple(peaks.values())
        forward, at_head, afterwards = self._known[start, end, mode]
        return self._before(start) + max(forward, at_head + head.peak, afterwards + head.gradient)

    def _flops_of(self, start: int, end: int, mode: RecomputeMode) -> int:
        return self._flops[mode][end + 1] - self._flops[mode][start]

    def _before(self, start: int) -> int:
        """Bytes of the gradients of earlier units."""
        return 0 if self.step.is_immediate else self._made[start]


def _undominated(plans: list[_Suffix], with_flops: bool) -> list[_Suffix]:
    """The Pareto-optimal partial plans, in ascending order; of equal ones the first."""
    kept: list[tuple[int, ...]] = []
    front = []
    for plan in sorted(plans, key=lambda plan: (plan.key(with_flops), plan.flops)):
        key = plan.key(with_flops)
        if not any(all(a <= b for a, b in zip(other, key, strict=True)) for other in reversed(kept)):
            kept.append(key)
            front.append(plan)
    return front
