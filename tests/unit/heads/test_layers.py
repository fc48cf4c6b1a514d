"""Layers of local heads: sizes that they keep, and their initialisation."""

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmman.heads.layers import INIT, conv_bn_relu, linear_bn_relu


@pytest.mark.parametrize('kernel', [1, 3, 5])
@pytest.mark.parametrize(('stride', 'sides'), [(1, (7, 10)), (2, (4, 5))])
def test_a_convolution_keeps_the_size_or_divides_it(kernel, stride, sides):
    layer = conv_bn_relu(3, 4, kernel, stride)
    y = layer(torch.randn(2, 3, 7, 10))
    assert y.shape == (2, 4, *sides) and y.min() == 0
    assert layer[0].bias is None


def test_a_linear_layer_is_normalised_over_the_batch():
    y = linear_bn_relu(3, 4)(torch.randn(64, 3))
    assert y.shape == (64, 4) and y.min() == 0
    assert linear_bn_relu(3, 4)[:2](torch.randn(64, 3)).mean(0).abs().max() < 1e-6


def test_initialisation():
    torch.manual_seed(0)
    net = BaseModule(init_cfg=INIT)
    net.parts = nn.ModuleList([nn.Conv2d(64, 64, 3), nn.Linear(256, 256), nn.BatchNorm2d(4), nn.LayerNorm(4)])
    for norm in net.parts[2:]:
        nn.init.zeros_(norm.weight)
    net.init_weights()
    conv, linear, *norms = net.parts
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # He, fan out
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(norm.weight.unique().item() == 1 for norm in norms)
    assert conv.bias.abs().max() == linear.bias.abs().max() == 0
