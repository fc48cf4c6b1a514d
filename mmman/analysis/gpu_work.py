"""Count what a GPU pays for in one training step, on any device: kernel launches, waits of the CPU for the GPU, bytes moved."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmman.analysis.flops import flops_of
from mmman.memory.detection.focal_loss import sum_on_gpu

OPTIMIZER = 'optimizer step'

ALLOCATIONS = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'resize_', 'is_same_size'}
"""Operators, views apart, that start no kernel."""

SIZED_BY_VALUES = {
    'nonzero',
    'masked_select',
    '_unique2',
    'unique_dim',
    'unique_consecutive',
    'unique_dim_consecutive',
    'bincount',
}
"""Operators whose output has a size that depends on values, so that the CPU has to wait for it."""

TO_HOST = {'cpu', 'tolist', 'numpy'}
"""Methods of a tensor that copy it to the CPU; on a CPU no operator shows them."""

HALVES = (torch.bfloat16, torch.float16)

_OUTSIDE = (str(Path(torch.__file__).parent), __file__)
_OPTIMIZERS = str(Path(torch.optim.__file__).parent)


@dataclass
class PartWork:
    """The work of one part of a step.

    Attributes:
        launches: Operators that start kernels. All of an optimizer step count as one, as if it were fused.
        moved: Bytes that operators read and write, if each reads its inputs and writes its outputs once.
        waits: How often the CPU waits for the GPU, by source line.
    """

    launches: int = 0
    moved: int = 0
    waits: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Kernel:
    """The kernels that one operator starts.

    Attributes:
        flops: FLOPs of a convolution, matrix product or attention; 0 for other operators.
        moved: Bytes that it reads and writes, if it reads its inputs and writes its outputs once.
        is_convolution: Whether it is a convolution or the backward of one.
        is_half: Whether its first input has half precision.
        launches: How many they are. One, but for mmman's own operators, of which this is known.
    """

    flops: int = 0
    moved: int = 0
    is_convolution: bool = False
    is_half: bool = False
    launches: float = 1


class GPUWork(TorchDispatchMode):
    """Count the work of training steps by part while this mode is active.

    An operator of a library counts as one launch, though some are several. Copies from the CPU to the GPU are not seen.

    Args:
        part: Returns the name of the running part.

    Attributes:
        parts: Work by the name of the part.
        timeline: Launches in order; None where the CPU waits for the GPU.
    """

    def __init__(self, part: Callable[[], str]) -> None:
        super().__init__()
        self._part = part
        self.parts: dict[str, PartWork] = {}
        self.timeline: list[Kernel | None] = []
        self._kernel = Kernel()
        self._last = ''

    def __enter__(self) -> GPUWork:
        self._profile = sys.getprofile()
        sys.setprofile(self._on_call)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._profile)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == 'prim':
            return result
        name, work = func._schema.name.removeprefix('aten::'), self._work()
        kernel = kernel_of(func, args, kwargs or {}, result)
        if kernel is not None:
            work.moved += kernel.moved
            last, self._last = self._last, self._part()
            if self._last == last == OPTIMIZER:
                self._kernel.moved += kernel.moved
            else:
                work.launches += round(kernel.launches)
                self._kernel = kernel
                self.timeline.append(kernel)
        frame = sys._getframe(1)
        if name == '_local_scalar_dense':
            if not _is_step_count(frame):
                self._wait(frame)
        elif name in SIZED_BY_VALUES or _has_mask(name, args):
            self._wait(frame)
        return result

    def _wait(self, frame: FrameType) -> None:
        self._work().waits[_source(frame)] += 1
        self.timeline.append(None)

    def _work(self) -> PartWork:
        return self.parts.setdefault(self._part(), PartWork())

    def _on_call(self, frame: FrameType, event: str, called: object) -> None:
        if event == 'c_call' and isinstance(getattr(called, '__self__', None), Tensor) and called.__name__ in TO_HOST:
            self._wait(frame)


def kernel_of(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> Kernel | None:
    """The launch of one call of an operator. None if it starts no kernel."""
    name = func._schema.name.removeprefix('aten::')
    if func.is_view or func.namespace == 'prim' or name in ALLOCATIONS:  # prim: a fake tensor is asked for its device
        return None
    tensors = [leaf for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, Tensor)]
    launches, moved = 1, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if name == 'mmman::sigmoid_focal_loss_sum':
        launches, moved = sum_on_gpu(args[0])
    elif name == 'mmman::sigmoid_focal_loss_backward':
        launches = 2  # mmcv's, and a product
    return Kernel(
        flops=flops_of(func, args, kwargs, result),
        moved=moved,
        is_convolution='convolution' in name,
        is_half=any(tensor.dtype in HALVES for tensor in tensors[:1]),
        launches=launches,
    )


def _has_mask(name: str, args: tuple) -> bool:
    """Whether an indexing operator is given a mask, which it turns into as many indices as are true."""
    if name not in ('index', 'index_put_', '_index_put_impl_', 'index_put'):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _is_step_count(frame: FrameType | None) -> bool:
    """Whether an optimizer reads a number: that of its steps, which it keeps on the CPU."""
    while frame is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        if frame.f_code.co_filename.startswith(_OPTIMIZERS):
            return True
        frame = frame.f_back
    return False


def _source(frame: FrameType | None) -> str:
    """File and line that called torch."""
    while frame is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    return 'autograd' if frame is None else f'{_shortened(frame.f_code.co_filename)}:{frame.f_lineno}'


def _shortened(file: str) -> str:
    parts = Path(file).parts
    start = next((i + 1 for i in reversed(range(len(parts))) if parts[i] == 'site-packages'), -3)
    return '/'.join(parts[start:])
