"""Measure the costs that :mod:`mmman.planning.costs` needs on the model of a config.

Nothing runs at the requested size. The backbone, the local heads, and neck with head and loss run forward and backward on two
small probe batches. The size of every tensor is extrapolated to the requested batch, linearly in the number of pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.memory import LiveBytes
from mmman.analysis.roofline import Device
from mmman.analysis.trace import Trace, linear
from mmman.errors import ConfigError
from mmman.memory.chunks import replaced
from mmman.memory.detection.dense_loss import DenseLoss
from mmman.memory.stem import stem_paths
from mmman.partition.chain import STEM
from mmman.planning.costs import HeadCost, MemoryPlan, Peak, RecomputeMode, StepCost, UnitCost, peak_of
from mmman.planning.head_profile import HeadCosts
from mmman.planning.probe_runs import ProbeBatch, ProbeRuns, gradient_bytes, held_bytes, outputs_observed, static_bytes

Options = dict[str, Sequence[str] | bool]
"""The options of ``mmman.LocalBackbone`` that select what is recomputed."""
RECOMPUTE = ('recompute', 'selective_recompute')


@dataclass(frozen=True)
class Profile:
    """The costs of a config's training step.

    Attributes:
        step: The costs.
        at_once: The costs without chunks. Without a recompute mode it is end-to-end training as the stock config does it.
        one_chunk: The costs with all images in one chunk, and without recomputation. None if there are no chunks, or if they
            have normalisers of their own.
        names: Names of the backbone's units.
        mode_options: The options of ``mmman.LocalBackbone`` for each recompute mode.
        config: The config with ``num_blocks=1``, which trains end to end.
        shape: (B, C, H, W) of the batch.
    """

    step: StepCost
    at_once: StepCost
    one_chunk: StepCost | None
    names: tuple[str, ...]
    mode_options: Mapping[RecomputeMode, Options]
    config: Config
    shape: tuple[int, int, int, int]

    @property
    def whole(self) -> Peak:
        """The peak of end-to-end training without recomputation and without chunks."""
        return peak_of(self.at_once, MemoryPlan())

    def options(self, plan: MemoryPlan) -> dict[str, object]:
        """Express a plan as options of ``mmman.LocalBackbone``."""
        found: dict[str, object] = {'num_blocks': len(plan.modes)}
        if plan.cuts:
            found['partition'] = [self.names[cut] for cut in plan.cuts]
        if self.step.recomputed:
            blocks = [(self.names[start : end + 1], self.mode_options[mode]) for start, end, mode in self.step.blocks(plan)]
            for key in RECOMPUTE:
                found[key] = self._abbreviated({name for names, way in blocks for name in names if name in way.get(key, ())})
        return found

    def _abbreviated(self, units: set[str]) -> list[str]:
        """Names of units in network order. A stage whose units are all included is given by its own name."""
        stage_of = {name: name.rpartition('.')[0] for name in self.names}
        parts = {stage for stage in stage_of.values() if not units >= {n for n in self.names if stage_of[n] == stage}}
        return list(dict.fromkeys(n if stage_of[n] in parts else stage_of[n] or n for n in self.names if n in units))


def profile_step(
    cfg: Config, batch: int, height: int, width: int, may_recompute: bool = False, device: Device | None = None
) -> Profile:
    """Measure the costs of a training step of a config's model, for any cuts.

    Args:
        cfg: Config whose ``model.backbone`` is an ``mmman.LocalBackbone``. Its ``num_blocks`` and ``partition`` are ignored.
        batch: Images per step.
        height, width: Size of the images, pixels.
        may_recompute: Whether plans choose a recompute mode for each block. If so, the config's recompute options are ignored.
        device: The GPU whose time is predicted, if any.

    Raises:
        ConfigError: The backbone isn't an ``mmman.LocalBackbone``; it has no ``local_head``; or the config sets
            ``images_per_chunk`` and the dense heads don't support it.
    """
    cfg, asked = as_single_block(cfg), (batch, height, width, device)
    own = {key: cfg.model.backbone.pop(key) for key in RECOMPUTE if key in cfg.model.backbone}
    small = ProbeRuns.of(without_recompute_and_chunks(cfg), *asked)
    plain = _unit_costs(small), _task_cost(small)
    mode_options = _mode_options(small) if may_recompute else {RecomputeMode.NONE: own}
    if not may_recompute:
        cfg.model.backbone.update(own)
    several = [ProbeRuns.of(_with(cfg, options), *asked) if options else None for options in mode_options.values()]
    units = [plain[0] if runs is None else _unit_costs(runs) for runs in several]
    in_chunks = cfg.optim_wrapper.get('images_per_chunk') is not None
    runs = several[-1] or (ProbeRuns.of(cfg, *asked) if in_chunks else small)
    task = _task_cost(runs) if in_chunks else plain[1]
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'backbone', 'num_blocks', 'pretrained')}
    optimizer = cfg.optim_wrapper.optimizer
    heads = HeadCosts(runs, options, _optimizer_bytes(optimizer)[0], mode_options)
    at_once = _step_cost(small, optimizer, *plain, heads, tuple(units[1:]))
    step, one_chunk = replace(at_once, units=units[0], task=task, in_chunks=in_chunks), None
    if isinstance(runs.chunked, DenseLoss):
        together = replace(small, chunked=DenseLoss(small.model, batch, lambda loss: loss))
        one_chunk = replace(at_once, task=_task_cost(together), in_chunks=True)
    names = tuple(unit.name for unit in runs.chain.units)
    return Profile(step, at_once, one_chunk, names, mode_options, cfg, (batch, 3, height, width))


def profile_end_to_end(cfg: Config, batch: int, height: int, width: int, device: Device | None = None) -> StepCost:
    """Measure the costs of end-to-end training without chunks and without ``recompute``; the stock ``with_cp`` applies.

    Args:
        cfg: As in :func:`profile_step`.
        batch: Images per step.
        height, width: Size of the images, pixels.
        device: As in :func:`profile_step`.

    Returns:
        Costs for a plan without cuts.
    """
    runs = ProbeRuns.of(without_recompute_and_chunks(as_single_block(cfg)), batch, height, width, device)
    return _step_cost(runs, cfg.optim_wrapper.optimizer, _unit_costs(runs), _task_cost(runs))


def _step_cost(
    runs: ProbeRuns,
    optimizer: dict,
    units: tuple[UnitCost, ...],
    task: HeadCost,
    heads: HeadCosts | None = None,
    recomputed: tuple[tuple[UnitCost, ...], ...] = (),
) -> StepCost:
    model = runs.model
    state, update = _optimizer_bytes(optimizer)
    return StepCost(
        base=static_bytes(model, state) + linear(tuple(map(held_bytes, runs.batches)), runs.pixels),
        units=units,
        task=task,
        head=heads,
        strides=(1,) * len(units) if heads is None else heads.strides,
        flops=sum(cost.flops for cost in (*units, task)),
        time=sum(cost.time for cost in (*units, task)),
        recomputed=recomputed,
        first=next(i for i, unit in enumerate(runs.chain.units) if unit.is_trainable(model.backbone)),
        update=round(update * max(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)),
        is_immediate=getattr(runs.optim_wrapper, 'update', None) == 'immediate',
    )


def as_single_block(cfg: Config) -> Config:
    """Return a copy of the config whose ``mmman.LocalBackbone`` has one block.

    Raises:
        ConfigError: The backbone isn't an ``mmman.LocalBackbone``, or it has no ``local_head``.
    """
    backbone = cfg.model.backbone
    if str(backbone.type).rpartition('.')[2] != 'LocalBackbone' or backbone.get('local_head') is None:
        raise ConfigError(
            'planning cuts needs a config whose model.backbone is an mmman.LocalBackbone with a local_head: '
            'tools/fit_memory.py writes one for any stock config'
        )
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone = {k: v for k, v in backbone.items() if k not in ('partition', 'loss_weight')} | {'num_blocks': 1}
    return cfg


def without_recompute_and_chunks(cfg: Config) -> Config:
    """Return a copy of the config without recomputation and without ``images_per_chunk``."""
    cfg = copy.deepcopy(cfg)
    for key in RECOMPUTE:
        cfg.model.backbone.pop(key, None)
    cfg.optim_wrapper.pop('images_per_chunk', None)
    return cfg


def _with(cfg: Config, options: Options) -> Config:
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.update(options)
    return cfg


def _mode_options(runs: ProbeRuns) -> dict[RecomputeMode, Options]:
    """The options of each recompute mode. In the selective and full modes a stem runs in chunks if it supports that."""
    backbone = runs.model.backbone
    stem = [unit.name for unit in runs.chain.units if unit.name == STEM and stem_paths(backbone, unit) is not None]
    units = [unit.name for unit in runs.chain.units if unit.name != STEM]
    selected = {'recompute': stem, 'selective_recompute': units}
    return {RecomputeMode.NONE: {}, RecomputeMode.SELECTIVE: selected, RecomputeMode.FULL: {'recompute': stem + units}}


def _unit_costs(runs: ProbeRuns) -> tuple[UnitCost, ...]:
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
    holds, read = _held_inputs(runs), _outputs_read(runs)
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


def _outputs_read(runs: ProbeRuns) -> list[bool]:
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


def _task_cost(runs: ProbeRuns) -> HeadCost:
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


def _optimizer_bytes(config: dict) -> tuple[float, float]:
    """Bytes of optimizer state, and of temporaries in an optimizer step, both per byte of parameter."""
    parameter = nn.Parameter(torch.zeros(1 << 16))
    optimizer = OPTIMIZERS.build({**config, 'params': [parameter]})
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with LiveBytes(parameter, optimizer) as live:
        before, size = live.current, parameter.numel() * parameter.element_size()
        optimizer.step()
    return (before - size) / size, (live.peak - before) / size


def _last_tensor(features: object) -> Tensor:
    *_, last = (leaf for leaf in tree_flatten(features)[0] if isinstance(leaf, Tensor))
    return last
