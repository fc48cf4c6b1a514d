"""AugLocal: which units it copies, and how it adapts shapes between them."""

import pytest
import torch
from torch import nn

from mmman.errors import ConfigError
from mmman.heads.auglocal import _sampled_units
from mmman.partition import Feature

pytest.importorskip('mmpretrain')
from tests.unit.heads.classifiers import IMAGES, MAP, Y, boundary, local_head


def conv(inputs, outputs, stride):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


FOLLOWING = [
    (conv(8, 8, 1), Feature(8, 4)), (conv(8, 16, 2), Feature(16, 8)), (conv(16, 16, 1), Feature(16, 8)),
    (conv(16, 32, 2), Feature(32, 16)), (conv(32, 32, 1), Feature(32, 16)),
]  # fmt: skip


@pytest.mark.parametrize(
    ('depth', 'chosen'), [(1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_auglocal_spreads_its_units_evenly_up_to_the_last(depth, chosen):
    head = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=depth)
    assert [unit.out_channels for unit in head.units] == [FOLLOWING[i][1].channels for i in chosen]
    assert not any(
        unit.weight is own.weight or torch.equal(unit.weight, own.weight) for unit in head.units for own, _ in FOLLOWING
    )
    assert head.embed(Y, IMAGES).shape == (4, 32)


def test_auglocal_where_nothing_follows():
    head = local_head('AugLocalHead')
    assert torch.equal(head.embed(Y, IMAGES), Y.mean((2, 3)))
    with pytest.raises(ConfigError, match='depth=0'):
        local_head('AugLocalHead', depth=0)


# The layers that AugLocal's code samples for ResNet-32 after its layers 0, 1, ..., by depth.
@pytest.mark.parametrize(('depth', 'layers'), [
    (1, [(15,)] * 14), (2, [(8, 15), (8, 15), (8, 15), (9, 15), (10, 15), (10, 15), (10, 15), (11, 15), (12, 15), (12, 15)]),
    (3, [(5, 10, 15), (6, 10, 15), (6, 11, 15), (7, 11, 15), (8, 11, 15)]),
])  # fmt: skip
def test_auglocal_samples_the_layers_of_the_authors(depth, layers):
    for position, expected in enumerate(layers):
        chosen = _sampled_units(position, 15 - position, depth)
        assert tuple(position + 1 + i for i in chosen) == expected


@pytest.mark.parametrize(('depth', 'pyramid', 'depths'), [
    (5, 0.5, [5, 5, 5, 4, 4, 4, 4, 4, 3, 3, 3]), (5, 0, [5] * 11), (2, 0.5, [2] * 11), (1, 1, [1] * 11),
    (3, 1, [3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1]),
])  # fmt: skip
def test_auglocal_is_a_pyramid(depth, pyramid, depths):
    following = [(conv(8, 8, 1), MAP)] * 9
    heads = [
        local_head('AugLocalHead', where=boundary(block=j, num_blocks=12, following=following), depth=depth, pyramid=pyramid)
        for j in range(1, 12)
    ]
    assert [len(head.units) for head in heads] == depths


def test_auglocals_units_change_the_shape_themselves():
    head = local_head('AugLocalHead', where=boundary(following=[*FOLLOWING[:2], *FOLLOWING[2:3] * 2, *FOLLOWING[3:]]), depth=2)
    assert [(unit.in_channels, unit.out_channels, unit.stride) for unit in head.units] == [(8, 16, (2, 2)), (16, 32, (2, 2))]
    assert all(adapter.project is None for adapter in head.adapters)


def test_auglocal_adapts_what_no_unit_changes_and_drops_no_position():
    head = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=1)
    (unit,), (adapter,) = head.units, head.adapters
    assert (unit.in_channels, unit.out_channels, unit.stride) == (16, 32, (2, 2))
    project = adapter.project[0]
    assert (adapter.stride, project.in_channels, project.out_channels, project.stride) == (2, 8, 16, (1, 1))
    y = Y[..., :7, :7].clone().requires_grad_()
    adapted = head.eval().adapters[0](y, IMAGES.shape[-2:])
    assert adapted.shape[-2:] == (4, 4)
    adapted.square().sum().backward()
    assert y.grad.ne(0).all()
