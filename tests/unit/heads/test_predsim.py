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


def test_the_linear_classifier_of_predsim_has_bounded_input():
    assert local_head('PredSimLocalHead', where=boundary(Feature(512, 4))).head.fc.in_features == 2048
    assert local_head('PredSimLocalHead', where=boundary(Feature(4096, 4))).head.fc.in_features == 4096
