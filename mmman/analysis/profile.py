"""The costs that :mod:`mmman.partition.memory` plans with, from the model of a config.

Nothing runs at the asked size. Backbone, local heads, and neck with head and loss run forward and backward by their own code on
two small batches, and every tensor of theirs is extrapolated to the asked one, linear in its pixels.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from mmman.analysis.memory import LiveBytes
from mmman.analysis.trace import Extrapolation, Trace, linear
from mmman.analysis.trial import build_trial, random_batch
from mmman.errors import MisuseError
from mmman.local import delocalize_, localize_
from mmman.local.heads.base import LocalHead
from mmman.local.heads.det import DetLocalHead
from mmman.partition import Chain, chain_of
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
        MisuseError: The backbone isn't localised, or ``local_head`` isn't set.
    """
    cfg = end_to_end(cfg)
    model, optim_wrapper = build_trial(cfg, height, width)
    chain = chain_of(model.backbone)
    sizes = _small_batches(chain, height, width)
    measure = _Measure(model, optim_wrapper, [_batch(model, cfg.default_scope, *size) for size in sizes])
    pixels = (*(b * h * w for b, h, w in sizes), batch * height * width)
    state, update = _optimizer_bytes(cfg.optim_wrapper.optimizer)
    options = {k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'backbone', 'num_blocks', 'pretrained')}

    units = _unit_costs(measure, chain, pixels)
    heads = _Heads(measure, chain, options, pixels, state)
    largest = max(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    step = StepCost(
        base=_static_bytes(model, state) + linear(tuple(map(_held_bytes, measure.batches)), pixels),
        units=units,
        task=_task_cost(measure, chain, pixels),
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


FOLLOWING = 3
"""Of how many units that follow what a head sees it makes a difference that they are there."""

Run = Callable[['_Batch', 'Trace | _Flops'], None]
"""Runs a part of the model on a batch, and records from where on and until where what counts."""


@dataclass(frozen=True)
class _Batch:
    data: dict
    inputs: Tensor
    samples: list


@dataclass(frozen=True)
class _Measure:
    """A model in one block, and the two small batches to run parts of it on."""

    model: BaseModel
    optim_wrapper: OptimWrapper
    batches: list[_Batch]

    def precision(self) -> AbstractContextManager:
        dtype = getattr(self.optim_wrapper, 'dtype', None)
        return autocast(dtype=dtype) if dtype else nullcontext()

    def extrapolate(self, run: Run, pixels: tuple[int, int, int], *held: object) -> Extrapolation:
        traces = []
        for batch in self.batches:
            with Trace(self.model, *held, batch.data, batch.inputs, batch.samples) as trace:
                run(batch, trace)
            traces.append(trace)
        return Extrapolation(*traces, pixels)

    def flops(self, run: Run, pixels: tuple[int, int, int]) -> dict[Hashable, int]:
        """FLOPs until each mark."""
        with FlopCounterMode(display=False) as counter:
            record = _Flops(counter)
            run(self.batches[0], record)
        return {name: flops * pixels[2] // pixels[0] for name, flops in record.marks.items()}


class _Flops:
    """What a :class:`Trace` is for bytes: FLOPs from :meth:`begin` to every mark."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self.numbers: dict[Hashable, int] = {}

    def begin(self) -> None:
        self._before = self._counter.get_total_flops()
        self.marks: dict[Hashable, int] = {'start': 0}

    def mark(self, name: Hashable) -> None:
        self.marks.setdefault(name, self._counter.get_total_flops() - self._before)


def _small_batches(chain: Chain, height: int, width: int) -> list[tuple[int, int, int]]:
    """Images, height and width of two batches: of small images, or for units that see all tokens, another number of them."""
    attends_everywhere = chain.extra_tokens or (chain.units[-1].stage == 0 and not chain.takes_grid)
    if height * width <= 256 * 256 or attends_everywhere:
        return [(2, height, width), (4, height, width)]
    side = 224 if chain.takes_grid else 128  # whole windows of 7 at stride 32
    return [(2, side, side), (2, side, 2 * side)]


def _batch(model: BaseModel, scope: str, size: int, height: int, width: int) -> _Batch:
    data = random_batch(model, scope, size, height, width)
    side = min(height, width)
    if scope == 'mmdet' and height != width:  # the objects of the smaller images, so that losses run alike
        smaller = random_batch(model, scope, size, side, side)['data_samples']
        for sample, other in zip(data['data_samples'], smaller, strict=True):
            sample.gt_instances = other.gt_instances
    if getattr(model.data_preprocessor, 'size', None) is not None:  # which a segmentor's pads to
        model.data_preprocessor.size = (height, width)
    batch = model.data_preprocessor(copy.deepcopy(data), True)
    return _Batch(data, batch['inputs'], batch['data_samples'])


def _unit_costs(measure: _Measure, chain: Chain, pixels: tuple[int, int, int]) -> tuple[UnitCost, ...]:
    backbone, count = measure.model.backbone, len(chain.units)

    def run(batch: _Batch, record: Trace | _Flops) -> None:
        measure.model.zero_grad()
        record.begin()
        last: list[Tensor] = []

        def behind(i: int, output: Tensor) -> None:
            record.mark(('forward', i))
            record.numbers[i] = output.untyped_storage().nbytes()
            if output.requires_grad:
                output.register_hook(lambda _: record.mark(('gradient', i)))
            if i == count - 1:
                last.append(output)

        with _outputs_told(backbone, chain, behind), measure.precision():
            backbone(batch.inputs)
        loss = (last.pop() * 1.0).sum()  # whose backward makes a gradient of the whole output
        record.mark('backward')
        loss.backward()
        record.mark('end')

    costs, flops = measure.extrapolate(run, pixels), measure.flops(run, pixels)
    units, later = [], 0
    for i in range(count - 1, -1, -1):
        unit = chain.units[i]
        before, end = ('forward', i - 1) if i else 'start', ('gradient', i - 1)
        kept, start = costs.alive(('forward', i)), 'backward' if i == count - 1 else ('gradient', i)
        gradient = _gradient_bytes(unit.parameters(backbone))
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
                flops=flops['forward', i] - flops[before] + flops_backward,
            )
        )
        later += gradient
    return tuple(reversed(units))


def _task_cost(measure: _Measure, chain: Chain, pixels: tuple[int, int, int]) -> HeadCost:
    model = measure.model
    backbone = model.backbone

    def run(batch: _Batch, record: Trace | _Flops) -> None:
        model.zero_grad()
        with torch.no_grad(), measure.precision():
            features = backbone(batch.inputs)
        _last_tensor(features).requires_grad_()
        record.begin()
        backbone.forward = lambda *_, **__: features
        try:
            with measure.precision():
                loss = model.parse_losses(model(inputs=batch.inputs, data_samples=batch.samples, mode='loss'))[0]
        finally:
            del backbone.forward
        loss.backward()
        record.mark('end')

    costs, flops = measure.extrapolate(run, pixels), measure.flops(run, pixels)
    in_units = {id(p) for unit in chain.units for p in unit.parameters(backbone)}
    own = [p for p in model.parameters() if id(p) not in in_units]
    return HeadCost(0, costs.peak('start', 'end'), _gradient_bytes(own), flops['end'])


class _Heads:
    """The cost of a local head after a unit, which is built and run when it is asked for, once for all that are alike.

    Heads are alike that see the same shapes and copy units of the same structure; heads of detectors also predict on the same
    levels. The layers that a head copies beyond that (AugLocal, ViT) are taken to be alike where as many follow.
    """

    def __init__(self, measure: _Measure, chain: Chain, options: dict, pixels: tuple[int, int, int], state: float) -> None:
        self.measure, self.chain, self.pixels, self.state = measure, chain, pixels, state
        self.options = {k: v for k, v in options.items() if k not in ('partition', 'loss_weight')}
        backbone = measure.model.backbone
        self._outputs: list[dict[int, Tensor]] = []
        for batch in measure.batches:
            outputs: dict[int, Tensor] = {}
            with _outputs_told(backbone, chain, outputs.__setitem__), torch.no_grad(), measure.precision():
                backbone(batch.inputs)
            self._outputs.append(outputs)
        self._stock = delocalize_(copy.deepcopy(backbone))
        self._known: dict[Hashable, HeadCost] = {}
        self.strides = self._strides()

    def __call__(self, cut: int, larger: int | None, is_smallest: bool) -> HeadCost:
        asked = (cut, larger, is_smallest)
        if asked not in self._known:
            kind = (self._kind(cut), larger, is_smallest)
            if kind not in self._known:
                head = self._build(cut, larger, is_smallest)
                alike = (kind[0], tuple(getattr(head, 'level_strides', ())))
                if alike not in self._known:
                    self._known[alike] = self._cost(head, cut)
                self._known[kind] = self._known[alike]
            self._known[asked] = self._known[kind]
        return self._known[asked]

    def _strides(self) -> tuple[int, ...]:
        """What a detector's head sees after each unit; all alike for other heads, which don't depend on it."""
        candidates = range(max(self.chain.taps))
        first = next(i for i, unit in enumerate(self.chain.units) if unit.is_trainable(self._stock))
        head = self._localised([first]).local.values()
        if not isinstance(next(iter(head)), DetLocalHead):
            return (1,) * len(self.chain.units)
        reads_next = next(iter(head)).transfer.copies != []
        side = self.measure.batches[0].inputs.shape[-1]
        outputs = self._outputs[0]
        strides = []
        for i in candidates:
            output = outputs[i + reads_next]
            tokens = output.shape[1] - self.chain.extra_tokens
            strides.append(round(side / (output.shape[-1] if output.dim() == 4 else tokens**0.5)))
        return (*strides, *(strides[-1:] * (len(self.chain.units) - len(strides))))

    def _kind(self, cut: int) -> Hashable:
        """The structure of the unit that is copied, the shapes in front of it and behind, and whether any units follow."""
        unit = self.chain.units[cut + 1].of(self.measure.model.backbone)
        modules = tuple((type(module), 'forward' in vars(module)) for module in unit.modules())
        tensors = tuple(tensor.shape for tensor in unit.state_dict().values())
        following = min(len(self.chain.units) - cut - 2, FOLLOWING)
        return modules, tensors, self._outputs[0][cut].shape, self._outputs[0][cut + 1].shape, following

    def _localised(self, cuts: list[int]) -> nn.Module:
        names = [self.chain.units[cut].name for cut in cuts]
        with _quiet():
            backbone = localize_(copy.deepcopy(self._stock), partition=names, **self.options)
        backbone.train()
        return backbone

    def _build(self, cut: int, larger: int | None, is_smallest: bool) -> LocalHead:
        cuts = {cut}
        if larger is not None:
            cuts.add(self.strides.index(larger))
        if not is_smallest:
            cuts.add(next(i for i, s in enumerate(self.strides) if s < self.strides[cut] and self._is_trainable(i)))
        backbone = self._localised(sorted(cuts))
        backbone.local.sync_modes(backbone)
        head = backbone.local[self.chain.units[cut].name.replace('.', '_')]
        head.session = SimpleNamespace(model=self.measure.model)
        return head

    def _is_trainable(self, i: int) -> bool:
        return self.chain.units[i].is_trainable(self._stock)

    def _cost(self, head: LocalHead, cut: int) -> HeadCost:
        model = self.measure.model
        outputs = {id(batch): own[cut] for batch, own in zip(self.measure.batches, self._outputs, strict=True)}

        def run(batch: _Batch, record: Trace | _Flops) -> None:
            x = outputs[id(batch)].detach().requires_grad_()
            head.zero_grad()
            record.begin()
            with self.measure.precision():
                loss, _ = model.parse_losses(head.loss(head.transferred(x, batch.inputs), batch.inputs, batch.samples))
            loss.backward()
            record.mark('end')

        costs = self.measure.extrapolate(run, self.pixels, head, self._outputs)
        flops = self.measure.flops(run, self.pixels)
        gradients = _gradient_bytes(head.parameters())
        peak = costs.peak('start', 'end')
        return HeadCost(_static_bytes(head, self.state), peak, gradients, flops['end'])


@contextmanager
def _outputs_told(backbone: nn.Module, chain: Chain, tell: Callable[[int, Tensor], None]):
    """While this context is open, ``tell(i, output)`` is called with the output of every unit i that runs."""

    def hook(i: int):
        return lambda module, args, output: tell(i, output)

    handles = [backbone.get_submodule(unit.output).register_forward_hook(hook(i)) for i, unit in enumerate(chain.units)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet():
    """Without the line that every localised backbone logs."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


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


def _static_bytes(module: nn.Module, state: float) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) + round(state * _gradient_bytes(module.parameters()))


def _gradient_bytes(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _held_bytes(batch: _Batch) -> int:
    return LiveBytes(batch.data, batch.inputs, batch.samples).current


def _last_tensor(features: object) -> Tensor:
    *_, last = (leaf for leaf in tree_flatten(features)[0] if isinstance(leaf, Tensor))
    return last
