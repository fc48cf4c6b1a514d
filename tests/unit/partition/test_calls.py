"""How modules are called: on maps, on tokens, with their grid."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmman.partition.calls import call, call_on_map, call_on_tokens, call_on_view, call_with_sides
from mmman.partition.chain import UnitSequence
from tests.unit.partition.test_chain import Grid, Sides


class Embed(nn.Module):
    """Returns every second pixel of a map as tokens, with their grid."""

    def __init__(self, as_pair=True):
        super().__init__()
        self.as_pair = as_pair

    def forward(self, x):
        assert x.dim() == 4
        self.is_contiguous = x.is_contiguous()
        x = x[:, :, ::2, ::2]
        sides = tuple(x.shape[2:])
        return (x.flatten(2).transpose(1, 2), *([sides] if self.as_pair else sides))


class Tokens(nn.Module):
    def forward(self, x):
        assert x.dim() == 3
        return x * 2


@pytest.mark.parametrize(('embed', 'is_contiguous'), [(call_on_map, True), (call_on_view, False)])
@pytest.mark.parametrize('as_pair', [True, False])
def test_modules_of_a_unit_are_called_as_the_backbone_does(embed, is_contiguous, as_pair):
    modules = [Embed(as_pair), Sides(), Grid(), Tokens()]
    unit = UnitSequence(modules, (embed, call_with_sides, call, call_on_tokens))
    tokens = torch.arange(2 * 24 * 3.0).reshape(2, 24, 3)
    expected = (tokens.reshape(2, 4, 6, 3)[:, ::2, ::2].reshape(2, 6, 3) + 2) * 2
    for copied in (unit, copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        y, grid = copied.run(tokens, (4, 6))
        assert torch.equal(y, expected) and grid == (2, 3)
        assert torch.equal(copied(tokens, (4, 6)), y)
        assert copied[0].is_contiguous == is_contiguous
        assert copied[1].seen == copied[2].seen == (2, 3)
    as_map = tokens.transpose(1, 2).reshape(2, 3, 4, 6)
    assert torch.equal(unit(as_map, (4, 6)), expected)


def test_blocks_on_maps_between_tokens():
    """VAN's: a norm makes tokens of a map, from which the next embedding makes a map again."""
    unit = UnitSequence([nn.Conv2d(3, 3, 3, padding=1), Tokens()], (call_on_map, call_on_tokens))
    x = torch.randn(2, 3, 4, 6)
    y, grid = unit.run(x, (4, 6))
    assert torch.equal(y, unit[0](x).flatten(2).transpose(1, 2) * 2) and grid == (4, 6)
    assert torch.equal(unit(x.flatten(2).transpose(1, 2), (4, 6)), y)
