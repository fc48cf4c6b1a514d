"""InfoPro: the reconstruction of the image, the classifier or the contrast, and their weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmman.errors import ConfigError
from mmman.heads.infopro import supervised_contrast

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

from tests.unit.heads.classifiers import IMAGES, Model, Session, Y, boundary, local_head, samples


@pytest.mark.parametrize(
    ('value', 'expected'), [(2.0, [2, 2, 2, 2]), ((5.0, 2.0), [5, 4, 3, 2]), ([0.5, 0.0], [0.5, 1 / 3, 1 / 6, 0])]
)
def test_lambda_is_linear_in_the_blocks_index(value, expected):
    heads = [local_head('InfoProLocalHead', where=boundary(block=j, num_blocks=5), lambda_rec=value) for j in (1, 2, 3, 4)]
    assert [head.lambda_rec for head in heads] == pytest.approx(expected)
    only = local_head('InfoProLocalHead', where=boundary(num_blocks=2), lambda_task=value)
    assert only.lambda_task == expected[0]


@pytest.mark.parametrize('classifier', ['1c2f', 'imagenet'])
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
    assert features.shape == (4, 128 if classifier == '1c2f' else 2048)
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
    with pytest.raises(ConfigError, match="'1c2f' or 'imagenet'"):
        local_head('InfoProLocalHead', classifier='2c2f')
    bare = Model()
    bare.data_preprocessor = nn.Identity()
    with pytest.raises(ConfigError, match='Identity does not expose how it normalises'):
        local_head('InfoProLocalHead').check_model(bare)
