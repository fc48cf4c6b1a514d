"""The search against brute force over all plans."""

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
def test_smallest_peak_matches_brute_force(seed):
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
def test_limits_on_flops_and_memory_match_brute_force(seed):
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


def test_many_units_are_planned_in_seconds():
    """55 units into 32 blocks, as a CIFAR ResNet-110."""
    units = tuple(UnitCost(100 // (1 + i // 18), 9, 50 // (1 + i // 18), 8, int(i > 50), 1 + i // 18, 10) for i in range(55))
    heads = [HeadCost(3 + i // 18, 40 - i // 18, 2 + i // 18, 5 + i // 18) for i in range(55)]
    step = StepCost(1000, units, HeadCost(0, 20, 3, 10), lambda cut, *_: heads[cut], (1,) * 55, 560)
    assert len(smallest_peak(step, 32).cuts) == 31
    best = peak_of(step, smallest_peak(step)).total
    assert peak_of(step, fewest_flops(step, best)).total == best


def test_unreachable_targets_are_refused():
    step = random_step(0)
    with pytest.raises(CostError, match=r'smallest peak is'):
        fewest_flops(step, 1)
    with pytest.raises(CostError, match='choose from 1 to'):
        smallest_peak(step, 99)
    with pytest.raises(CostError, match='choose from 1 to'):
        fewest_flops(step, 10**9, blocks=99)
    with pytest.raises(CostError, match='stays within the limit of FLOPs: raise it'):
        smallest_peak(step, len(step.candidates) + 1, overhead=step.overhead(MemoryPlan()))
