"""The costs that :mod:`mmman.partition.memory` plans with, from the model of a config.

Nothing runs at the asked size. Backbone, local heads, and neck with head and loss run forward and backward by their own code on
two small batches, and every tensor of theirs is extrapolated to the asked one, linear in its pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmman.analysis.head_profile import HeadCosts
from mmman.analysis.memory import LiveBytes
from mmman.analysis.small_runs import (
    Batch,
    Flops,
    SmallRuns,
    gradient_bytes,
    held_bytes,
    outputs_told,
    random_small_batch,
    small_batches,
    static_bytes,
)
from mmman.analysis.trace import Trace, linear
from mmman.analysis.trial import build_trial
from mmman.errors import MisuseError
from mmman.local.chunks import replaced
from mmman.partition import Chain, chain_of
from mmman.partition.chain import STEM
from mmman.partition.memory import HeadCost, StepCost, UnitCost


@dataclass(frozen=True)
class Profile:
    """The costs of a config's training step.

    Attributes:
        step: The costs.
        names: The names of the backbone's units.
        config: The config, trained end to end: ``num_blocks=1``.
        shape: (B, C, H, W) of the batch.
    """

    step: StepCost
    names: tuple[str, ...]
    config: Config
    shape: tuple[int, int, int, int]


def profile_step(cfg: Config, batch: int, height: int, width: int) -> Profile:
    """The costs of a training step of a config's model, whatever its cuts are.

    Args:
        cfg: Of a model whose backbone is an ``mmman.LocalBackbone``. Its ``num_blocks`` and ``partition`` don't count.
        batch: Images.
        height, width: Pixels.

    Raises:
        MisuseError: The backbone isn't localised, or ``local_head`` isn't set; or parts run image by image.
    """
    cfg = end_to_end(cfg)
    recompute = cfg.model.backbone.get('recompute')
    if cfg.optim_wrapper.get('images_per_chunk') or (isinstance(recompute, (list, tuple)) and STEM in recompute):
        raise MisuseError(
            'what runs image by image is not predicted: plan without it (optim_wrapper.images_per_chunk=None, no stem in '
            'model.backbone.recompute); its peak will be lower'
        )
    model, optim_wrapper = build_trial(cfg, height, width)
    chain = chain_of(model.backbone)
    sizes = small_batches(chain, height, width)
    runs = SmallRuns(model, optim_wrapper, [random_small_batch(model, cfg.default_scope, *size) for size in sizes])
    pixels = (*(b * h * w for b, h, w in sizes), batch * height * width)
    state, update = _optimizer_bytes(cfg.optim_wrapper.optimizer)
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'backbone', 'num_blocks', 'pretrained')}

    units = _unit_costs(runs, chain, pixels)
    heads = HeadCosts(runs, chain, options, pixels, state)
    largest = max(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    step = StepCost(
        base=static_bytes(model, state) + linear(tuple(map(held_bytes, runs.batches)), pixels),
        units=units,
        task=_task_cost(runs, chain, pixels),
        head=heads,
        strides=heads.strides,
        first=next(i for i, unit in enumerate(chain.units) if unit.is_trainable(model.backbone)),
        update=round(update * largest),
    )
    return Profile(step, tuple(unit.name for unit in chain.units), cfg, (batch, 3, height, width))


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


def _unit_costs(runs: SmallRuns, chain: Chain, pixels: tuple[int, int, int]) -> tuple[UnitCost, ...]:
    backbone, count = runs.model.backbone, len(chain.units)

    def run(batch: Batch, record: Trace | Flops) -> None:
        runs.model.zero_grad()
        record.begin()
        last: list[Tensor] = []

        def behind(i: int, output: Tensor) -> None:
            record.mark(('forward', i))
            record.numbers[i] = output.untyped_storage().nbytes()
            if output.requires_grad:
                output.register_hook(lambda _: record.mark(('gradient', i)))
            if i == count - 1:
                last.append(output)

        with outputs_told(backbone, chain, behind), runs.precision():
            backbone(batch.inputs)
        loss = (last.pop() * 1.0).sum()  # whose backward makes a gradient of the whole output
        record.mark('backward')
        loss.backward()
        record.mark('end')

    costs, flops = runs.extrapolate(run, pixels), runs.flops(run, pixels)
    holds, read = _held_inputs(runs, chain), _outputs_read(runs)
    units, later = [], 0
    for i in range(count - 1, -1, -1):
        unit = chain.units[i]
        before, end = ('forward', i - 1) if i else 'start', ('gradient', i - 1)
        kept, start = costs.alive(('forward', i)), 'backward' if i == count - 1 else ('gradient', i)
        gradient = gradient_bytes(unit.parameters(backbone))
        if start not in flops:  # frozen
            backward, flops_backward = 0, 0
        else:
            end = end if end in flops else 'end'
            backward = max(0, costs.peak(start, end) - kept - later)
            flops_backward = flops[end] - flops[start]
        output = costs.number(i)
        taps = [element for element, tap in enumerate(chain.taps) if tap == i]
        units.append(
            UnitCost(
                kept=kept - costs.alive(before),
                forward=costs.peak(before, ('forward', i)) - costs.alive(before),
                backward=backward,
                output=output,
                tap=output * max((1 + (element in chain.norms) for element in taps), default=0),  # a norm's output too
                gradient=gradient,
                holds=holds[i],
                is_read=any(read[element] for element in taps),
                flops=flops['forward', i] - flops[before] + flops_backward,
            )
        )
        later += gradient
    return tuple(reversed(units))


def _held_inputs(runs: SmallRuns, chain: Chain) -> list[int]:
    """For every unit, the one in front of the stage that runs it: a stage that is called as a module gets its output."""
    backbone, called = runs.model.backbone, set()
    paths = [unit.output.split('.') for unit in chain.units]
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
    with replaced(model.backbone, 'forward', lambda *_, **__: features), runs.precision():
        return model.parse_losses(model(inputs=batch.inputs, data_samples=batch.samples, mode='loss'))[0]


def _task_cost(runs: SmallRuns, chain: Chain, pixels: tuple[int, int, int]) -> HeadCost:
    model = runs.model
    backbone = model.backbone

    def run(batch: Batch, record: Trace | Flops) -> None:
        model.zero_grad()
        with torch.no_grad(), runs.precision():
            features = backbone(batch.inputs)
        _last_tensor(features).requires_grad_()
        record.begin()
        _task_loss(runs, batch, features).backward()
        record.mark('end')

    costs, flops = runs.extrapolate(run, pixels), runs.flops(run, pixels)
    in_units = {id(p) for unit in chain.units for p in unit.parameters(backbone)}
    own = [p for p in model.parameters() if id(p) not in in_units]
    return HeadCost(0, costs.peak('start', 'end'), gradient_bytes(own), flops['end'])


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
