"""Measure memory and work of what follows the backbone: neck, head and loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.trace import Trace
from mmman.memory.chunks import replaced
from mmman.planning.costs import HeadCost
from mmman.planning.probe_runs import ProbeBatch, ProbeRuns, gradient_bytes


def task_cost(runs: ProbeRuns) -> HeadCost:
    model = runs.model
    backbone = model.backbone

    def run(batch: ProbeBatch, trace: Trace) -> None:
        model.zero_grad()
        with torch.no_grad(), runs.precision():
            features = backbone(batch.inputs)
        _last_tensor(features).requires_grad_()
        if runs.chunked is not None:
            with runs.precision():
                runs.chunked.neck_and_head([*features], batch.inputs, batch.samples, dry_run=True)
        trace.begin()
        _task_loss(runs, batch, features).backward()
        trace.mark('end')

    costs = runs.extrapolate(run)
    in_units = {id(p) for unit in runs.chain.units for p in unit.parameters(backbone)}
    own = [p for p in model.parameters() if id(p) not in in_units]
    work = costs.flops('end'), costs.operators('end'), costs.nanoseconds('end')
    return HeadCost(0, costs.peak('start', 'end'), gradient_bytes(own), *work)


def outputs_read(runs: ProbeRuns) -> list[bool]:
    """For every output of the backbone, whether the task loss sends it a gradient."""
    model, batch = runs.model, runs.batches[0]
    with FloatKernels():
        with torch.no_grad(), runs.precision():
            features = model.backbone(batch.inputs)
        leaves = [[leaf.requires_grad_() for leaf in tree_flatten(one)[0] if isinstance(leaf, Tensor)] for one in features]
        _task_loss(runs, batch, features).backward()
    return [any(leaf.grad is not None for leaf in own) for own in leaves]


def _task_loss(runs: ProbeRuns, batch: ProbeBatch, features: object) -> Tensor:
    """The model's loss, computed from the given outputs of the backbone."""
    model = runs.model
    with runs.precision():
        if runs.chunked is not None:
            return model.parse_losses(runs.chunked.neck_and_head([*features], batch.inputs, batch.samples))[0]
        with replaced(model.backbone, 'forward', lambda *_, **__: features):
            return model.parse_losses(model(inputs=batch.inputs, data_samples=batch.samples, mode='loss'))[0]


def _last_tensor(features: object) -> Tensor:
    *_, last = (leaf for leaf in tree_flatten(features)[0] if isinstance(leaf, Tensor))
    return last
