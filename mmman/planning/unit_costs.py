"""Measure memory and work of a backbone's units."""

from __future__ import annotations

import torch
from torch import Tensor

from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.trace import Trace
from mmman.planning.costs import UnitCost
from mmman.planning.probe_runs import ProbeBatch, ProbeRuns, gradient_bytes, outputs_observed
from mmman.planning.task_cost import outputs_read


def unit_costs(runs: ProbeRuns) -> tuple[UnitCost, ...]:
    backbone, chain = runs.model.backbone, runs.chain
    count = len(chain.units)

    def run(batch: ProbeBatch, trace: Trace) -> None:
        runs.model.zero_grad()
        trace.begin()
        last: list[Tensor] = []

        def behind(i: int, output: Tensor) -> None:
            trace.mark(('forward', i))
            trace.name(i, output)
            if output.requires_grad:
                output.register_hook(lambda _: trace.mark(('gradient', i)))
            if i == count - 1:
                last.append(output)

        with outputs_observed(backbone, chain, behind), runs.precision():
            backbone(batch.inputs)
        loss = (last.pop() * 1.0).sum()  # the backward of * 1.0 allocates a full gradient of the output
        trace.mark('backward')
        loss.backward()
        trace.mark('end')

    costs = runs.extrapolate(run)
    holds, read = _held_inputs(runs), outputs_read(runs)
    units, later = [], 0
    for i in range(count - 1, -1, -1):
        unit = chain.units[i]
        before, end = ('forward', i - 1) if i else 'start', ('gradient', i - 1)
        kept, start = costs.alive(('forward', i)), 'backward' if i == count - 1 else ('gradient', i)
        gradient = gradient_bytes(unit.parameters(backbone))
        if start not in costs:  # frozen
            backward, backward_held, flops_backward, operators_backward, time_backward = 0, 0, 0, 0, 0
        else:
            end = end if end in costs else 'end'
            backward, backward_held = (max(0, costs.peak(start, end, held) - kept - later) for held in (None, i))
            flops_backward = costs.flops(end) - costs.flops(start)
            operators_backward = costs.operators(end) - costs.operators(start)
            time_backward = costs.nanoseconds(end) - costs.nanoseconds(start)
        output = costs.size(i)
        taps = [element for element, tap in enumerate(chain.out_units) if tap == i]
        units.append(
            UnitCost(
                kept=kept - costs.alive(before),
                forward=costs.peak(before, ('forward', i)) - costs.alive(before),
                backward=backward,
                backward_held=backward_held,
                output=output,
                tap=output * max((1 + (element in chain.norms) for element in taps), default=0),  # a norm's output too
                gradient=gradient,
                holds=holds[i],
                is_read=any(read[element] for element in taps),
                flops=costs.flops(('forward', i)) - costs.flops(before) + flops_backward,
                operators=costs.operators(('forward', i)) - costs.operators(before) + operators_backward,
                time=costs.nanoseconds(('forward', i)) - costs.nanoseconds(before) + time_backward,
            )
        )
        later += gradient
    return tuple(reversed(units))


def _held_inputs(runs: ProbeRuns) -> list[int]:
    """For every unit, the index of the unit before its stage, or before the unit itself if no stage is called as a module.

    A stage that is called as a module receives the output of the unit before it.
    """
    backbone, called = runs.model.backbone, set()
    paths = [unit.output.split('.') for unit in runs.chain.units]
    owners = [['.'.join(path[:i]) for i in range(1, len(path))] for path in paths]
    handles = [
        backbone.get_submodule(owner).register_forward_pre_hook(lambda *_, owner=owner: called.add(owner))
        for owner in {owner for own in owners for owner in own}
    ]
    with torch.no_grad(), FloatKernels(), runs.precision():
        backbone(runs.batches[0].inputs)
    for handle in handles:
        handle.remove()
    stages = [next((owner for owner in own if owner in called), None) for own in owners]
    return [i - 1 if stage is None else stages.index(stage) - 1 for i, stage in enumerate(stages)]
