import itertools
import math

import pytest
import torch

from mmman.heads.levels import LevelProjection, assign_levels, gt_size_range

PYRAMID = [8, 16, 32, 64, 128]
RETINANET = [(4 * s, 4 * s * 2 ** (2 / 3)) for s in PYRAMID]
ATSS = [(8 * s, 8 * s) for s in PYRAMID]


@pytest.mark.parametrize(
    ('strides', 'expected'),
    [
        ((8, 16, 32), [[0], [1], [2, 3, 4]]),  # RetinaNet K=4 by stages
        ((4, 8, 16), [[0], [0], [1, 2, 3, 4]]),  # the same without a transfer
        ((4, 4, 4), [[0, 1, 2, 3, 4]] * 3),
        ((8,), [[0, 1, 2, 3, 4]]),
        ((16,), [[0, 1, 2, 3, 4]]),
        ((16, 16, 32), [[0, 1], [0, 1], [2, 3, 4]]),
        ((8, 8, 8), [[0, 1, 2, 3, 4]] * 3),  # dilated
    ],
)
def test_levels_of_every_head(strides, expected):
    assert [assign_levels(stride, strides, PYRAMID) for stride in strides] == expected


def test_every_level_and_size_is_covered_for_any_cut():
    sizes = [2.0**e for e in range(1, 12)] + [50, 80, 100, 150, 200, 300]
    for count in (1, 2, 3, 5):
        for strides in itertools.combinations_with_replacement((2, 4, 8, 16, 32, 64), count):
            levels = [assign_levels(stride, strides, PYRAMID) for stride in strides]
            assert set().union(*levels) == set(range(5)), strides
            assert all(own == list(range(own[0], own[-1] + 1)) for own in levels)
            for priors in (RETINANET, ATSS, [(s, s) for s in (8, 64, 512, 4096, 32768)]):
                ranges = [gt_size_range(own, priors) for own in levels]
                assert all(any(low <= size <= high for low, high in ranges) for size in sizes), (strides, priors)


def test_sizes_that_an_anchor_can_match():
    assert gt_size_range([0, 1, 2, 3, 4], RETINANET) == (0, math.inf)
    assert gt_size_range([0], RETINANET) == pytest.approx((0, 32 * 2 ** (2 / 3) * 2**0.5))
    assert gt_size_range([1], RETINANET) == pytest.approx((64 / 2**0.5, 64 * 2 ** (2 / 3) * 2**0.5))
    assert gt_size_range([2, 3, 4], ATSS) == pytest.approx((256 / 2**0.5, math.inf))
    assert gt_size_range([1], [(8, 8), (64, 64), (512, 512)]) == pytest.approx((8**1.5, 64 * 8**0.5))  # gaps are divided


@pytest.mark.parametrize(
    ('stride', 'levels'), [(8, [8]), (4, [8]), (4, [8, 16, 32, 64, 128]), (32, [32, 64, 128]), (16, [8, 16, 32]), (32, [8])]
)
def test_projection_makes_maps_of_the_levels_sizes(stride, levels):
    projection = LevelProjection(5, 7, stride, levels)
    maps = projection(torch.randn(2, 5, 256 // stride, 128 // stride))
    assert [tuple(m.shape) for m in maps] == [(2, 7, 256 // level, 128 // level) for level in levels]
    maps[-1].sum().backward()
    for level, m in zip(levels, maps, strict=True):
        assert m.requires_grad, level


def test_projection_of_the_release():
    """A ReLU before every convolution of a coarser level and after the 1x1 convolution; weights of N(0, 0.01)."""
    torch.manual_seed(0)
    projection = LevelProjection(64, 64, 32, [32, 64, 128], relu=True)
    projection.init_weights()
    for module in (projection.lateral, *projection.down):
        assert module.weight.std().item() == pytest.approx(0.01, rel=0.05) and not module.bias.any()
    x = torch.randn(2, 64, 8, 8)
    expected = [projection.lateral(x).relu()]
    for convolution in projection.down:
        expected.append(convolution(expected[-1].relu()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(projection(x), expected, strict=True))
