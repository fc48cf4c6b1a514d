"""InfoPro: the reconstruction of the image, the classifier or the contrast, and their weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmman.errors import ConfigError
from mmman.heads.infopro import supervised_contrast
from mmman.partition import Feature

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

from tests.unit.heads.classifiers import IMAGES, Model, Session, Y, boundary, local_head, samples


@pytest.mark.parametrize('classifier', ['1c2f', '2c2f', 'imagenet'])
@pytest.mark.parametrize('contrast', [False, True])
def test_infopro_is_the_weighted_sum_of_its_losses(classifier, contrast):
    head = local_head('InfoProLocalHead', classifier=classifier, contrast=contrast, lambda_rec=3.0, lambda_task=0.5)
    head.session = Session()
    head.session.model = Model(mean=[120.0, 110, 100], std=[60.0, 50, 40])
    inputs = head.session.model.data_preprocessor({'inputs': IMAGES * 255})['inputs']
    head.eval()
    losses = head.loss(Y, inputs, samples())
    rec = F.binary_cross_entropy(head.decoder(Y, (32, 32)).sigmoid(), IMAGES)
    assert torch.allclose(losses['loss_rec'], 3 * rec, rtol=1e-4)
    features = head.embed(Y, inputs)
    assert features.shape == (4, 2048 if classifier == 'imagenet' else 128)
    labels = torch.tensor([0, 1, 2, 0])
    task = (
        supervised_contrast(head.contrast(features), labels, 0.07)
        if contrast
        else F.cross_entropy(head.head.fc(features), labels)
    )
    assert torch.allclose(losses['loss_task'], 0.5 * task)


def test_reconstruction_under_autocast_is_in_single_precision():
    head = local_head('InfoProLocalHead')
    head.session = Session()
    head.session.model = Model()
    with torch.autocast('cpu', torch.bfloat16):
        losses = head.loss(Y, 255 * IMAGES, samples())
    assert losses['loss_rec'].dtype == torch.float32


def test_supervised_contrast_equals_the_sum_over_pairs():
    features = torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    z = F.normalize(features.float(), dim=1)
    per_image = []
    for i in range(6):
        others = [k for k in range(6) if k != i]
        denominator = sum((z[i] @ z[k] / 0.5).exp() for k in others)
        same = [k for k in others if labels[k] == labels[i]]
        if same:
            per_image.append(-sum(((z[i] @ z[k] / 0.5).exp() / denominator).log() for k in same) / len(same))
    assert torch.allclose(supervised_contrast(features, labels, 0.5), torch.stack(per_image).mean())
    alone = supervised_contrast(features.requires_grad_(), torch.arange(6), 0.5)
    assert alone.item() == 0
    alone.backward()
    assert not features.grad.isnan().any()


def test_contrast_needs_hard_labels():
    head = local_head('InfoProLocalHead', contrast=True)
    head.session = Session()
    head.session.model = Model()
    with pytest.raises(ConfigError, match=r'Mixup, CutMix.*contrast=False'):
        head.loss(Y, 255 * IMAGES, [DataSample().set_gt_score(torch.ones(3) / 3) for _ in range(4)])


def test_infopro_options_are_checked():
    with pytest.raises(ConfigError, match="'1c2f', '2c2f' or 'imagenet'"):
        local_head('InfoProLocalHead', classifier='3c2f')
    bare = Model()
    bare.data_preprocessor = nn.Identity()
    with pytest.raises(ConfigError, match='Identity does not expose how it normalises'):
        local_head('InfoProLocalHead').check_model(bare)


@pytest.mark.parametrize(('channels', 'width', 'stride'), [(16, 32, 2), (32, 64, 2), (64, 64, 1), (128, 64, 1)])
@pytest.mark.parametrize('classifier', ['1c2f', '2c2f'])
def test_the_small_classifier_of_infopro(classifier, channels, width, stride):
    head = local_head('InfoProLocalHead', where=boundary(Feature(channels, 4)), classifier=classifier)
    first, *more = [module for module in head.convs if isinstance(module, nn.Conv2d)]
    assert (first.out_channels, first.kernel_size, first.stride) == (width, (3, 3), (stride, stride))
    assert [(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) for conv in more] == [
        (width, width, (3, 3), (1, 1))
    ] * (classifier == '2c2f')
    assert head.fc[0].weight.shape == (128, width)


@pytest.mark.parametrize(('num_blocks', 'unit', 'stage', 'expected'), [
    (16, 'stem', 0, 5), (16, 'u', 0, 5 * 13 / 14), (16, 'u', 1, 5 * 12 / 14), (16, 'u', 2, 5 * 11 / 14),
    (8, 'u', 2, 2.5), (32, 'u', 2, 4.5), (55, 'u', 2, 5 * 50 / 53),
    (4, 'u', 0, 2.5), (4, 'u', 1, 0), (4, 'u', 3, 0),  # never beyond the last value
    (3, 'u', 2, 0), (2, 'u', 3, 5),
])  # fmt: skip
def test_lambda_is_linear_in_the_stage(num_blocks, unit, stage, expected):
    where = boundary(num_blocks=num_blocks, unit=unit, stage=stage)
    head = local_head('InfoProLocalHead', where=where, lambda_rec=(5.0, 0.0), lambda_task=[0.5, 0.0])
    assert (head.lambda_rec, head.lambda_task) == pytest.approx((expected, expected / 10))
    head = local_head('InfoProLocalHead', where=where, lambda_rec=2.0)
    assert head.lambda_rec == 2
