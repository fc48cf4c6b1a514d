"""Half precision computed by float32 kernels: the same bytes, FLOPs and operators, and nearly the same numbers."""

import pytest
import torch
from torch import nn

from mmman.analysis.float_kernels import FloatKernels
from mmman.analysis.memory import LiveBytes


def step(dtype):
    """A convolution, a linear layer and an attention-like product; the outputs, gradients and what the counter saw."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(8, 8)])
    x = torch.rand(2, 3, 6, 6)
    with LiveBytes(model) as live, torch.autocast('cpu', dtype=dtype):
        y = model[0](x).flatten(2).mT
        y = y @ y.mT @ model[1](y)
        y.float().square().mean().backward()
    return y, [p.grad for p in model.parameters()], (live.peak, live.flops, live.operators, live.current)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_only_the_kernels_differ(dtype):
    y, gradients, counted = step(dtype)
    with FloatKernels():
        other, other_gradients, other_counted = step(dtype)
    assert other_counted == counted
    assert other.dtype == y.dtype == dtype
    for one, two in zip([y, *gradients], [other, *other_gradients], strict=True):
        torch.testing.assert_close(two.float(), one.float(), rtol=0.05, atol=0.02)


def test_half_products_run_in_float32_and_others_untouched():
    x = torch.rand(4, 4, dtype=torch.bfloat16)
    wide = torch.rand(4, 4, dtype=torch.float64)
    with FloatKernels():
        assert torch.equal(x @ x, (x.float() @ x.float()).bfloat16())
        assert (wide @ wide).dtype is torch.float64
        assert (x + x).dtype is torch.bfloat16
