"""Run training steps without data: tensors have sizes and lifetimes, but no values.

torch's fake tensors run a model's own code, operator by operator, without allocating memory. So bytes and FLOPs of a step can
be counted in seconds, also for batches that are too large for the machine.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from mmman.errors import ConfigError

DATA_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)


class SizesOnly(FakeTensorMode):
    """A mode in which operators only compute the shapes of their results.

    Reading a number from a tensor gives 1, a mask selects everything, and ``torch.equal`` is true. Real tensors may be inputs.

    Raises:
        ConfigError: When the mode is left, if the step had any other data-dependent shapes or values.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.index.Tensor and (whole := _selected_whole(*args)) is not None:
            return whole
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, DATA_NEEDED):
            raise ConfigError(
                f'shapes depend on data here ({error}): detectors, and losses that select elements, are measured with data'
            ) from error

    def strip_(self, model: nn.Module) -> None:
        """Replace a model's parameters and buffers by fake tensors, in place."""
        known: dict[int, torch.Tensor] = {}
        for part in model.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        known.setdefault(id(tensor), self.from_tensor(tensor))
                        tensors[name] = known[id(tensor)]


def _selected_whole(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor | None:
    """An empty tensor shaped like ``tensor`` indexed by an all-true mask. None if the index isn't a single mask."""
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype is not torch.bool:
        return None
    (dim, mask), shape = given[0], tensor.shape
    return tensor.new_empty(*shape[:dim], mask.numel(), *shape[dim + mask.dim() :])
