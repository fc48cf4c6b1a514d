"""What one training step costs: memory by the part that needs it, the floor, FLOPs, seconds."""

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
from mmman.analysis.memory import LiveBytes, LiveParts
from mmman.local.blocks import LocalBlocks
from mmman.memory.chunks import replaced
from mmman.memory.detection.dense_loss import DenseLoss

EMA_MOMENTUM = 0.995


@dataclass(frozen=True)
class Memory:
    """Live tensor bytes of one step.

    Attributes:
        peak: The most that were alive at once.
        parts: What the peak is made of; the sum is the peak.
        flops: FLOPs of the step, forward and backward: of matrix products, convolutions and attention. A multiplication and an
            addition are two. Operators of mmcv (deformable convolution) are not counted.
        operators: How many the step ran, views left out.
        curves: Bytes of every part over time, at most 1000 moments; see :meth:`LiveParts.curves`.
    """

    peak: int
    parts: dict[str, int]
    flops: int
    operators: int
    curves: dict[str, np.ndarray]


class StepMeter:
    """Takes training steps of one model on one batch. The first step, which makes optimizer state, is taken at once.

    Args:
        model: A model in training mode; its local heads, if any, are started.
        optim_wrapper: Its optim wrapper, whose learning rate should be 0.
        data: A batch as the data loader gives it.
        outputs: Where there are no local heads: paths of the backbone's modules that end a block, for the parts of the peak.
    """

    def __init__(self, model: BaseModel, optim_wrapper: OptimWrapper, data: dict, outputs: Sequence[str] = ()) -> None:
        self.model, self.optim_wrapper, self.data = model, optim_wrapper, data
        local = getattr(model.backbone, 'local', None)
        self._heads = [*local.values()] if isinstance(local, LocalBlocks) else []
        known = {name for name, _ in model.backbone.named_modules()}
        self.outputs = block_outputs(model) or ([*outputs] if known.issuperset(outputs) else [])
        self.step()

    def step(self) -> None:
        """One training step, and the update of the momentum copies."""
        self.model.train_step(self.data, self.optim_wrapper)
        for head in self._heads:
            head.transfer.update_(head.source.of(self.model.backbone), EMA_MOMENTUM)

    def memory(self) -> Memory:
        """Live tensor bytes of one step, exactly, on the CPU or a GPU; run without CUDA graphs, in which they aren't seen."""
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
        ):
            self.step()
        parts = {name: size for name, size in live.peak_parts.items() if size}
        return Memory(live.peak, parts, live.flops, live.operators, live.curves())

    def floor(self, in_chunks: bool = True) -> int:
        """Peak of what remains without the backbone.

        Parameters, buffers and optimizer state of the whole model; and neck, head and loss run forward and backward on feature
        maps that are given.

        Args:
            in_chunks: Whether they run on as few images at a time as the optim wrapper's ``images_per_chunk`` says.
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
                    dense = DenseLoss(self.model, size, lambda loss: loss)
                    losses = dense.neck_and_head([*features], batch['data_samples'])
                self.model.parse_losses(losses)[0].backward()
        wrapper.zero_grad()
        return live.peak

    def allocator_peak(self) -> int | None:
        """Peak bytes of torch's CUDA allocator in one step, without what other models hold; None of a model on a CPU.

        CUDA graphs have their own memory, which counts in full.
        """
        if next(self.model.parameters()).device.type != 'cuda':
            return None
        self.step()  # records graphs, if there are to be some
        others = torch.cuda.memory_allocated() - LiveBytes(self.model, self.optim_wrapper.optimizer).current
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - others + getattr(self.optim_wrapper, 'graph_bytes', 0)

    def kernel_seconds(self) -> float | None:
        """Seconds that what one step runs on a GPU takes by itself, without the time in which the GPU waits; None on a CPU."""
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
