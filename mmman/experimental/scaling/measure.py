"""Measure the profile of a localised model: time real training steps at the boundaries of its blocks."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmman.engine import LocalLearningOptimWrapper
from mmman.errors import ScalingError
from mmman.experimental.scaling.profile import BlockCost, StageProfile
from mmman.local import delocalize_, localize_
from mmman.local.blocks import LocalBlocks
from mmman.partition import chain_of

EMA_MOMENTUM = 0.995
WARMUP = 2
"""Number of first steps of each kind that are discarded."""


def seconds() -> float:
    """Wall-clock time in seconds. If there is a GPU, it is synchronised first."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class ProfileMeter:
    """Alternate local and end-to-end steps on one batch, and take the median time of every part.

    Args:
        model: A localised model in training mode. The momentum copies of its local heads are initialised.
        optim_wrapper: Its optim wrapper. The end-to-end copy gets an optimizer of the same class and defaults.
        data: A batch as the data loader returns it.
        clock: Returns a number that never decreases. Default: seconds.

    Raises:
        ScalingError: The model has no local heads.
    """

    def __init__(
        self,
        model: BaseModel,
        optim_wrapper: LocalLearningOptimWrapper,
        data: dict,
        clock: Callable[[], float] = seconds,
    ) -> None:
        local = getattr(model.backbone, 'local', None)
        if not isinstance(local, LocalBlocks) or not len(local):
            raise ScalingError('no blocks to measure: the model needs a mmman.LocalBackbone with num_blocks of at least 2')
        self.data, self.clock = data, clock
        self.model, self.optim_wrapper = model, optim_wrapper
        self.whole, self.whole_wrapper = single_block_copy(model, optim_wrapper)
        self._outputs = [block[-1].output for block in local.plan.blocks[:-1]]
        self._laps: list[tuple[list[float], list[float]]] = []

    def lap(self) -> None:
        """Time one local and one end-to-end step."""
        local = local_lap(self.model, self.optim_wrapper, self.data, self.clock)
        self._laps.append((local, whole_lap(self.whole, self.whole_wrapper, self.data, self._outputs, self.clock)))

    def profile(self, warmup: int = WARMUP) -> StageProfile:
        """Profile from the medians of all laps but the first ``warmup``."""
        local, whole = (_lap_medians(laps) for laps in zip(*self._laps[warmup:], strict=True))
        sizes = _block_sizes(self.model, self.data)
        own = [{'gradients': size['gradients'], 'head_gradients': 0} for size in sizes]
        own[-1]['head_gradients'] = sizes[-1]['head_gradients']
        samples = self.data['data_samples']
        return StageProfile(
            batch=len(samples),
            blocks=_blocks(local, sizes),
            end_to_end=_blocks(whole, own),
            images=self.model.data_preprocessor(self.data, True)['inputs'].nbytes,
            labels=sum(tensor.nbytes for sample in samples for tensor in _sample_tensors(sample)),
        )


def single_block_copy(model: BaseModel, optim_wrapper: LocalLearningOptimWrapper) -> tuple[BaseModel, OptimWrapper]:
    """Copy a localised model into one with a single block, with an optimizer of the same class and defaults."""
    whole = copy.deepcopy(model)
    localize_(delocalize_(whole.backbone), num_blocks=1)
    optimizer = optimizer_like(optim_wrapper.optimizer, whole)
    return whole, LocalLearningOptimWrapper(optimizer, dtype=optim_wrapper.dtype)


