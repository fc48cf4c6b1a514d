"""Run parts of a model on two small batches, and extrapolate bytes and FLOPs to a larger batch."""

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

from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.memory import LiveBytes
from mmman.analysis.roofline import Device
from mmman.analysis.trace import Extrapolation, Trace
from mmman.memory.detection.dense_loss import ChunkedLoss
from mmman.memory.model_loss import chunked_loss
from mmman.partition import Chain, chain_of
from mmman.partition.chain import STEM

Run = Callable[['ProbeBatch', Trace], None]
"""Runs a part of the model on a batch. It calls ``trace.begin()`` where counting starts, and ``trace.mark()``."""


@dataclass(frozen=True)
class ProbeBatch:
    """A batch as the data loader returns it (``data``), and preprocessed: ``inputs`` (B, C, H, W) and ``samples``."""

    data: dict
    inputs: Tensor
    samples: list


@dataclass(frozen=True)
class ProbeRuns:
    """A model with a single block, and two probe batches to run parts of it on.

    Attributes:
        model: The model.
        optim_wrapper: Its optim wrapper.
        chain: The units of its backbone.
        batches: The two probe batches.
        pixels: Pixels of each probe batch and of the requested batch.
        chunked: Runs neck and heads on a few images at a time. None if the config doesn't set ``images_per_chunk``.
        device: The GPU whose time is predicted, if any.
    """

    model: BaseModel
    optim_wrapper: OptimWrapper
    chain: Chain
    batches: list[ProbeBatch]
    pixels: tuple[int, int, int]
    chunked: ChunkedLoss | None
    device: Device | None = None

    @classmethod
    def of(cls, cfg: Config, batch: int, height: int, width: int, device: Device | None = None) -> ProbeRuns:
        """Build the model of a config and its probe batches.

        Args:
            cfg: Config of a model with a single block.
            batch: Images of the requested batch.
            height, width: Size of the requested images, pixels.
            device: The GPU whose time is predicted, if any.
        """
        model, optim_wrapper = build_dummy_model(copy.deepcopy(cfg), height, width)
        chain, chunk = chain_of(model.backbone), getattr(optim_wrapper, 'images_per_chunk', None)
        recompute = cfg.model.backbone.recompute if 'recompute' in cfg.model.backbone else False
        is_detector = cfg.default_scope == 'mmdet'  # targets and proposals are computed image by image
        by_image = is_detector or chunk is not None or (not isinstance(recompute, bool) and STEM in recompute)
        has_proposals = hasattr(model, 'roi_head')
        sizes = probe_sizes(chain, height, width, batch if by_image else None, cfg.default_scope, has_proposals)
        batches = [random_probe_batch(model, cfg.default_scope, *size) for size in sizes]
        pixels = (*(b * h * w for b, h, w in sizes), batch * height * width)
        chunked = None if chunk is None else chunked_loss(model, chunk, lambda loss: loss)
        return cls(model, optim_wrapper, chain, batches, pixels, chunked, device)

    def precision(self) -> AbstractContextManager:
        dtype = getattr(self.optim_wrapper, 'dtype', None)
        return autocast(dtype=dtype) if dtype else nullcontext()

    def extrapolate(self, run: Run, *held: object) -> Extrapolation:
        traces = []
        for batch in self.batches:
            with FloatKernels(), Trace(self.model, *held, batch.data, batch.inputs, batch.samples) as trace:
                run(batch, trace)
            traces.append(trace)
        return Extrapolation(*traces, self.pixels, self.device)


def probe_sizes(
    chain: Chain, height: int, width: int, images: int | None, scope: str, has_proposals: bool = False
) -> list[tuple[int, int, int]]:
    """Choose the number of images, height and width of two probe batches.

    The two batches differ in the size of the images. If ``images`` is None and either the units attend to all positions or the
    requested images are small, the batches differ in the number of images instead, and the images have the requested size. If
    ``images`` is given and the units attend to all positions, one batch is the requested one, unless its images are less than
    64 pixels wide.

    Args:
        chain: The backbone's units.
        height, width: Size of the requested images, pixels.
        images: Number of requested images if some parts run on a few images at a time, else None. The tensors of such parts
            don't grow with the number of images, so that number is kept.
        scope: Default scope of the library. A detector's pyramid needs larger images.
        has_proposals: Whether the model is a two-stage detector. Its images must be large enough for as many proposals as a
            head samples, because that number doesn't grow with the images.
    """
    is_isotropic = chain.units[-1].stage == 0 and not chain.needs_hw_shape
    attends_everywhere = chain.attends_everywhere or chain.extra_tokens or is_isotropic
    if images is None and (height * width <= 256 * 256 or attends_everywhere):
        return [(2, height, width), (4, height, width)]
    if attends_everywhere and width >= 64:  # memory isn't linear in the pixels
        return [(images, height, width // 64 * 32), (images, height, width)]
    side = 128 if scope == 'mmdet' or images is None else 64
    if chain.needs_hw_shape or has_proposals:  # whole windows of 7 at stride 32
        side = 224
    side, images = min(side, height, width), images or 2
    return [(images, side, side), (images, side, 2 * side)]


def random_probe_batch(model: BaseModel, scope: str, size: int, height: int, width: int) -> ProbeBatch:
    """Preprocess ``size`` random images. Both probe batches of a detector have the same objects, so losses run alike."""
    data = random_batch(model, scope, size, height, width)
    side = min(height, width)
    if scope == 'mmdet' and height != width:  # use the objects of the smaller images
        smaller = random_batch(model, scope, size, side, side)['data_samples']
        for sample, other in zip(data['data_samples'], smaller, strict=True):
            sample.gt_instances = other.gt_instances
    if getattr(model.data_preprocessor, 'size', None) is not None:  # a segmentor's preprocessor pads to this
        model.data_preprocessor.size = (height, width)
    batch = model.data_preprocessor(copy.deepcopy(data), True)
    return ProbeBatch(data, batch['inputs'], batch['data_samples'])


@contextmanager
def outputs_observed(backbone: nn.Module, chain: Chain, observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``observe(i, output)`` for every unit i that runs inside this context."""

    def hook(i: int):
        return lambda module, args, output: observe(i, output)

    handles = [backbone.get_submodule(unit.output).register_forward_hook(hook(i)) for i, unit in enumerate(chain.units)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def static_bytes(module: nn.Module, state: float) -> int:
    """Bytes of parameters, buffers and optimizer state. ``state``: optimizer state per byte of trained parameters."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) + round(state * gradient_bytes(module.parameters()))


def gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the gradients of the trainable parameters."""
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def held_bytes(batch: ProbeBatch) -> int:
    """Bytes of a batch, before and after the data preprocessor."""
    return LiveBytes(batch.data, batch.inputs, batch.samples).current
