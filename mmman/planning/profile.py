"""The costs that :mod:`mmman.planning.costs` plans with, from the model of a config.

Nothing runs at the asked size. Backbone, local heads, and neck with head and loss run forward and backward by their own code on
two small batches, and every tensor of theirs is extrapolated to the asked one, linear in its pixels.
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

from mmman.analysis.memory import LiveBytes
from mmman.analysis.trace import Trace, linear
from mmman.errors import MisuseError
from mmman.memory.chunks import replaced
from mmman.memory.stem import stem_paths
from mmman.partition.chain import STEM
from mmman.planning.costs import Again, HeadCost, MemoryPlan, Peak, StepCost, UnitCost, peak_of
from mmman.planning.head_profile import HeadCosts
from mmman.planning.small_runs import Batch, SmallRuns, gradient_bytes, held_bytes, outputs_told, static_bytes

Options = dict[str, Sequence[str] | bool]
"""Those of ``mmman.LocalBackbone`` that say what is computed again."""
RECOMPUTE = ('recompute', 'selective_recompute')


@dataclass(frozen=True)
class Profile:
    """The costs of a config's training step.

    Attributes:
        step: The costs.
        whole: The peak of end-to-end training that computes nothing twice, and all images at once.
        names: The names of the backbone's units.
        ways: The options behind every choice of what is computed again.
        config: The config, trained end to end: ``num_blocks=1``.
        shape: (B, C, H, W) of the batch.
    """

    step: StepCost
    whole: Peak
    names: tuple[str, ...]
    ways: Mapping[Again, Options]
    config: Config
    shape: tuple[int, int, int, int]

    def options(self, plan: MemoryPlan) -> dict[str, object]:
        """What a plan is in the options of ``mmman.LocalBackbone``."""
        found: dict[str, object] = {'num_blocks': len(plan.again)}
        if plan.cuts:
            found['partition'] = [self.names[cut] for cut in plan.cuts]
        if self.step.again:
            blocks = [(self.names[start : end + 1], self.ways[again]) for start, end, again in self.step.blocks(plan)]
            for key in RECOMPUTE:
                found[key] = self._in_short({name for names, way in blocks for name in names if name in way.get(key, ())})
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
        may_recompute: Whether plans choose what the units of each block compute again. Then what the config says doesn't count.

    Raises:
        MisuseError: The backbone isn't localised, or ``local_head`` isn't set; or its dense heads can't run on a few images at
            a time, as asked.
    """
    cfg, asked = end_to_end(cfg), (batch, height, width)
    own = {key: cfg.model.backbone.pop(key) for key in RECOMPUTE if key in cfg.model.backbone}
    small = SmallRuns.of(computed_at_once(cfg), *asked)
    plain = _unit_costs(small), _task_cost(small)
    ways = _ways(small) if may_recompute else {Again.NOTHING: own}
    if not may_recompute:
        cfg.model.backbone.update(own)
    several = [SmallRuns.of(_with(cfg, options), *asked) if options else None for options in ways.values()]
    units = [plain[0] if runs is None else _unit_costs(runs) for runs in several]
    in_chunks = cfg.optim_wrapper.get('images_per_chunk') is not None
    runs = several[-1] or (SmallRuns.of(cfg, *asked) if in_chunks else small)
    task = _task_cost(runs) if in_chunks else plain[1]
    state, update = _optimizer_bytes(cfg.optim_wrapper.optimizer)
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'backbone', 'num_blocks', 'pretrained')}
    heads, model = HeadCosts(runs, options, state, ways), runs.model
    step = StepCost(
        base=static_bytes(model, state) + linear(tuple(map(held_bytes, runs.batches)), runs.pixels),
        units=units[0],
        task=task,
        head=heads,
        strides=heads.strides,
        flops=sum(unit.flops for unit in plain[0]) + plain[1].flops,
        again=tuple(units[1:]),
        first=next(i for i, unit in enumerate(runs.chain.units) if unit.is_trainable(model.backbone)),
        update=round(update * max(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)),
        is_immediate=getattr(runs.optim_wrapper, 'update', None) == 'immediate',
        in_chunks=in_chunks,
    )
    whole = peak_of(replace(step, units=plain[0], task=plain[1], in_chunks=False), MemoryPlan())
    return Profile(step, whole, tuple(unit.name for unit in runs.chain.units), ways, cfg, (batch, 3, height, width))


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
    for key in RECOMPUTE:
        cfg.model.backbone.pop(key, None)
    cfg.optim_wrapper.pop('images_per_chunk', None)
    return cfg


def _with(cfg: Config, options: Options) -> Config:
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.update(options)
    return cfg


def _ways(runs: SmallRuns) -> dict[Again, Options]:
    """What blocks may choose from. A stem, where it can, runs in chunks in both that compute anything again."""
    backbone = runs.model.backbone
    stem = [unit.name for unit in runs.chain.units if unit.name == STEM and stem_paths(backbone, unit) is not None]
    units = [unit.name for unit in runs.chain.units if unit.name != STEM]
    selected = {'recompute': stem, 'selective_recompute': units}
    return {Again.NOTHING: {}, Again.SELECTED: selected, Again.ALL: {'recompute': stem + units}}


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
    with runs.precision():
        if runs.dense is not None:
            return model.parse_losses(runs.dense.neck_and_head([*features], batch.samples))[0]
        with replaced(model.backbone, 'forward', lambda *_, **__: features):
            return model.parse_losses(model(inputs=batch.inputs, data_samples=batch.samples, mode='loss'))[0]


def _task_cost(runs: SmallRuns) -> HeadCost:
    model = runs.model
    backbone = model.backbone

    def run(batch: Batch, trace: Trace) -> None:
        model.zero_grad()
        with torch.no_grad(), runs.precision():
            features = backbone(batch.inputs)
        _last_tensor(features).requires_grad_()
        if runs.dense is not None:
            with runs.precision():
                runs.dense.neck_and_head([*features], batch.samples, dry_run=True)
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
