"""The costs that :mod:`mmman.partition.memory` plans with, from the model of a config.

Nothing runs at the asked size. Backbone, local heads, and neck with head and loss run forward and backward by their own code on
two small batches, and every tensor of theirs is extrapolated to the asked one, linear in its pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmman.analysis.head_profile import HeadCosts
from mmman.analysis.memory import LiveBytes
from mmman.analysis.small_runs import Batch, SmallRuns, gradient_bytes, held_bytes, outputs_told, static_bytes
from mmman.analysis.trace import Trace, linear
from mmman.errors import MisuseError
from mmman.local.chunks import replaced
from mmman.local.recompute import units_to_recompute
from mmman.local.stem import stem_paths
from mmman.partition.chain import STEM
from mmman.partition.memory import HeadCost, MemoryPlan, Peak, StepCost, UnitCost, peak_of


@dataclass(frozen=True)
class Profile:
    """The costs of a config's training step.

    Attributes:
        step: The costs.
        whole: The peak of end-to-end training that computes nothing twice, and all images at once.
        names: The names of the backbone's units.
        recompute: Those that are computed again in the backward pass, or may be where plans choose.
        config: The config, trained end to end: ``num_blocks=1``.
        shape: (B, C, H, W) of the batch.
    """

    step: StepCost
    whole: Peak
    names: tuple[str, ...]
    recompute: tuple[str, ...]
    config: Config
    shape: tuple[int, int, int, int]

    def options(self, plan: MemoryPlan) -> dict[str, object]:
        """What a plan is in the options of ``mmman.LocalBackbone``."""
        found: dict[str, object] = {'num_blocks': len(plan.again)}
        if plan.cuts:
            found['partition'] = [self.names[cut] for cut in plan.cuts]
        if self.step.again is not None:
            blocks = [self.names[start : end + 1] for start, end, again in self.step.blocks(plan) if again]
            found['recompute'] = self._in_short({name for block in blocks for name in block if name in self.recompute})
        return found

    def _in_short(self, units: set[str]) -> list[str]:
        """Names of units, of whole stages by their name."""
        stage_of = {name: name.rpartition('.')[0] for name in self.names}
        parts = {stage for stage in stage_of.values() if not units >= {n for n in self.names if stage_of[n] == stage}}
        return list(dict.fromkeys(n if stage_of[n] in parts else stage_of[n] or n for n in self.names if n in units))


def profile_step(cfg: Config, batch: int, height: int, width: int, may_recompute: bool = False) -> Profile:
    """The costs of a training step of a config's model, whatever its cuts are.

    Args:
        cfg: Of a model whose backbone is an ``mmman.LocalBackbone``. Its ``num_blocks`` and ``partition`` don't count.
        batch: Images.
        height, width: Pixels.
        may_recompute: Whether plans choose the blocks whose units are computed again: those of the config's ``recompute``, by
            default all.

    Raises:
        MisuseError: The backbone isn't localised, or ``local_head`` isn't set; or its dense heads can't run on a few images at
            a time, as asked.
    """
    cfg, asked = end_to_end(cfg), (batch, height, width)
    once = computed_at_once(cfg)
    small = SmallRuns.of(once, *asked)
    plain = _unit_costs(small), _task_cost(small)
    if may_recompute and not cfg.model.backbone.get('recompute'):
        cfg.model.backbone.recompute = _what_can_be_recomputed(small)
    recompute = units_to_recompute(small.model.backbone, small.chain, cfg.model.backbone.get('recompute', False))
    if (once.model, once.optim_wrapper) == (cfg.model, cfg.optim_wrapper):
        runs, (units, task) = small, plain
    else:
        runs = SmallRuns.of(cfg, *asked)
        units, task = _unit_costs(runs), _task_cost(runs)
    state, update = _optimizer_bytes(cfg.optim_wrapper.optimizer)
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'backbone', 'num_blocks', 'pretrained')}
    heads, model = HeadCosts(runs, options, state, may_recompute), runs.model
    step = StepCost(
        base=static_bytes(model, state) + linear(tuple(map(held_bytes, runs.batches)), runs.pixels),
        units=plain[0] if may_recompute else units,
        task=task,
        head=heads,
        strides=heads.strides,
        flops=sum(unit.flops for unit in plain[0]) + plain[1].flops,
        again=units if may_recompute else None,
        first=next(i for i, unit in enumerate(runs.chain.units) if unit.is_trainable(model.backbone)),
        update=round(update * max(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)),
        is_immediate=getattr(runs.optim_wrapper, 'update', None) == 'immediate',
        in_chunks=runs.dense is not None,
    )
    whole = peak_of(replace(step, units=plain[0], task=plain[1], in_chunks=False), MemoryPlan())
    names, recompute = (tuple(unit.name for unit in units) for units in (runs.chain.units, recompute))
    return Profile(step, whole, names, recompute, cfg, (batch, 3, height, width))


def end_to_end(cfg: Config) -> Config:
    """The config with its ``mmman.LocalBackbone`` in one block.

    Raises:
        MisuseError: It has none, or one without a ``local_head``.
    """
    backbone = cfg.model.backbone
    if str(backbone.type).rpartition('.')[2] != 'LocalBackbone' or backbone.get('local_head') is None:
        raise MisuseError(
            'cuts are planned for a config whose model.backbone is an mmman.LocalBackbone with a local_head: '
            'tools/localize_config.py writes one for any stock config'
        )
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone = {k: v for k, v in backbone.items() if k not in ('partition', 'loss_weight')} | {'num_blocks': 1}
    return cfg


def computed_at_once(cfg: Config) -> Config:
    """The config without what is computed twice or for a few images at a time."""
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.pop('recompute', None)
    cfg.optim_wrapper.pop('images_per_chunk', None)
    return cfg


def _what_can_be_recomputed(runs: SmallRuns) -> list[str]:
    backbone = runs.model.backbone
    return [unit.name for unit in runs.chain.units if unit.name != STEM or stem_paths(backbone, unit) is not None]


def _unit_costs(runs: SmallRuns) -> tuple[UnitCost, ...]:
    backbone, chain = runs.model.backbone, runs.chain
    count = len(chain.units)

    def run(batch: Batch, trace: Trace) -> None:
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

        with outputs_told(backbone, chain, behind), runs.precision():
            backbone(batch.inputs)
        loss = (last.pop() * 1.0).sum()  # whose backward makes a gradient of the whole output
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
            backward, backward_held, flops_backward = 0, 0, 0
        else:
            end = end if end in costs else 'end'
            backward, backward_held = (max(0, costs.peak(start, end, held) - kept - later) for held in (None, i))
            flops_backward = costs.flops(end) - costs.flops(start)
        output = costs.size(i)
        taps = [element for element, tap in enumerate(chain.taps) if tap == i]
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
            )
        )
        later += gradient
    return tuple(reversed(units))


def _held_inputs(runs: SmallRuns) -> list[int]:
    """For every unit, the one in front of the stage that runs it: a stage that is called as a module gets its output."""
    backbone, called = runs.model.backbone, set()
    paths = [unit.output.split('.') for unit in runs.chain.units]
    owners = [['.'.join(path[:i]) for i in range(1, len(path))] for path in paths]
    handles = [
        backbone.get_submodule(owner).register_forward_pre_hook(lambda *_, owner=owner: called.add(owner))
        for owner in {owner for own in owners for owner in own}
    ]
    with torch.no_grad(), runs.precision():
        backbone(runs.batches[0].inputs)
    for handle in handles:
        handle.remove()
    stages = [next((owner for owner in own if owner in called), None) for own in owners]
    return [i - 1 if stage is None else stages.index(stage) - 1 for i, stage in enumerate(stages)]


def _outputs_read(runs: SmallRuns) -> list[bool]:
    """For every output of the backbone, whether a gradient comes back to it."""
    model, batch = runs.model, runs.batches[0]
    with torch.no_grad(), runs.precision():
        features = model.backbone(batch.inputs)
    leaves = [[leaf.requires_grad_() for leaf in tree_flatten(one)[0] if isinstance(leaf, Tensor)] for one in features]
    _task_loss(runs, batch, features).backward()
    return [any(leaf.grad is not None for leaf in own) for own in leaves]


def _task_loss(runs: SmallRuns, batch: Batch, features: object) -> Tensor:
    """The model's loss on outputs of the backbone that are given."""
    model = runs.model
    loss = model.loss if runs.dense is None else runs.dense.of_task
    given = replaced(model.backbone, 'forward', lambda *_, **__: features)
    with given, replaced(model, 'loss', loss), runs.precision():
        return model.parse_losses(model(inputs=batch.inputs, data_samples=batch.samples, mode='loss'))[0]


def _task_cost(runs: SmallRuns) -> HeadCost:
    model = runs.model
    backbone = model.backbone

    def run(batch: Batch, trace: Trace) -> None:
        model.zero_grad()
        with torch.no_grad(), runs.precision():
            features = backbone(batch.inputs)
        _last_tensor(features).requires_grad_()
        trace.begin()
        _task_loss(runs, batch, features).backward()
        trace.mark('end')

    costs = runs.extrapolate(run)
    in_units = {id(p) for unit in runs.chain.units for p in unit.parameters(backbone)}
    own = [p for p in model.parameters() if id(p) not in in_units]
    return HeadCost(0, costs.peak('start', 'end'), gradient_bytes(own), costs.flops('end'))


def _optimizer_bytes(config: dict) -> tuple[float, float]:
    """Bytes of state, and bytes that a step needs on the way, relative to the parameter."""
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
