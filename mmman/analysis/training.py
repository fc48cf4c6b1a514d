"""Measure one training step: memory by part, memory without the backbone, FLOPs, seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmman.analysis.attribute_memory import attribute_memory, block_outputs
from mmman.analysis.gpu_work import GPUWork, Kernel, PartWork
from mmman.analysis.memory import LiveBytes, LiveParts
from mmman.local.blocks import LocalBlocks
from mmman.memory.chunks import replaced
from mmman.memory.model_loss import chunked_loss

EMA_MOMENTUM = 0.995


@dataclass(frozen=True)
class Memory:
    """Live tensor bytes, and FLOPs, of one step.

    Attributes:
        peak: Largest number of bytes alive.
        parts: Bytes by part at the peak; their sum is the peak.
        flops: FLOPs of the forward and backward pass: of matrix products, convolutions and attention. A multiplication and an
            addition are two. Operators of mmcv (deformable convolution) are not counted.
        operators: Number of operators that the step ran, without views.
        curves: Bytes of every part over time, at most 1000 moments; see :meth:`LiveParts.curves`.
        work: What a GPU would pay for, by part.
        timeline: Its launches in order; None where the CPU waits for the GPU.
    """

    peak: int
    parts: dict[str, int]
    flops: int
    operators: int
    curves: dict[str, np.ndarray]
    work: dict[str, PartWork]
    timeline: list[Kernel | None]


class StepMeter:
    """Measure training steps of one model on one batch. The constructor takes a first step, which creates optimizer state.

    Args:
        model: A model in training mode. The momentum copies of its local heads, if any, are initialised.
        optim_wrapper: Its optim wrapper, whose learning rate should be 0.
        data: A batch as the data loader returns it.
        outputs: For a model without local heads, paths of the backbone's modules that end a block. They divide the backbone
            into parts.
    """

    def __init__(self, model: BaseModel, optim_wrapper: OptimWrapper, data: dict, outputs: Sequence[str] = ()) -> None:
        self.model, self.optim_wrapper, self.data = model, optim_wrapper, data
        local = getattr(model.backbone, 'local', None)
        self._heads = [*local.values()] if isinstance(local, LocalBlocks) else []
        known = {name for name, _ in model.backbone.named_modules()}
        self.outputs = block_outputs(model) or ([*outputs] if known.issuperset(outputs) else [])
        self.step()

    def step(self) -> None:
        """Take one training step and update the momentum copies."""
        self.model.train_step(self.data, self.optim_wrapper)
        for head in self._heads:
            head.transfer.ema_update_(head.source.of(self.model.backbone), EMA_MOMENTUM)

    def memory(self) -> Memory:
        """Count live tensor bytes of one step exactly, on the CPU or a GPU. CUDA graphs are off, as they hide allocations."""
        parameters = [*self.model.parameters()]
        held = {
            'momentum copies': [head.transfer.momentum for head in self._heads],
            'parameters': parameters,
            'buffers': [*self.model.buffers()],
            'gradients': [p.grad for p in parameters if p.grad is not None],
            'optimizer state': self.optim_wrapper.optimizer,
            'input': self.data,
        }
        with (
            replaced(self.optim_wrapper, 'cuda_graphs', False),
            LiveParts(held, part='input') as live,
            attribute_memory(live, self.model, self.optim_wrapper, self.outputs),
            GPUWork(lambda: live.part) as work,
        ):
            self.step()
        parts = {name: size for name, size in live.peak_parts.items() if size}
        return Memory(live.peak, parts, live.flops, live.operators, live.curves(), work.parts, work.timeline)

    def floor(self, in_chunks: bool = True) -> int:
        """Peak bytes of a step that doesn't run the backbone.

        This counts parameters, buffers and optimizer state of the whole model, and the forward and backward pass of neck, head
        and loss on given feature maps.

        Args:
            in_chunks: Whether neck and head run on ``images_per_chunk`` images at a time, if the optim wrapper sets that.
        """
        batch = self.model.data_preprocessor(self.data, True)
        backbone, wrapper = self.model.backbone, self.optim_wrapper
        if not hasattr(wrapper, 'local_backward'):  # a stock wrapper
            precision = wrapper.optim_context(self.model)
        else:
            precision = autocast(dtype=wrapper.dtype) if wrapper.dtype else nullcontext()
        with precision:
            with torch.no_grad():
                features = tuple(feature.requires_grad_() for feature in backbone(batch['inputs']))
            size = getattr(wrapper, 'images_per_chunk', None) if in_chunks else None
            with ExitStack() as stack:
                live = stack.enter_context(LiveBytes(self.model, wrapper.optimizer, self.data, batch, features))
                if size is None:
                    stack.enter_context(replaced(backbone, 'forward', lambda inputs: features))
                    losses = self.model(**batch, mode='loss')
                else:
                    chunked = chunked_loss(self.model, size, lambda loss: loss)
                    losses = chunked.neck_and_head([*features], **batch)
                self.model.parse_losses(losses)[0].backward()
        wrapper.zero_grad()
        return live.peak

    def allocator_peak(self) -> int | None:
        """Peak bytes of torch's CUDA allocator in one step, without what other models hold. None for a model on a CPU.

        CUDA graphs have a memory pool of their own, which counts in full.
        """
        if next(self.model.parameters()).device.type != 'cuda':
            return None
        self.step()  # captures CUDA graphs if they are on
        others = torch.cuda.memory_allocated() - LiveBytes(self.model, self.optim_wrapper.optimizer).current
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - others + getattr(self.optim_wrapper, 'graph_bytes', 0)

    def kernel_seconds(self) -> float | None:
        """Sum of the durations of all GPU kernels and copies in one step, without idle time, in seconds. None on a CPU."""
        if next(self.model.parameters()).device.type != 'cuda':
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.step()
            _synchronize()
        events = (event for event in profiled.events() if event.device_type == DeviceType.CUDA)
        return sum(event.time_range.elapsed_us() for event in events) / 1e6

    def seconds(self) -> float:
        """Wall-clock seconds of one step."""
        _synchronize()
        start = time.perf_counter()
        self.step()
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
