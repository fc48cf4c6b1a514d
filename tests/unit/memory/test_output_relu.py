"""The ReLU that produces a unit's output is applied outside the recomputation."""

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmman.analysis import LiveBytes
from mmman.memory.output_relu import DeferrableReLU, defer_relu_, find_output_relus, restore_relus_
from mmman.memory.recompute import disable_recompute_, recompute_
from tests.toy import ToyUnit


def test_finds_the_relu_that_produces_the_output():
    """By its name and the number of its calls; not one in the middle, nor another function at the end."""
    resnet, mobilenet = (pytest.importorskip(f'mmpretrain.models.backbones.{name}') for name in ('resnet', 'mobilenet_v2'))
    units = [
        resnet.BasicBlock(8, 8),
        resnet.Bottleneck(8, 8),
        ConvModule(8, 8, 1, norm_cfg={'type': 'BN'}),
        ConvModule(8, 8, 1, norm_cfg={'type': 'BN'}, act_cfg=None),
        mobilenet.InvertedResidual(8, 8, 1, 1),
        ToyUnit(8, 8),
    ]
    with find_output_relus(units) as found, torch.no_grad():
        for unit in units:
            unit.eval()(torch.randn(1, 8, 4, 4))
    assert found == {units[0]: ('relu', 2), units[1]: ('relu', 3), units[2]: ('activate', 1)}
    assert not any(module._forward_hooks for unit in units for module in unit.modules())


@pytest.mark.parametrize('selective', [False, True])
def test_the_relu_that_produces_the_output_is_not_recomputed(selective):
    resnet = pytest.importorskip('mmpretrain.models.backbones.resnet')
    unit = resnet.BasicBlock(8, 8).double().train()
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    peaks, grads = [], []
    for end in (None, ('relu', 2)):
        recompute_(unit, selective, end)
        unit.zero_grad()
        x.grad = None
        y = unit(x)
        assert (y >= 0).all() and (y == 0).any()
        loss = (y * 1.0).sum()  # whose backward makes a gradient of the whole output
        with LiveBytes(unit, x, y) as live:
            loss.backward()
        peaks.append(live.peak)
        grads.append([x.grad, *(p.grad for p in unit.parameters())])
        disable_recompute_(unit)
    assert all(map(torch.equal, *grads))
    activation, gradient = x.numel() * 8, unit.conv2.weight.numel() * 8  # which is there at the peak that is left
    assert activation - gradient <= peaks[0] - peaks[1] <= activation


def test_only_the_named_call_is_deferred():
    relu, x = DeferrableReLU(), torch.tensor([-1.0, 2.0])
    with relu.deferred(2):
        outputs = [relu(x).tolist() for _ in range(3)]
    assert outputs == [[0, 2], [-1, 2], [0, 2]]
    assert relu(x).tolist() == [0, 2]


def test_an_error_in_the_unit_leaves_no_call_deferred():
    relu, x = DeferrableReLU(), torch.tensor([-1.0, 2.0])
    with pytest.raises(ZeroDivisionError), relu.deferred(1):
        raise ZeroDivisionError
    assert relu(x).tolist() == [0, 2]


def test_a_relu_is_replaced_and_restored():
    unit = nn.Module()
    unit.first, unit.last = nn.ReLU(), nn.ReLU(inplace=True).eval()
    defer_relu_(unit, 'last')
    assert type(unit.first) is nn.ReLU and type(unit.last) is DeferrableReLU
    restore_relus_(unit)
    assert type(unit.last) is nn.ReLU and unit.last.inplace and not unit.last.training


def test_a_relu_with_hooks_is_left_alone():
    """They would be lost, or see another output."""
    unit = ConvModule(8, 8, 1)
    unit.activate.register_forward_hook(lambda module, args, out: None)
    with find_output_relus([unit]) as found, torch.no_grad():
        unit(torch.randn(1, 8, 4, 4))
    assert found == {}
