"""Peaks and overheads against numbers computed by hand."""

from dataclasses import replace

import pytest

from mmman.planning.costs import HeadCost, MemoryPlan, RecomputeMode, StepCost, UnitCost, peak_of


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
    # the peak is at block 2, whose stage was called with the first unit's output
    assert peak_of(step, MemoryPlan((1, 2))).total == 100 + 20 + 4 + 1000


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


def test_a_step_is_planned_by_time_as_by_flops():
    units = tuple(UnitCost(1, 0, 0, 1, flops=10 * i, time=i) for i in (1, 2, 3))
    full = tuple(replace(unit, flops=2 * unit.flops, time=3 * unit.time) for unit in units)
    step = StepCost(
        0, units, HeadCost(0, 0, 0, 40, time=4), lambda *_: HeadCost(0, 0, 0, 50, time=1), (1,) * 3, 100, (full, full)
    )
    step, plan = replace(step, time=10), MemoryPlan((1,), (RecomputeMode.FULL, RecomputeMode.NONE))
    assert (step.overhead(plan), step.total(plan)) == (pytest.approx(0.8), 60 + 30 + 50 + 40)
    timed = step.timed()
    assert (timed.overhead(plan), timed.total(plan)) == (pytest.approx(0.7), 9 + 3 + 1 + 4)
    assert (step.work, timed.work, timed.operators(plan)) == ('FLOPs', 'time', step.operators(plan))


def test_frozen_outputs_get_no_gradient():
    """Three units with an output each, of which the first is frozen; neck and head run in chunks."""
    units = tuple(UnitCost(1, 0, 0, output=10**i, tap=10**i) for i in (3, 4, 5))
    trained = StepCost(0, units, HeadCost(0, 7, 0), lambda *_: HeadCost(0, 0, 0), (1,) * 3, 0, in_chunks=True)
    frozen = replace(trained, first=1)
    assert peak_of(trained, MemoryPlan()).total == 3 + 10**3 + 10**4 + 7  # the last output's gradient is the head's
    assert peak_of(frozen, MemoryPlan()).total == 3 + 10**4 + 7
    # at once they are held until their unit's backward pass
    units = (units[0], units[1], replace(units[2], backward=10**6))
    assert peak_of(replace(trained, units=units, in_chunks=False), MemoryPlan()).total == 3 + 10**3 + 10**4 + 10**6
    assert peak_of(replace(frozen, units=units, in_chunks=False), MemoryPlan()).total == 3 + 10**4 + 10**6


def test_cuts_before_all_outputs_that_are_read():
    taps = [(0, True), (8, False), (0, True), (0, True), (8, True), (0, True), (8, True)]
    units = tuple(UnitCost(0, 0, 0, 8, tap, is_read=read) for tap, read in taps)
    step = StepCost(0, units, HeadCost(0, 0, 0), lambda *_: HeadCost(0, 0, 0), (1,) * 7, 0, first=1)
    assert [*step.candidates] == [1, 2, 3, 4, 5] and [*step.before_outputs().candidates] == [1, 2, 3]
    unread = replace(step, units=tuple(replace(unit, is_read=False) for unit in units))
    assert unread.before_outputs().candidates == unread.candidates
