"""Units of a backbone as modules, and the shapes of their outputs."""

import pytest
import torch
from torch import nn

from mmman import localize_, register_chain
from mmman.partition import Chain, Feature, Unit
from mmman.partition.calls import call_with_sides
from mmman.partition.chain import UnitSequence, run_unit
from tests.toy import ToyNet

HEAD = {'type': 'mmman.ToyLocalHead'}


def test_a_unit_may_be_several_modules_one_after_the_other():
    class Pairs(ToyNet):
        def forward(self, x):
            return super().forward(x)

    units = [Unit('stem', ('stem', 'layer1.0', 'layer1.1'), 'layer1.1', 0)]
    units += [Unit.sequence((f'{layer}.0', f'{layer}.1'), i) for i, layer in ((1, 'layer2'), (2, 'layer3'))]
    register_chain(f'{Pairs.__module__}.{Pairs.__qualname__}')(lambda backbone: Chain(tuple(units), (1, 2)))
    backbone = localize_(Pairs(), 3, HEAD)
    head = backbone.local['stem']
    head.transfer.init_from_(head.source.of(backbone))
    x = torch.randn(2, 4, 8, 8)
    expected = backbone.layer2(x)
    assert torch.equal(head.transfer(x), expected + expected)


def test_a_unit_is_its_modules_in_the_backbone_of_now():
    backbone = ToyNet()
    unit, pair = Unit.single('layer2.0', 1), Unit.sequence(('layer2.0', 'layer2.1'), 1)
    assert (unit.name, unit.output, pair.name, pair.output) == ('layer2.0', 'layer2.0', 'layer2.1', 'layer2.1')
    backbone.layer2[0] = nn.Identity()  # as a conversion does
    assert unit.of(backbone) is backbone.layer2[0]
    assert [*pair.of(backbone)] == [*backbone.layer2]


def test_parameters_of_a_unit_are_those_of_its_modules_and_the_backbones_own():
    backbone = ToyNet()
    backbone.token = nn.Parameter(torch.zeros(1))
    unit = Unit('stem', ('stem',), 'stem', 0, tensors=('token',))
    assert [id(p) for p in unit.parameters(backbone)] == [id(p) for p in (*backbone.stem.parameters(), backbone.token)]
    backbone.stem.requires_grad_(False)
    assert unit.is_trainable(backbone)
    backbone.token.requires_grad_(False)
    assert not unit.is_trainable(backbone)


class Merge(nn.Module):
    """Halves both sides of the grid, as Swin's patch merging."""

    def forward(self, x, hw_shape):
        return x[:, : len(x[0]) // 4], (hw_shape[0] // 2, hw_shape[1] // 2)


class Grid(nn.Module):
    def forward(self, x, hw_shape):
        self.seen = hw_shape
        return x + 1


def test_a_sequence_hands_the_grid_on():
    grid = Grid()
    y = UnitSequence([Merge(), grid])(torch.zeros(1, 24, 2), (4, 6))
    assert grid.seen == (2, 3) and torch.equal(y, torch.ones(1, 6, 2))


class Sides(nn.Module):
    def forward(self, x, height, width):
        self.seen = height, width
        return x + 1


def test_a_unit_with_calls_of_its_own_is_called_so():
    backbone = nn.ModuleDict({'sides': Sides(), 'grid': Grid()})
    x = torch.zeros(1, 6, 2)
    unit = Unit('sides', ('sides',), 'sides', 0, calls=(call_with_sides,)).of(backbone)
    assert torch.equal(run_unit(unit, x, (2, 3))[0], x + 1) and backbone['sides'].seen == (2, 3)
    assert Unit.single('grid', 0).of(backbone) is backbone['grid']
    assert run_unit(backbone['grid'], x, (2, 3))[1] == (2, 3)


@pytest.mark.parametrize(
    ('size', 'expected'),
    [((64, 96), (4, 6)), ((65, 81), (5, 6)), ((65, 81), (4, 5)), ((65, 81), (5, 5)), ((1, 16), (1, 1)), ((133, 139), (8, 9))],
)
def test_the_grid_of_tokens_is_that_of_their_number(size, expected):
    """A backbone pads images that are no multiple of the stride, or drops a border."""
    for extra in (0, 2):
        feature = Feature(8, 16, extra)
        assert feature.hw_shape(torch.zeros(1, extra + expected[0] * expected[1], 8), size) == expected
    assert Feature(8, 16).hw_shape(torch.zeros(1, 8, 7, 3), size) == (7, 3)


def test_tokens_that_make_no_grid_of_the_image():
    with pytest.raises(AssertionError, match='7 tokens make no grid of about 4 x 6'):
        Feature(8, 16, 0).hw_shape(torch.zeros(1, 7, 8), (64, 96))


def test_a_unit_takes_features_of_its_channels_and_stride():
    assert Feature(8, 4).fits(Feature(8, 4, 0))
    assert not Feature(8, 4).fits(Feature(8, 8)) and not Feature(8, 4).fits(Feature(4, 4))


def test_features_are_pooled_to_their_class_token_or_their_mean():
    x, tokens = torch.randn(2, 8, 3, 4), torch.randn(2, 13, 8)
    assert Feature(8, 4).as_map(x, (12, 16)) is x
    assert torch.equal(Feature(8, 4).pool(x), x.mean((2, 3)))
    assert torch.equal(Feature(8, 4, 0).pool(tokens), tokens.mean(1))
    assert torch.equal(Feature(8, 4, 1).pool(tokens), tokens[:, 0])


def test_tokens_become_a_map():
    feature = Feature(2, 4, extra_tokens=1)
    tokens = torch.arange(2 * 13 * 2.0).reshape(2, 13, 2)
    as_map = feature.as_map(tokens, (10, 15))  # rounded up to 3 x 4 patches
    assert as_map.shape == (2, 2, 3, 4)
    assert torch.equal(as_map[1, :, 2, 1], tokens[1, 1 + 2 * 4 + 1])
