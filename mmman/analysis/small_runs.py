"""Parts of a model run on two small batches: bytes that are extrapolated to a larger one, and FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmman.analysis.memory import LiveBytes
from mmman.analysis.trace import Extrapolation, Trace
from mmman.analysis.trial import random_batch
from mmman.partition import Chain

Run = Callable[['Batch', 'Trace | Flops'], None]
"""Runs a part of the model on a batch, and records from where on and until where what counts."""


@dataclass(frozen=True)
class Batch:
    """A batch as the loader gives it, and as the model gets it."""

    data: dict
    inputs: Tensor
    samples: list


@dataclass(frozen=True)
class SmallRuns:
    """A model in one block, and the two small batches to run parts of it on."""

    model: BaseModel
    optim_wrapper: OptimWrapper
    batches: list[Batch]

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
            record = Flops(counter)
            run(self.batches[0], record)
        return {name: flops * pixels[2] // pixels[0] for name, flops in record.marks.items()}


class Flops:
    """What a :class:`Trace` is for bytes: FLOPs from :meth:`begin` to every mark."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self.numbers: dict[Hashable, int] = {}

    def begin(self) -> None:
        self._before = self._counter.get_total_flops()
        self.marks: dict[Hashable, int] = {'start': 0}

    def mark(self, name: Hashable) -> None:
        self.marks.setdefault(name, self._counter.get_total_flops() - self._before)


def small_batches(chain: Chain, height: int, width: int) -> list[tuple[int, int, int]]:
    """Images, height and width of two batches: of small images, or for units that see all tokens, another number of them."""
    attends_everywhere = chain.extra_tokens or (chain.units[-1].stage == 0 and not chain.takes_grid)
    if height * width <= 256 * 256 or attends_everywhere:
        return [(2, height, width), (4, height, width)]
    side = 224 if chain.takes_grid else 128  # whole windows of 7 at stride 32
    return [(2, side, side), (2, side, 2 * side)]


def random_small_batch(model: BaseModel, scope: str, size: int, height: int, width: int) -> Batch:
    """``size`` random images, through the model's data preprocessor; both small batches of detectors have the same objects."""
    data = random_batch(model, scope, size, height, width)
    side = min(height, width)
    if scope == 'mmdet' and height != width:  # the objects of the smaller images, so that losses run alike
        smaller = random_batch(model, scope, size, side, side)['data_samples']
        for sample, other in zip(data['data_samples'], smaller, strict=True):
            sample.gt_instances = other.gt_instances
    if getattr(model.data_preprocessor, 'size', None) is not None:  # which a segmentor's pads to
        model.data_preprocessor.size = (height, width)
    batch = model.data_preprocessor(copy.deepcopy(data), True)
    return Batch(data, batch['inputs'], batch['data_samples'])


@contextmanager
def outputs_told(backbone: nn.Module, chain: Chain, tell: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While this context is open, ``tell(i, output)`` is called with the output of every unit i that runs."""

    def hook(i: int):
        return lambda module, args, output: tell(i, output)

    handles = [backbone.get_submodule(unit.output).register_forward_hook(hook(i)) for i, unit in enumerate(chain.units)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def static_bytes(module: nn.Module, state: float) -> int:
    """Bytes of parameters, buffers and optimizer state, which is ``state`` times the trained parameters."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) + round(state * gradient_bytes(module.parameters()))


def gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the gradients that parameters get."""
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def held_bytes(batch: Batch) -> int:
    """Bytes of a batch, as the loader gives it and as the model gets it."""
    return LiveBytes(batch.data, batch.inputs, batch.samples).current
