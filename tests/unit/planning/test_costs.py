"""The planner by memory against brute force over all cuts."""

import random
from dataclasses import replace
from itertools import combinations, product

import pytest

from mmman.errors import CostError
from mmman.planning.costs import HeadCost, MemoryPlan, StepCost, UnitCost, peak_of
from mmman.planning.search import fewest_flops, smallest_peak


def random_step(seed: int) -> StepCost:
    """Up to eight units of random costs, with two to four strides, and heads that depend on the other cuts' strides.

    The bits of the seed switch immediate updates, chunks of the task, and a choice of recompute modes.
    """
    draw = random.Random(seed)
    count = draw.randint(3, 5 if seed & 4 else 8)

    def size(most: int = 30) -> int:
        return draw.randint(0, most)

    taps = {count - 1 - draw.randint(0, 1), *(i for i in range(count) if draw.random() < 0.3)}
    units = tuple(
        UnitCost(
            *(size(), size(), size(), 1 + size(9), (1 + size(9)) * (i in taps), size(), size()),
            holds=draw.randint(-1, i - 1),
            is_read=draw.random() < 0.7,
            backward_held=size(40),
        )
        for i in range(count)
    )
    strides = tuple(sorted(2 ** draw.randint(2, 4) for _ in range(count)))
    costs: dict[tuple, HeadCost] = {}

    def head(*at: int | bool | None) -> HeadCost:
        return costs.setdefault(at, HeadCost(size(40), size(40), size(40), 1 + size()))

    first = draw.randint(0, 1)
    task, modes = HeadCost(0, size(60), size(20), 50), {'is_immediate': bool(seed & 1), 'in_chunks': bool(seed & 2)}
    flops = sum(unit.flops for unit in units) + 50 - size(20)
    if seed & 4:
        full = tuple(replace(unit, kept=unit.output, backward=unit.backward + size(), flops=unit.flops + 10) for unit in units)
        half = tuple(replace(unit, kept=(unit.kept + unit.output) // 2, flops=unit.flops + 3) for unit in units)
        modes['recomputed'] = (half, full)
    return StepCost(size(50), units, task, head, strides, flops, first=first, update=size(), **modes)


def all_plans(step: StepCost) -> list[MemoryPlan]:
    cuts = [cuts for k in range(len(step.candidates) + 1) for cuts in combinations(step.candidates, k)]
    return [MemoryPlan(some, modes) for some in cuts for modes in product(step.choices, repeat=len(some) + 1)]


@pytest.mark.parametrize('seed', range(60))
def test_smallest_peak_is_that_of_brute_force(seed):
    step = random_step(seed)
    peaks = {plan: peak_of(step, plan).total for plan in all_plans(step)}
    overheads = {plan: step.overhead(plan) for plan in peaks}
    for blocks in range(1, len(step.candidates) + 2):
        found = smallest_peak(step, blocks)
        assert len(found.cuts) == blocks - 1
        peak = min(peak for plan, peak in peaks.items() if len(plan.cuts) == blocks - 1)
        assert peaks[found] == peak
        if step.recomputed:  # recompute no more than necessary
            alike = [overheads[plan] for plan in peaks if len(plan.cuts) == blocks - 1 and peaks[plan] == peak]
            assert overheads[found] == min(alike)
    assert peaks[smallest_peak(step)] == min(peaks.values())


@pytest.mark.parametrize('seed', range(60))
def test_limits_on_flops_and_memory_are_those_of_brute_force(seed):
    step = random_step(seed)
    overheads = {plan: step.overhead(plan) for plan in all_plans(step)}
    peaks = {plan: peak_of(step, plan).total for plan in overheads}
    for limit in (step.overhead(MemoryPlan()), 0.5, 0.8):
        found = smallest_peak(step, overhead=limit)
        assert overheads[found] <= limit
        assert peaks[found] == min(peaks[plan] for plan in peaks if overheads[plan] <= limit)
    for target in (min(peaks.values()), sorted(peaks.values())[len(peaks) // 3]):
        found = fewest_flops(step, target)
        assert peaks[found] <= target
        assert overheads[found] == min(overheads[plan] for plan in peaks if peaks[plan] <= target)
        blocks = len(found.cuts) + 1
        alike = [plan for plan in peaks if peaks[plan] <= target and len(plan.cuts) + 1 == blocks]
        assert overheads[fewest_flops(step, target, blocks)] == min(overheads[plan] for plan in alike)


def test_peak_counted_by_hand():
    """Two units of which the first is an output, cut between them."""
    units = (UnitCost(100, 30, 50, 20, tap=20, gradient=7), UnitCost(60, 10, 200, 5, tap=5, gradient=3))
    step = StepCost(1000, units, HeadCost(0, 40, 4), lambda *_: HeadCost(500, 90, 6), (4, 8), 0, update=2)
    # block 2 runs backward: all gradients so far, the output of block 1, what it kept, its transient
    assert peak_of(step, MemoryPlan((0,))).total == 1500 + (7 + 6 + 4) + (20 + 60) + 200
    assert peak_of(step, MemoryPlan((0,))).moment == 'block 2, backward'
    # end to end the gradient of the output of unit 1 waits meanwhile
    assert peak_of(step, MemoryPlan()).total == 1000 + 4 + (100 + 60) + 20 + 200
    # but where nothing reads that output, which gets none
    unread = replace(step, units=(replace(units[0], is_read=False), units[1]))
    assert peak_of(unread, MemoryPlan()).total == 1000 + 4 + (100 + 60) + 200
    parts = peak_of(step, MemoryPlan((0,))).parts
    assert parts['local heads'] == 500 and sum(parts.values()) == peak_of(step, MemoryPlan((0,))).total


def test_what_the_forward_pass_holds_is_counted_by_hand():
    """Four units, an output of the first that nothing reads; the third block starts in the stage that the second unit began."""
    units = (
        UnitCost(1, 0, 0, output=100, tap=100, is_read=False),
        UnitCost(2, 0, 0, output=20, holds=0),
        UnitCost(4, 0, 0, output=40, holds=0),
        UnitCost(8, 0, 0, output=80, tap=80, holds=1),
    )
    step = StepCost(0, units, HeadCost(0, 1000, 0), lambda *_: HeadCost(0, 5, 0), (1,) * 4, 0)
    peak = peak_of(step, MemoryPlan((0, 1, 2)))
    # the unread output is gone; what the second unit handed on is held no more, the third's output is what came in
    assert (peak.moment, peak.total) == ('neck, head, loss', 40 + 8 + 1000)
    units = (replace(units[0], tap=0), *units[1:])
    step = StepCost(0, units, HeadCost(0, 0, 0), lambda *_: HeadCost(0, 1000, 0), (1,) * 4, 0)
    assert (
        peak_of(step, MemoryPlan((1, 2))).total == 100 + 20 + 4 + 1000
    )  # of block 2, which was called with the first unit's output


def test_held_outputs_are_counted_by_hand():
    """A block of five units, of which the first is an output and the last three are a stage, in front of another one."""
    units = [UnitCost(1, 0, 0, output=10 ** (i + 1), tap=10 * (i == 0), holds=1 if i > 1 else -1) for i in range(5)]
    units.append(UnitCost(1, 0, 0, output=1, tap=1))

    def peak_with(i: int) -> int:
        changed = tuple(replace(u, backward=10**7, backward_held=2 * 10**7) if j == i else u for j, u in enumerate(units))
        step = StepCost(0, changed, HeadCost(0, 0, 0), lambda *_: HeadCost(0, 0, 0), (1,) * 6, 0)
        return peak_of(step, MemoryPlan((4,))).total

    assert peak_with(4) == 5 + 2 * 10**7  # the block's output
    assert peak_with(3) == 4 + 10**5 + 2 * 10**7  # the last unit's input
    assert peak_with(2) == 3 + 10**5 + 10**4 + 10**7
    assert peak_with(1) == 2 + 10**5 + 10**4 + 2 * 10**7  # the stage's input
    assert peak_with(0) == 1 + 10**5 + 10**4 + 100 + 2 * 10**7  # an output for the neck


def test_immediate_updates_and_chunks_are_counted_by_hand():
    """Three units, all of them outputs, cut after the first."""
    units = tuple(UnitCost(100, 0, 50, output, tap=output, gradient=gradient) for output, gradient in ((20, 7), (5, 9), (3, 3)))
    step = StepCost(0, units, HeadCost(0, 0, 4), lambda *_: HeadCost(0, 0, 6), (1,) * 3, 300, is_immediate=True)
    # the last unit runs backward without gradients of block 1, while one waits at the second output
    assert peak_of(step, MemoryPlan((0,))).total == 4 + (20 + 200) + 5 + 50
    assert peak_of(replace(step, is_immediate=False), MemoryPlan((0,))).total == 7 + 6 + 4 + (20 + 200) + 5 + 50
    # block 1 steps: its gradients and its head's, and its output; the last block steps with nothing but gradients
    assert peak_of(replace(step, update=1000), MemoryPlan((0,))).total == 7 + 6 + 20 + 1000
    assert peak_of(replace(step, update=1000), MemoryPlan((0,))).moment == 'block 1, optimizer step'
    assert peak_of(replace(step, update=1000), MemoryPlan()).total == 7 + 9 + 3 + 4 + 1000
    # neck, head and loss in chunks: the gradient of the second output is there when the last one's is
    task = HeadCost(0, 500, 4)
    assert peak_of(replace(step, task=task), MemoryPlan((0,))).total == 20 + 200 + 500
    assert peak_of(replace(step, task=task, in_chunks=True), MemoryPlan((0,))).total == 20 + 200 + 5 + 500
    assert peak_of(replace(step, task=task, in_chunks=True), MemoryPlan()).total == 300 + (20 + 5) + 500


def test_overhead_is_relative_to_training_without_recompute():
    units = (UnitCost(1, 1, 1, 1, tap=1, flops=40), UnitCost(1, 1, 1, 1, tap=1, flops=40))
    step = StepCost(0, units, HeadCost(0, 0, 0, 20), lambda *_: HeadCost(0, 0, 0, 10), (1, 1), flops=80)
    assert step.overhead(MemoryPlan()) == pytest.approx(20 / 80)
    assert step.overhead(MemoryPlan((0,))) == pytest.approx(30 / 80)


def test_many_units_are_planned_in_seconds():
    """55 units into 32 blocks, as a CIFAR ResNet-110."""
    units = tuple(UnitCost(100 // (1 + i // 18), 9, 50 // (1 + i // 18), 8, int(i > 50), 1 + i // 18, 10) for i in range(55))
    heads = [HeadCost(3 + i // 18, 40 - i // 18, 2 + i // 18, 5 + i // 18) for i in range(55)]
    step = StepCost(1000, units, HeadCost(0, 20, 3, 10), lambda cut, *_: heads[cut], (1,) * 55, 560)
    assert len(smallest_peak(step, 32).cuts) == 31
    best = peak_of(step, smallest_peak(step)).total
    assert peak_of(step, fewest_flops(step, best)).total == best


def test_what_can_not_be_reached_is_said():
    step = random_step(0)
    with pytest.raises(CostError, match=r'smallest peak is'):
        fewest_flops(step, 1)
    with pytest.raises(CostError, match='choose from 1 to'):
        smallest_peak(step, 99)
    with pytest.raises(CostError, match='choose from 1 to'):
        fewest_flops(step, 10**9, blocks=99)
    with pytest.raises(CostError, match='raise the overhead'):
        smallest_peak(step, len(step.candidates) + 1, overhead=step.overhead(MemoryPlan()))
