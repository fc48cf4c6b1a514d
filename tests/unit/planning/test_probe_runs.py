"""The two small batches that a plan is measured on, and bytes that are counted by hand."""

import pytest
import torch
from torch import nn

from mmman.partition import Chain, Unit, chain_of
from mmman.planning.probe_runs import (
    ProbeBatch,
    gradient_bytes,
    held_bytes,
    outputs_observed,
    probe_sizes,
    static_bytes,
)
from tests.toy import ToyNet

STAGED = Chain((Unit.single('a', 0), Unit.single('b', 1)), (1,))
PLAIN = Chain((Unit.single('a', 0), Unit.single('b', 0)), (1,))
TOKENS = Chain(STAGED.units, (1,), extra_tokens=1)
WINDOWS = Chain(STAGED.units, (1,), needs_hw_shape=True)
ATTENDING = Chain(STAGED.units, (1,), needs_hw_shape=True, attends_everywhere=True)


@pytest.mark.parametrize(
    ('chain', 'asked', 'scope', 'expected'),
    [
        # small images, and units that attend to all tokens: another number of images
        (STAGED, (32, 32, None), 'mmpretrain', [(2, 32, 32), (4, 32, 32)]),
        (TOKENS, (384, 512, None), 'mmpretrain', [(2, 384, 512), (4, 384, 512)]),
        (PLAIN, (512, 512, None), 'mmseg', [(2, 512, 512), (4, 512, 512)]),
        (ATTENDING, (512, 512, None), 'mmseg', [(2, 512, 512), (4, 512, 512)]),
        # of them a few images at a time: the images that are asked for, and half of each
        (ATTENDING, (800, 1344, 2), 'mmdet', [(2, 800, 672), (2, 800, 1344)]),
        (TOKENS, (224, 224, 8), 'mmpretrain', [(8, 224, 96), (8, 224, 224)]),
        (TOKENS, (32, 32, 8), 'mmpretrain', [(8, 32, 32), (8, 32, 64)]),
        # larger ones: other sizes
        (STAGED, (512, 1024, None), 'mmseg', [(2, 128, 128), (2, 128, 256)]),
        (STAGED, (800, 1344, None), 'mmdet', [(2, 128, 128), (2, 128, 256)]),
        (WINDOWS, (800, 1344, None), 'mmdet', [(2, 224, 224), (2, 224, 448)]),
        # parts that run on a few images at a time: all images
        (STAGED, (800, 1344, 16), 'mmdet', [(16, 128, 128), (16, 128, 256)]),
        (STAGED, (512, 512, 8), 'mmseg', [(8, 64, 64), (8, 64, 128)]),
        (STAGED, (32, 32, 8), 'mmpretrain', [(8, 32, 32), (8, 32, 64)]),
    ],
)
def test_sizes(chain, asked, scope, expected):
    height, width, images = asked
    assert probe_sizes(chain, height, width, images, scope) == expected


def test_every_unit_is_observed_inside_the_context_only():
    backbone, seen = ToyNet(), []
    chain = chain_of(backbone)
    x = torch.randn(1, 3, 8, 8)
    with outputs_observed(backbone, chain, lambda i, output: seen.append((i, tuple(output.shape)))):
        backbone(x)
    assert [i for i, _ in seen] == [*range(7)]
    assert [seen[i][1] for i in (0, 3, 6)] == [(1, 4, 8, 8), (1, 8, 4, 4), (1, 16, 2, 2)]
    backbone(x)
    assert len(seen) == 7


def test_bytes_of_parameters_gradients_and_optimizer_state():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    trained = 4 * (2 + 2 + 2)  # a bias, and the norm's weight and bias
    assert gradient_bytes(module.parameters()) == trained
    assert static_bytes(module, 2.0) == 4 * 6 + trained + 4 * (2 + 2) + 8 + 2 * trained  # running statistics and their count


def test_a_batch_counts_before_and_after_its_preprocessor():
    raw = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert held_bytes(ProbeBatch({'inputs': raw}, raw.float(), [torch.zeros(5)])) == 96 + 4 * 96 + 20
    assert held_bytes(ProbeBatch({'inputs': raw}, raw, [])) == 96  # the same memory counts once
