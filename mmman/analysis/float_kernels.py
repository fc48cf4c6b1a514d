"""Compute half precision by float32 kernels, where a CPU has none of its own and takes 30 times as long."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mmman.analysis.gpu_work import HALVES

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
}


class FloatKernels(TorchDispatchMode):
    """While this mode is active, convolutions and matrix products of half precision are computed in float32, then rounded.

    A mode entered later, such as :class:`mmman.analysis.memory.LiveBytes`, sees the operators, and the sizes and lifetimes of
    their tensors, as without this mode.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype not in HALVES:
            return func(*args, **kwargs)
        half = args[0].dtype
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return tree_map_only(Tensor, lambda tensor: tensor.to(half), func(*args, **kwargs))
