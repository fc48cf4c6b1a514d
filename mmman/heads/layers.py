"""Layers of local heads, and their initialisation."""

from __future__ import annotations

from torch import nn

INIT = [
    {'type': 'Kaiming', 'layer': 'Conv2d'},
    {'type': 'TruncNormal', 'layer': 'Linear', 'std': 0.02},
    {'type': 'Constant', 'layer': ['_BatchNorm', 'LayerNorm'], 'val': 1},
]
"""mmengine's initialisation of the networks in local heads: He for convolutions, as in mmpretrain's backbones."""


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution with BN and ReLU that keeps the spatial size, or divides it by ``stride``."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def linear_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    """A linear layer with BN and ReLU, (B, inputs) to (B, outputs)."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True))
