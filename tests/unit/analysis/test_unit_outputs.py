"""Outputs of units in a forward pass."""

import torch

from mmman.analysis.unit_outputs import unit_outputs
from mmman.partition import chain_of
from tests.unit.local.test_session import toy


def test_every_unit_in_order_until_the_context_ends():
    backbone = toy().backbone.eval()
    chain = chain_of(backbone)
    x = torch.randn(2, 3, 16, 16).double()
    with unit_outputs(backbone, chain.units) as outputs:
        expected = backbone(x)
    kept = dict(outputs)
    backbone(x + 1)
    assert [*outputs] == [unit.name for unit in chain.units]
    assert all(outputs[name] is value for name, value in kept.items())
    for tap, value in zip(chain.out_units, expected, strict=True):
        assert torch.equal(outputs[chain.units[tap].name], value)


def test_reduced_outputs_are_kept_in_place_of_outputs():
    backbone = toy().backbone.eval()
    chain = chain_of(backbone)
    with unit_outputs(backbone, chain.units[1:3], lambda name, x: (name, x.mean())) as means:
        backbone(torch.randn(2, 3, 16, 16).double())
    assert [name for name, _ in means.values()] == ['layer1.0', 'layer1.1'] and means['layer1.0'][1].dim() == 0


def test_hooks_are_removed_after_an_error():
    backbone = toy().backbone
    hooks = [len(module._forward_hooks) for module in backbone.modules()]
    try:
        with unit_outputs(backbone, chain_of(backbone).units):
            raise KeyError
    except KeyError:
        pass
    assert [len(module._forward_hooks) for module in backbone.modules()] == hooks
