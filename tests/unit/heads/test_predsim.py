"""PredSim: a linear classifier on a pooled map, and the matching of similarities."""

import pytest
import torch
import torch.nn.functional as F

from mmman.heads.predsim import similarity_matrix
from mmman.partition import Feature

pytest.importorskip('mmpretrain')
from tests.unit.heads.classifiers import IMAGES, Y, boundary, local_head, samples


def test_similarity_matrix():
    x = torch.randn(4, 6, dtype=torch.float64)
    s = similarity_matrix(x)
    for i in range(4):
        for k in range(4):
            assert torch.allclose(s[i, k], torch.corrcoef(x[[i, k]])[0, 1])


def test_predsim_is_the_weighted_sum_of_its_losses():
    head = local_head('PredSimLocalHead', beta=0.9)
    losses = head.loss(Y, IMAGES, samples())
    labels = torch.tensor([0, 1, 2, 0])
    prediction = F.cross_entropy(head.head.fc(F.adaptive_avg_pool2d(Y, 16).flatten(1)), labels)
    ours = similarity_matrix(head.similarity(Y).flatten(2).std(2))
    same = similarity_matrix(F.one_hot(labels, 3).float())
    assert torch.allclose(losses['loss_pred'], 0.1 * prediction, rtol=1e-4)
    assert torch.allclose(losses['loss_sim'], 0.9 * (ours - same).square().mean(), rtol=1e-4)


def test_predsim_on_a_map_of_one_pixel():
    head = local_head('PredSimLocalHead', beta=1.0)
    pixel = Y[:, :, :1, :1]
    ours = similarity_matrix(head.similarity(pixel).flatten(1))
    same = similarity_matrix(F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float())
    assert torch.allclose(head.loss(pixel, IMAGES, samples())['loss_sim'], (ours - same).square().mean())


@pytest.mark.parametrize(('channels', 'limit', 'pooled'), [
    (16, 2048, (8, 16)), (32, 2048, (8, 8)), (64, 2048, (4, 8)), (16, 4096, (16, 16)), (512, 2048, (2, 2)),
    (100, 2048, (4, 4)), (4096, 2048, (1, 1)),
])  # fmt: skip
def test_predsim_pools_by_halving_height_and_width_in_turn(channels, limit, pooled):
    head = local_head('PredSimLocalHead', where=boundary(Feature(channels, 4)), max_features=limit)
    assert head.pool_size == pooled
    assert head.head.fc.in_features == channels * pooled[0] * pooled[1]
    y = torch.rand(2, channels, 32, 32)
    assert torch.allclose(head.embed(y, IMAGES), F.avg_pool2d(y, (32 // pooled[0], 32 // pooled[1])).flatten(1))
