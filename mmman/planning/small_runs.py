"""Parts of a model run on two small batches: bytes and FLOPs that are extrapolated to a larger one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import Tensor, nn

from mmman.analysis.memory import LiveBytes
from mmman.analysis.trace import Extrapolation, Trace
from mmman.analysis.trial import build_trial, random_batch
from mmman.memory.detection.dense_loss import DenseLoss
from mmman.partition import Chain, chain_of
from mmman.partition.chain import STEM

Run = Callable[['Batch', Trace], None]
"""Runs a part of the model on a batch, and tells the trace from where on it counts, and its marks."""


@dataclass(frozen=True)
class Batch:
    """A batch as the loader gives it, and as the model gets it."""

    data: dict
    inputs: Tensor
    samples: list


@dataclass(frozen=True)
class SmallRuns:
    """A model in one block, and the two small batches to run parts of it on.

    Attributes:
        chain: The units of its backbone.
        batches: The two batches.
        pixels: Pixels of the two and of the batch asked for.
        dense: What runs dense heads on a few images at a time, where the config asks for that.
    """

    model: BaseModel
    optim_wrapper: OptimWrapper
    chain: Chain
    batches: list[Batch]
    pixels: tuple[int, int, int]
    dense: DenseLoss | None

    @classmethod
    def of(cls, cfg: Config, batch: int, height: int, width: int) -> SmallRuns:
        """For a config in one block, and so many images of so many pixels."""
        model, optim_wrapper = build_trial(copy.deepcopy(cfg), height, width)
        chain, chunk = chain_of(model.backbone), getattr(optim_wrapper, 'images_per_chunk', None)
        recompute = cfg.model.backbone.recompute if 'recompute' in cfg.model.backbone else False
        by_image = chunk is not None or (not isinstance(recompute, bool) and STEM in recompute)
        sizes = small_batches(chain, height, width, batch if by_image else None, cfg.default_scope)
        batches = [random_small_batch(model, cfg.default_scope, *size) for size in sizes]
        pixels = (*(b * h * w for b, h, w in sizes), batch * height * width)
        dense = None if chunk is None else DenseLoss(model, chunk, lambda loss: loss)
        return cls(model, optim_wrapper, chain, batches, pixels, dense)

    def precision(self) -> AbstractContextManager:
        dtype = getattr(self.optim_wrapper, 'dtype', None)
        return autocast(dtype=dtype) if dtype else nullcontext()

    def extrapolate(self, run: Run, *held: object) -> Extrapolation:
        traces = []
        for batch in self.batches:
            with Trace(self.model, *held, batch.data, batch.inputs, batch.samples) as trace:
                run(batch, trace)
            traces.append(trace)
        return Extrapolation(*traces, self.pixels)


def small_batches(chain: Chain, height: int, width: int, images: int | None, scope: str) -> list[tuple[int, int, int]]:
    """Images, height and width of two batches: of small images, or for units that see all tokens, another number of them.

    Args:
        chain: The backbone's units.
        height, width: Of the images asked for.
        images: How many there are, where some parts run on a few at a time: their tensors don't grow as the number does.
        scope: The library; a detector's pyramid needs larger images.
    """
    attends_everywhere = chain.extra_tokens or (chain.units[-1].stage == 0 and not chain.takes_grid)
    if images is None and (height * width <= 256 * 256 or attends_everywhere):
        return [(2, height, width), (4, height, width)]
    side = 224 if chain.takes_grid else 128 if scope == 'mmdet' or images is None else 64  # whole windows of 7 at stride 32
    side, images = min(side, height, width), images or 2
    return [(images, side, side), (images, side, 2 * side)]


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
