"""The choice of cuts, recompute modes and images per chunk against brute force over all of them."""

from dataclasses import replace

import pytest

from mmman.errors import CostError
from mmman.planning.choice import FitRow, Limits
from mmman.planning.costs import HeadCost, MemoryPlan, StepCost, UnitCost, peak_of
from mmman.planning.local_plan import ChunkPlan, best_of, local_plan
from mmman.planning.profile import Profile
from tests.unit.planning.test_search import all_plans, random_step

CHUNKED = [2, 3, 6, 7]  # seeds of steps in chunks


def profile_of(seed: int, is_timed: bool) -> Profile:
    """A random step whose task takes less memory but more time with fewer images per chunk."""
    step = random_step(seed)
    if is_timed:
        plain = step.head

        def timed(cost: UnitCost | HeadCost) -> UnitCost | HeadCost:
            return replace(cost, time=3 * cost.flops + 1)

        units, *recomputed = (tuple(map(timed, own)) for own in (step.units, *step.recomputed))
        step = replace(step, units=units, recomputed=tuple(recomputed), task=timed(step.task), time=3 * step.flops)
        step = replace(step, head=lambda *at: timed(plain(*at)))
    task = step.task
    tasks = {n: replace(task, peak=task.peak + 12 * n, flops=task.flops + 60 // n, time=task.time + 90 // n) for n in (1, 2, 4)}
    return Profile(replace(step, task=tasks[1]), step, tasks, tuple(map(str, range(len(step.units)))), {}, None, (4, 3, 8, 8))


@pytest.mark.parametrize('seed', CHUNKED)
@pytest.mark.parametrize('is_timed', [False, True])
@pytest.mark.parametrize('share', [None, 0.4])
@pytest.mark.parametrize('memory', [None, 150])
def test_plans_match_brute_force(seed, is_timed, share, memory):
    profile = profile_of(seed, is_timed)
    base = FitRow('base', 'the same', None, flops=profile.at_once.flops, time=profile.at_once.time)
    limits = Limits(memory, **({'slowdown': share} if is_timed else {'overhead': share}))

    def work(step: StepCost, plan: MemoryPlan) -> int:
        return (step.timed() if is_timed else step).total(plan)

    every = [
        (peak_of(step, plan).total, work(step, plan))
        for step in map(profile.in_chunks_of, profile.tasks)
        for plan in all_plans(step)
        if len(plan.modes) == 2
    ]
    largest = (base.time if is_timed else base.flops) * (1 + share) if share is not None else float('inf')
    affordable = [one for one in every if one[1] <= largest]
    if not affordable:
        with pytest.raises(CostError, match='limit of time' if is_timed else 'limit of FLOPs'):
            local_plan(profile, (1, 2, 4), 2, None, limits, base)
        return
    found = local_plan(profile, (1, 2, 4), 2, None, limits, base)
    assert found.peak == peak_of(profile.in_chunks_of(found.images), found.plan).total
    assert found.work <= largest
    within = [one for one in affordable if memory is not None and one[0] <= memory]
    if within:
        assert found.peak <= memory and found.work == min(work for _, work in within)
    else:
        assert found.peak == min(peak for peak, _ in affordable)


def test_with_given_cuts_one_mode_and_the_chunks_are_chosen():
    profile = profile_of(6, is_timed=False)
    cut = profile.names[profile.step.candidates[0]]
    base = FitRow('base', 'the same', None, flops=profile.at_once.flops)
    found = local_plan(profile, (1, 2, 4), 2, [cut], Limits(), base)
    plans = [
        ChunkPlan(images, profile.in_chunks_of(images), MemoryPlan((profile.step.candidates[0],), (mode,) * 2))
        for images in (1, 2, 4)
        for mode in profile.step.choices
    ]
    assert found.peak == min(plan.peak for plan in plans)
    least = local_plan(profile, (1, 2, 4), 2, [cut], Limits(memory=10**6), base)
    assert least.work == min(plan.work for plan in plans) and least.images == 4
    with pytest.raises(CostError, match='leaves no backbone output to the last block'):
        local_plan(profile, (1,), 2, [profile.names[-1]], Limits(), base)


def test_if_nothing_is_within_the_limit_of_work_the_first_is_taken():
    profile = profile_of(2, is_timed=True)
    base = FitRow('base', 'the same', None, flops=profile.at_once.flops, time=profile.at_once.time)
    plans = [ChunkPlan(images, profile.in_chunks_of(images), MemoryPlan()) for images in (4, 2, 1)]
    assert best_of(plans, Limits(slowdown=-0.9), base) is plans[0]
    assert best_of(plans, Limits(), base).images == 1
    assert [str(ChunkPlan(n, profile.step, MemoryPlan())) for n in (None, 1, 4)] == ['', '1 image a chunk', '4 images a chunk']