def optimizer_like(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Create an optimizer of the same class and defaults over the parameters of ``model``."""
    taken = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(model.parameters(), **{k: v for k, v in optimizer.defaults.items() if k in taken})


def local_lap(
    model: BaseModel, optim_wrapper: LocalLearningOptimWrapper, data: dict, clock: Callable[[], float]
) -> list[float]:
    """Time one local step. Returns 3K + 1 clock differences: (forward, head, backward) of every block, then the update."""
    marks = [clock()]

    def mark(*_) -> None:
        marks.append(clock())

    backbone = model.backbone
    with ExitStack() as stack:
        for block in backbone.local.plan.blocks[:-1]:
            module = backbone.get_submodule(block[-1].output)
            stack.enter_context(_removed(module.register_forward_hook(mark, prepend=True)))
        stack.enter_context(_removed(backbone.register_forward_hook(mark)))
        for name in ('local_backward', 'backward'):
            stack.enter_context(_marked(optim_wrapper, name, mark))
        model.train_step(data, optim_wrapper)
    for head in backbone.local.values():
        head.transfer.ema_update_(head.source.of(backbone), EMA_MOMENTUM)
    mark()
    return _laps(marks, 3 * len(backbone.local) + 5)


def whole_lap(
    model: BaseModel, optim_wrapper: OptimWrapper, data: dict, outputs: list[str], clock: Callable[[], float]
) -> list[float]:
    """Time one end-to-end step; returns what :func:`local_lap` does. ``outputs``: modules that end the first K-1 blocks."""
    marks = [clock()]
    crossed: list[float] = []

    def mark(*_) -> None:
        marks.append(clock())

    def at_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        mark()
        output.register_hook(lambda gradient: crossed.append(clock()))

    backbone = model.backbone
    with ExitStack() as stack:
        for path in outputs:
            stack.enter_context(_removed(backbone.get_submodule(path).register_forward_hook(at_output)))
        stack.enter_context(_removed(backbone.register_forward_hook(mark)))
        stack.enter_context(_marked(optim_wrapper, 'backward', mark))
        model.train_step(data, optim_wrapper)
    mark()
    count = len(outputs) + 1
    laps = _laps(marks, count + 4)
    forward, head, update = laps[:count], laps[count], laps[-1]
    begin, end = marks[-3:-1]
    if len(crossed) != len(outputs):
        raise ScalingError(f'the backward pass crossed {len(crossed)} of {len(outputs)} boundaries: blocks must form a chain')
    backward = [later - earlier for earlier, later in pairwise([begin, *crossed, end])][::-1]
    heads = [0.0] * len(outputs) + [head]
    return [part for parts in zip(forward, heads, backward, strict=True) for part in parts] + [update]


def _laps(marks: list[float], expected: int) -> list[float]:
    if len(marks) != expected:
        raise ScalingError(f'a step passed {len(marks)} marks instead of {expected}: the blocks must form a chain')
    return [later - earlier for earlier, later in pairwise(marks)]


def _lap_medians(laps: Iterable[list[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*laps, strict=True)]


def _blocks(laps: list[float], sizes: list[dict]) -> tuple[BlockCost, ...]:
    """Build blocks from 3K + 1 laps. The update time is divided in proportion to the bytes of gradients."""
    *parts, update = laps
    total = sum(size['gradients'] + size['head_gradients'] for size in sizes)
    return tuple(
        BlockCost(*parts[3 * j : 3 * j + 3], update=update * (size['gradients'] + size['head_gradients']) / total, **size)
        for j, size in enumerate(sizes)
    )


@torch.no_grad()
def _block_sizes(model: BaseModel, data: dict) -> list[dict]:
    """Sizes of every block in bytes, and ``needs_images``, by field name of :class:`BlockCost`."""
    backbone, local = model.backbone, model.backbone.local
    chain = chain_of(backbone)
    made: dict[str, int] = {}
    with ExitStack() as stack:
        for unit in chain.units:

            def record(module: nn.Module, args: tuple, output: Tensor, name: str = unit.name) -> None:
                made[name] = output.nbytes

            stack.enter_context(_removed(backbone.get_submodule(unit.output).register_forward_hook(record)))
        backbone(model.data_preprocessor(data, True)['inputs'])
    output_units = {chain.units[tap].name for tap in chain.out_units}
    heads = [*local.values(), None]
    inside = {id(parameter) for parameter in backbone.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    sizes = []
    for j, (block, head) in enumerate(zip(local.plan.blocks, heads, strict=True)):
        taps = [unit.name for unit in block if unit.name in output_units]
        sizes.append(
            {
                'gradients': _trained(p for unit in block for p in unit.parameters(backbone)),
                'head_gradients': _trained(head.parameters() if head else outside),
                'features': sum(made[name] for name in {*taps, block[-1].name}) if head else 0,
                'taps': sum(made[name] for name in taps) if head else 0,
                'first_unit': _state(block[0].of(backbone)) if j else 0,
                'needs_images': head is not None and head.uses_images,
            }
        )
    return sizes


def _state(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values() if tensor.is_floating_point())


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters if p.requires_grad)


def _sample_tensors(sample: object) -> list[Tensor]:
    if hasattr(sample, 'all_items'):
        return [tensor for _, value in sample.all_items() for tensor in _sample_tensors(value)]
    return [leaf for leaf in tree_flatten(sample)[0] if isinstance(leaf, Tensor)]


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _marked(optim_wrapper: OptimWrapper, name: str, mark: Callable[[], None]) -> Iterator[None]:
    """Call ``mark`` before and after every call of a method inside this context."""
    method = getattr(optim_wrapper, name)

    def marked(*args, **kwargs):
        mark()
        result = method(*args, **kwargs)
        mark()
        return result

    setattr(optim_wrapper, name, marked)
    try:
        yield
    finally:
        delattr(optim_wrapper, name)
