"""Predict what the ways to train a config in less memory cost."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mmengine.config import Config, ConfigDict

from mmman.analysis.dummy_model import build_dummy_model
from mmman.analysis.roofline import Device
from mmman.errors import CostError, PartitionError
from mmman.messages import one_line
from mmman.partition import chain_of, plan_blocks
from mmman.planning.choice import AS_IT_IS, END_TO_END, LOCAL, SAME, WITH_CP, Changes, FitRow, Limits
from mmman.planning.chunk_support import ChunkSupport, chunk_support
from mmman.planning.costs import HeadCost, MemoryPlan, RecomputeMode, StepCost, peak_of
from mmman.planning.local_plan import ChunkPlan, best_of, local_plan
from mmman.planning.profile import Profile, as_single_block, profile_end_to_end, profile_step
from mmman.registry import resolve_type

BLOCKS = (2, 3, 4)
"""Numbers of blocks K to predict, if none is asked for."""

MODE_NAMES = {RecomputeMode.SELECTIVE: 'recompute selectively', RecomputeMode.FULL: 'recompute'}


@dataclass(frozen=True)
class FitCase:
    """The config to fit.

    Attributes:
        localized: The config with an ``mmman.LocalBackbone`` and the recommended local head. Its number of blocks is ignored.
            Precision, if reduced, is bfloat16, which a CPU supports.
        stock: Options of the stock backbone that the user changes.
        local_wrapper: Options of the optim wrapper for local learning.
        batch: Images per step.
        height, width: Size of the images, pixels.
        images_per_chunk: Images per chunk of neck and head where the detector supports it. Default: that of the config; else
            with a device the number that suits the limits best, without one a quarter of the batch.
        is_localized: Whether the config itself has the ``mmman.LocalBackbone``.
        device: The GPU whose time is predicted. None: no time is.
    """

    localized: Config
    stock: dict[str, Any]
    local_wrapper: dict[str, Any]
    batch: int
    height: int
    width: int
    images_per_chunk: int | None = None
    is_localized: bool = False
    device: Device | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.height, self.width

    @property
    def is_detector(self) -> bool:
        return self.localized.default_scope == 'mmdet'

    @property
    def has_own_checkpointing(self) -> bool:
        """Whether the config already sets ``with_cp``."""
        return bool(self.localized.model.backbone.backbone.get('with_cp'))

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Numbers of images per chunk to choose from: powers of two if time on a device is planned, where each chunk costs."""
        asked = self.images_per_chunk or self.localized.optim_wrapper.get('images_per_chunk')
        if asked or self.device is None:
            return (asked or max(1, self.batch // 4),)
        return tuple(2**i for i in range(self.batch.bit_length()) if 2**i < self.batch) or (1,)


def predict_rows(
    case: FitCase,
    limits: Limits,
    blocks: Sequence[int] = BLOCKS,
    partition: str | Sequence[str] | None = None,
    report: Callable[[str, float], None] = lambda what, done: None,
) -> Iterator[FitRow]:
    """Predict what each way to train a config costs, lowest risk first: as it is, the same training, local learning.

    For a localised config these are other cuts, then end-to-end training.

    Args:
        case: The config.
        limits: What is asked for. Cuts and recomputed units are planned for it.
        blocks: Numbers of blocks K.
        partition: ``'stage'``, ``'uniform'``, or names of the last units of all blocks but one. Default: planned cuts.
        report: Called with what is being computed, and about what share of the work is done.

    Raises:
        LocalLearningError: The model can't be profiled.
    """
    cfg = _without_checkpointing(case.localized)
    chunks = chunk_support(cfg, case.height, case.width) if case.is_detector else ChunkSupport(SAME)
    sizes = case.chunk_sizes if case.is_detector and not chunks.obstacle else ()
    one_chunk = (case.batch,) if sizes and chunks.trains == SAME else ()
    if sizes:
        cfg.optim_wrapper.images_per_chunk = sizes[0]
    counts = [len(partition) + 1] if isinstance(partition, (list, tuple)) else blocks
    last_units = {} if partition is None else {count: _last_units(cfg, case, count, partition) for count in counts}
    report('the config as it is, and what recomputing costs', 0.0)
    profile = profile_step(cfg, *case.shape, True, case.device, (*sizes[1:], *one_chunk))
    base = profile.at_once
    if case.has_own_checkpointing:
        base = profile_end_to_end(case.localized, *case.shape, case.device)
    shipped = _own_row(case) if case.is_localized else _row(AS_IT_IS, SAME, Changes(case.stock), base, MemoryPlan())
    yield shipped
    report(WITH_CP, 0.2)
    exact = _exact_rows(case, profile, chunks, limits, shipped)
    if not case.is_localized:
        yield from sorted(exact, key=_risk_and_work)
        if case.localized.optim_wrapper.get('dtype') is None:
            report('mixed precision', 0.25)
            yield _mixed_precision_row(case)
    profile = _reporting(profile, report)
    sizes = sizes if case.device is None else (*sizes, *one_chunk)
    before_outputs = None
    if case.is_detector and partition is None and 2 in counts:
        before_outputs = _plan_before_outputs(profile, sizes, limits, shipped)
    if before_outputs is not None:
        row = _local_row(case, profile, before_outputs)
        yield replace(row, name=row.name.replace('2 blocks', '2 blocks, all outputs in the last', 1))
    for count in counts:
        try:
            planned = local_plan(profile, sizes, count, last_units.get(count), limits, shipped)
        except CostError as error:
            yield FitRow(f'{count} blocks', LOCAL, Changes(), note=one_line(str(error), 200), is_available=False)
            continue
        if before_outputs is None or planned.plan != before_outputs.plan:
            yield _local_row(case, profile, planned)
    if case.is_localized:
        changes = Changes(case.stock, _options(case, profile, MemoryPlan()), _at_once(case))
        whole = _row('one block', SAME, changes, base, MemoryPlan())
        for row in sorted([whole, *exact], key=_risk_and_work):
            yield replace(row, trains=END_TO_END if row.trains == SAME else f'{END_TO_END}, {row.trains}')


def _without_checkpointing(cfg: Config) -> Config:
    """Copy a config without the stock ``with_cp``, in place of which units are recomputed."""
    cfg = copy.deepcopy(cfg)
    if cfg.model.backbone.backbone.get('with_cp'):
        cfg.model.backbone.backbone.with_cp = False
    return cfg


def _risk_and_work(row: FitRow) -> tuple[bool, int, int]:
    return row.trains != SAME, row.time or row.flops, row.operators


def _own_row(case: FitCase) -> FitRow:
    """A localised config as it is."""
    profile = profile_step(case.localized, *case.shape, device=case.device)
    model, _ = build_dummy_model(copy.deepcopy(case.localized), case.height, case.width)
    blocks = model.backbone.local.plan.blocks
    plan = MemoryPlan(tuple(profile.names.index(block[-1].name) for block in blocks[:-1]))
    return _row(AS_IT_IS, SAME, Changes(case.stock), profile.step, plan)


def _reporting(profile: Profile, report: Callable[[str, float], None]) -> Profile:
    """The profile, which reports each local head whose cost is requested for the first time."""
    step, known = profile.step, set()
    expected = len(step.candidates) * len(step.choices)

    def head(cut: int, *options: Any) -> HeadCost:
        if (cut, *options) not in known:
            known.add((cut, *options))
            report(f'local head after {profile.names[cut]}', 0.3 + 0.7 * min(1.0, len(known) / expected))
        return step.head(cut, *options)

    return replace(profile, step=replace(step, head=head))


def _row(name: str, trains: str, changes: Changes, step: StepCost, plan: MemoryPlan) -> FitRow:
    time = step.timed().total(plan) if step.time else 0
    return FitRow(name, trains, changes, peak_of(step, plan), step.total(plan), step.operators(plan), time)


def _exact_rows(case: FitCase, profile: Profile, chunks: ChunkSupport, limits: Limits, base: FitRow) -> Iterator[FitRow]:
    """Ways to train the same: recompute, the stock ``with_cp``, chunks, and chunks with recompute."""
    stock = case.stock | ({'with_cp': False} if case.has_own_checkpointing else {})
    wrapper = {key: value for key, value in case.local_wrapper.items() if key != 'update'}
    modes = {'': RecomputeMode.NONE, **{name: mode for mode, name in MODE_NAMES.items()}}
    for name, mode in modes.items():
        plan = MemoryPlan((), (mode,))
        changes = Changes(stock, _options(case, profile, plan), _at_once(case))
        if name:
            yield _row(name, SAME, changes, profile.at_once, plan)
        if not profile.tasks:
            continue
        several = [ChunkPlan(images, profile.in_chunks_of(images), plan) for images in case.chunk_sizes]
        chosen = best_of(several, limits, base)
        changes = replace(changes, optim_wrapper=wrapper | {'images_per_chunk': chosen.images})
        yield _row(f'{name}, {chosen}'.removeprefix(', '), chunks.trains, changes, chosen.step, plan)
        if not name and case.batch in profile.tasks and case.batch not in case.chunk_sizes:
            changes = replace(changes, optim_wrapper=wrapper | {'images_per_chunk': case.batch})
            yield _row('all images in one chunk', SAME, changes, profile.in_chunks_of(case.batch), plan)
    if case.is_detector and not profile.tasks:
        yield FitRow('images in chunks', SAME, Changes(), note=chunks.obstacle, is_available=False)
    if not case.has_own_checkpointing and supports_option(case.localized.model.backbone.backbone, 'with_cp'):
        cfg = copy.deepcopy(case.localized)
        cfg.model.backbone.backbone.with_cp = True
        step = profile_end_to_end(cfg, *case.shape, case.device)
        local = _options(case, profile, MemoryPlan()) if case.is_localized else {}
        changes = Changes(case.stock | {'with_cp': True}, local, _at_once(case))
        yield _row(WITH_CP, SAME, changes, step, MemoryPlan())


def _mixed_precision_row(case: FitCase) -> FitRow:
    """Mixed precision: float16 for detectors, because mmcv's operators have no bfloat16; bfloat16 for the others."""
    cfg = copy.deepcopy(case.localized)
    options = {'dtype': 'float16', 'loss_scale': 'dynamic'} if case.is_detector else {'dtype': 'bfloat16'}
    name, changes = f'mixed precision ({options["dtype"]})', Changes(case.stock, {}, {'type': 'AmpOptimWrapper', **options})
    trains = 'not the same numbers'
    cfg.optim_wrapper.dtype = 'bfloat16'
    try:
        step = profile_end_to_end(cfg, *case.shape, case.device)
    except RuntimeError as error:  # operators of mmcv have no half precision on a CPU
        return FitRow(name, trains, changes, note=f'not predicted on a CPU: {one_line(str(error), 80)}')
    return _row(name, trains, changes, step, MemoryPlan())


def _plan_before_outputs(profile: Profile, sizes: Sequence[int], limits: Limits, base: FitRow) -> ChunkPlan | None:
    """Two blocks, of which the second makes all outputs of the backbone, so that the model's own loss trains them.

    None if no cut leaves all outputs to the second block, or no such plan is within the limits of work.
    """
    step = profile.step.before_outputs()
    if not step.candidates or step.candidates == profile.step.candidates:
        return None
    with suppress(CostError):
        return local_plan(replace(profile, step=step), sizes, 2, None, limits, base)
    return None


def _local_row(case: FitCase, profile: Profile, planned: ChunkPlan) -> FitRow:
    wrapper, plan = dict(case.local_wrapper), planned.plan
    stock = case.stock | ({'with_cp': False} if case.has_own_checkpointing else {})
    name = f'{len(plan.modes)} blocks, cut after {", ".join(profile.names[cut] for cut in plan.cuts)}'
    if any(plan.modes):
        name += ', recompute'
    if planned.images is not None:
        wrapper['images_per_chunk'] = planned.images
        name += f', {planned}'
    return _row(name, LOCAL, Changes(stock, _options(case, profile, plan), wrapper), planned.step, plan)


def _at_once(case: FitCase) -> dict[str, Any]:
    """Options of the optim wrapper for all images at once."""
    return {'images_per_chunk': None} if case.localized.optim_wrapper.get('images_per_chunk') else {}


def _options(case: FitCase, profile: Profile, plan: MemoryPlan) -> dict[str, Any]:
    """A plan as options of ``mmman.LocalBackbone``; for a localised config all of them, as it may set others."""
    options = {key: value or False for key, value in profile.options(plan).items()}
    if case.is_localized:
        return {'partition': 'stage', **options}
    return {key: value for key, value in options.items() if value}


def _last_units(cfg: Config, case: FitCase, blocks: int, partition: str | Sequence[str]) -> list[str]:
    """Names of the units that ``partition`` cuts after."""
    model, _ = build_dummy_model(as_single_block(cfg), case.height, case.width)
    chain = chain_of(model.backbone)
    trainable = [unit.is_trainable(model.backbone) for unit in chain.units]
    try:
        plan = plan_blocks(chain, trainable, blocks, partition)
    except PartitionError as error:
        raise PartitionError(f'--cuts: {error}') from None
    return [block[-1].name for block in plan.blocks[:-1]]


def supports_option(backbone: ConfigDict, option: str) -> bool:
    """Whether the class that the config of a stock backbone names has an option."""
    kind = resolve_type(backbone.type)
    return any(option in inspect.signature(cls.__init__).parameters for cls in kind.__mro__[:-1])
