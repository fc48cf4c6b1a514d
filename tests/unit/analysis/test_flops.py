"""FLOPs that torch's counter has wrong, against arithmetic."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmman.analysis import LiveBytes


@pytest.mark.parametrize('groups', [1, 4, 16])
@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_a_gradient_of_a_grouped_convolution_takes_as_many_as_its_forward_pass(groups, kind):
    layer = kind(16, 32, 3, stride=2, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 16, 12, 12, requires_grad=True)
    with LiveBytes() as forward:
        y = layer(x)
    with LiveBytes() as backward:
        y.sum().backward()
    positions = 12 * 12 if kind is nn.ConvTranspose2d else 6 * 6
    assert forward.flops == 2 * 2 * positions * 9 * 16 * 32 // groups
    assert backward.flops == 2 * forward.flops


def test_attention_on_a_cpu_counts():
    query, key, value = (torch.randn(2, 3, 10, 8, requires_grad=True) for _ in range(3))
    with LiveBytes() as forward:
        y = F.scaled_dot_product_attention(query, key, value)
    with LiveBytes() as backward:
        y.sum().backward()
    product = 2 * (2 * 3) * 10 * 10 * 8
    assert forward.flops == 2 * product
    assert backward.flops == 5 * product  # with the scores, which are computed again
