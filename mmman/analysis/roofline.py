"""Predict how long a GPU takes for the launches of a training step: a roofline for each, on the clocks of two workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mmman.analysis.gpu_work import Kernel

PRODUCTS = 0.75
"""Share of its FLOP/s that a GPU reaches in products; fitted to ViT-Base on an H200."""

BYTES = 0.36
"""Share of its bandwidth that a GPU reaches, if operators read and wrote everything once; fitted to ResNets on an H200. Most
read something twice (BatchNorm), and convolutions change the layout."""

LEAST = 7e-6
"""Seconds that any kernel takes; fitted to RetinaNet-R18 on an H100, whose kernels are mostly small."""


@dataclass(frozen=True)
class Device:
    """A GPU, by its data sheet, and the core that launches its kernels.

    Attributes:
        name: The name that people know it by.
        tf32: FLOP/s of convolutions in float32, which torch computes in TF32, dense.
        single: FLOP/s of matrix products in float32, which torch does not compute in TF32 by itself.
        half: FLOP/s in bfloat16 and float16 with float32 sums, dense.
        bandwidth: Bytes/s of its memory.
        launch: Seconds that the launching core needs for an operator, with the Python around it.
        least: Seconds that a kernel takes at least.
    """

    name: str
    tf32: float
    single: float
    half: float
    bandwidth: float
    launch: float = 33e-6
    least: float = LEAST

    def seconds(self, kernel: Kernel) -> float:
        """How long kernels run: their FLOPs or their bytes, whichever takes longer, and each at least :attr:`least`."""
        rate = self.half if kernel.is_half else self.tf32 if kernel.is_convolution else self.single
        return max(kernel.flops / (PRODUCTS * rate), kernel.moved / (BYTES * self.bandwidth), kernel.launches * self.least)


# The SXM cards of the data centre GPUs; the A100 with 80 GB.
DEVICES = {
    device.name: device
    for device in (
        Device('a100', 156e12, 19.5e12, 312e12, 2.039e12),
        Device('h100', 494e12, 67e12, 989e12, 3.35e12),
        Device('h200', 494e12, 67e12, 989e12, 4.8e12),
        Device('rtx3090', 35.6e12, 35.6e12, 71e12, 0.936e12),
        Device('rtx4090', 82.6e12, 82.6e12, 165e12, 1.008e12),
    )
}


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step: of the step as a whole, and of its kernels without the time in which the GPU is idle."""

    step: float
    kernels: float


def step_time(timeline: Iterable[Kernel | None], device: Device) -> StepTime:
    """Predict a step on a GPU.

    The core launches kernels one after the other; the GPU runs a kernel once it is launched and the kernel before it has ended.
    Where the CPU waits for the GPU, the core goes on when all kernels have ended.

    Args:
        timeline: See :class:`GPUWork`.
        device: The GPU.
    """
    core = gpu = kernels = 0.0
    for kernel in timeline:
        if kernel is None:
            core = max(core, gpu)
            continue
        core += kernel.launches * device.launch
        own = device.seconds(kernel)
        gpu = max(gpu, core) + own
        kernels += own
    return StepTime(max(core, gpu), kernels)
