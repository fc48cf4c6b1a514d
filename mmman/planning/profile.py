"""Measure the costs that :mod:`mmman.planning.costs` needs on the model of a config.

Nothing runs at the requested size, unless the backbone attends to all positions. The backbone, the local heads, and neck with
head and loss run forward and backward on two small probe batches. The size of every tensor is extrapolated to the requested
batch, linearly in the number of pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS
from torch import nn

from mmman.analysis.dummy_model import image_channels
from mmman.analysis.memory import LiveBytes
from mmman.analysis.roofline import Device
from mmman.analysis.trace import linear
from mmman.errors import ConfigError
from mmman.memory.model_loss import chunked_loss
from mmman.memory.stem import stem_paths
from mmman.partition.chain import STEM
from mmman.planning.costs import HeadCost, MemoryPlan, Peak, RecomputeMode, StepCost, UnitCost, peak_of
from mmman.planning.head_profile import HeadCosts
from mmman.planning.probe_runs import ProbeRuns, held_bytes, static_bytes
from mmman.planning.task_cost import task_cost
from mmman.planning.unit_costs import unit_costs

Options = dict[str, Sequence[str] | bool]
"""The options of ``mmman.LocalBackbone`` that select what is recomputed."""
RECOMPUTE = ('recompute', 'selective_recompute')


@dataclass(frozen=True)
class Profile:
    """The costs of a config's training step.

    Attributes:
        step: The costs.
        at_once: The costs without chunks. Without a recompute mode it is end-to-end training as the stock config does it.
        tasks: The cost of neck, head and loss by images per chunk.
        names: Names of the backbone's units.
        mode_options: The options of ``mmman.LocalBackbone`` for each recompute mode.
        config: The config with ``num_blocks=1``, which trains end to end.
        shape: (B, C, H, W) of the batch.
    """

    step: StepCost
    at_once: StepCost
    tasks: Mapping[int, HeadCost]
    names: tuple[str, ...]
    mode_options: Mapping[RecomputeMode, Options]
    config: Config
    shape: tuple[int, int, int, int]

    @property
    def whole(self) -> Peak:
        """The peak of end-to-end training without recomputation and without chunks."""
        return peak_of(self.at_once, MemoryPlan())

    def in_chunks_of(self, images: int | None) -> StepCost:
        """The costs with neck, head and loss on so many images at a time. None: as :attr:`step` has them."""
        return self.step if images is None else replace(self.step, task=self.tasks[images])

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
    cfg: Config,
    batch: int,
    height: int,
    width: int,
    may_recompute: bool = False,
    device: Device | None = None,
    chunk_sizes: Sequence[int] = (),
) -> Profile:
    """Measure the costs of a training step of a config's model, for any cuts.

    Args:
        cfg: Config whose ``model.backbone`` is an ``mmman.LocalBackbone``. Its ``num_blocks`` and ``partition`` are ignored.
        batch: Images per step.
        height, width: Size of the images, pixels.
        may_recompute: Whether plans choose a recompute mode for each block. If so, the config's recompute options are ignored.
        device: The GPU whose time is predicted, if any.
        chunk_sizes: Other numbers of images per chunk than the config's own whose cost is measured, if the config sets one.

    Raises:
        ConfigError: The backbone isn't an ``mmman.LocalBackbone``; it has no ``local_head``; or the config sets
            ``images_per_chunk`` and the dense heads don't support it.
    """
    cfg, asked = as_single_block(cfg), (batch, height, width, device)
    own = {key: cfg.model.backbone.pop(key) for key in RECOMPUTE if key in cfg.model.backbone}
    small = ProbeRuns.of(without_recompute_and_chunks(cfg), *asked)
    plain = unit_costs(small), task_cost(small)
    mode_options = _mode_options(small) if may_recompute else {RecomputeMode.NONE: own}
    if not may_recompute:
        cfg.model.backbone.update(own)
    several = [ProbeRuns.of(_with(cfg, options), *asked) if options else None for options in mode_options.values()]
    units = [plain[0] if runs is None else unit_costs(runs) for runs in several]
    own_size = cfg.optim_wrapper.get('images_per_chunk')
    in_chunks = own_size is not None
    runs = several[-1] or (ProbeRuns.of(cfg, *asked) if in_chunks else small)
    sizes = dict.fromkeys((own_size, *chunk_sizes)) if in_chunks else ()
    tasks = {size: task_cost(replace(runs, chunked=chunked_loss(runs.model, size, lambda loss: loss))) for size in sizes}
    task = tasks[own_size] if in_chunks else plain[1]
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'backbone', 'num_blocks', 'pretrained')}
    optimizer = cfg.optim_wrapper.optimizer
    heads = HeadCosts(runs, options, _optimizer_bytes(optimizer)[0], mode_options)
    at_once = _step_cost(small, optimizer, *plain, heads, tuple(units[1:]))
    step = replace(at_once, units=units[0], task=task, in_chunks=in_chunks)
    names = tuple(unit.name for unit in runs.chain.units)
    return Profile(step, at_once, tasks, names, mode_options, cfg, (batch, image_channels(small.model), height, width))


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
    return _step_cost(runs, cfg.optim_wrapper.optimizer, unit_costs(runs), task_cost(runs))


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
