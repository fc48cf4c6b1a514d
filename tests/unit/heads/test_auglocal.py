"""AugLocal: which units it copies, and how it adapts shapes between them."""

import pytest
import torch
from torch import nn

from mmman.errors import ConfigError
from mmman.partition import Feature

pytest.importorskip('mmpretrain')
from tests.unit.heads.classifiers import IMAGES, Y, boundary, local_head


def conv(inputs, outputs, stride):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


FOLLOWING = [
    (conv(8, 8, 1), Feature(8, 4)), (conv(8, 16, 2), Feature(16, 8)), (conv(16, 16, 1), Feature(16, 8)),
    (conv(16, 32, 2), Feature(32, 16)), (conv(32, 32, 1), Feature(32, 16)),
]  # fmt: skip


@pytest.mark.parametrize(
    ('depth', 'chosen'), [(1, [4]), (2, [1, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_auglocal_spreads_its_units_evenly_up_to_the_last(depth, chosen):
    head = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=depth)
    assert [unit.weight.shape for unit in head.units] == [FOLLOWING[i][0].weight.shape for i in chosen]
    assert not any(torch.equal(unit.weight, FOLLOWING[i][0].weight) for unit, i in zip(head.units, chosen, strict=True))
    assert head.embed(Y, IMAGES).shape == (4, 32)


def test_auglocal_adapts_neighbours_that_do_not_fit():
    head = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=2)
    assert head.adapters[0].project is None
    between = head.adapters[1].project[0]  # from unit 1 to unit 4
    assert (between.in_channels, between.out_channels, between.stride) == (16, 32, (2, 2))
    jump = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=1).adapters[0].project[0]
    assert (jump.in_channels, jump.out_channels, jump.stride) == (8, 32, (4, 4))


def test_auglocal_where_nothing_follows():
    head = local_head('AugLocalHead')
    assert torch.equal(head.embed(Y, IMAGES), Y.mean((2, 3)))
    with pytest.raises(ConfigError, match='depth=0'):
        local_head('AugLocalHead', depth=0)
