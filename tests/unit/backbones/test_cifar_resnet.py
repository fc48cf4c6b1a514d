"""The ResNets for CIFAR: depth, parameters and outputs are those of the paper (section 4.2, table 6)."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmman.backbones import CIFARResNet
from mmman.errors import ConfigError

pytest.importorskip('mmpretrain')


@pytest.mark.parametrize(('depth', 'millions'), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_depth_and_parameters(depth, millions):
    with torch.device('meta'):
        backbone = CIFARResNet(depth)
    layers = [module for module in backbone.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(layers) + 1 == depth  # and the classifier
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_outputs_of_every_stage():
    backbone = MODELS.build({'type': 'mmman.CIFARResNet', 'depth': 8, 'in_channels': 1, 'out_indices': (0, 1, 2)})
    outs = backbone(torch.randn(2, 1, 32, 32))
    assert [tuple(out.shape) for out in outs] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert torch.equal(CIFARResNet(8, norm_cfg={'type': 'GN', 'num_groups': 4}).stem.norm.weight, torch.ones(16))


@pytest.mark.parametrize('depth', [2, 18, 51])
def test_other_depths_are_refused(depth):
    with pytest.raises(ConfigError, match=rf'^CIFARResNet.depth={depth}: expected 6n\+2'):
        CIFARResNet(depth)


def test_stages_are_three():
    with pytest.raises(ConfigError, match='out_indices=.*expected'):
        CIFARResNet(8, out_indices=(3,))
