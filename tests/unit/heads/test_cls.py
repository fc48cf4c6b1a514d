"""Local heads of classifiers: DGL's network, the loss and the classifier of the model's own head."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmman.errors import ConfigError
from mmman.heads import LinearLocalHead
from mmman.partition import Feature

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

from tests.unit.heads.classifiers import HEAD, IMAGES, Model, Y, boundary, local_head, samples


def test_dgl_shapes():
    head = local_head('DGLLocalHead')
    assert [conv[0].weight.shape[:2] for conv in head.convs] == [(128, 8), (128, 128), (128, 128)]
    assert [fc[0].weight.shape for fc in head.fcs] == [(512, 128), (512, 512), (512, 512)]
    assert head.head.fc.weight.shape == (3, 512)
    seen = []
    head.convs.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    for size in (16, 8, 4):
        head.loss(torch.randn(4, 8, size, size), IMAGES, samples())
    assert seen == [(8, 8), (8, 8), (4, 4)]  # larger maps are pooled


def test_the_linear_head_pools_the_map():
    head = local_head('LinearLocalHead')
    assert head.head.fc.weight.shape == (3, 8)
    assert torch.equal(head.embed(Y, IMAGES), Y.mean((2, 3)))


def test_the_loss_is_the_models_own():
    smooth = {'type': 'mmpretrain.LabelSmoothLoss', 'label_smooth_val': 0.3, 'num_classes': 3}
    head = local_head('DGLLocalHead', {**HEAD, 'loss': smooth}).eval()
    logits = head.head((head.embed(Y, IMAGES),))
    target = F.one_hot(torch.tensor([0, 1, 2, 0]), 3) * 0.7 + 0.1
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(head.loss(Y, IMAGES, samples())['loss'], expected)


def test_soft_targets_of_batch_augmentation():
    score = torch.tensor([0.25, 0.75, 0.0])
    data = [DataSample().set_gt_score(score) for _ in range(4)]
    soft = {**HEAD, 'loss': {'type': 'mmpretrain.CrossEntropyLoss', 'use_soft': True}}
    for kind in ('DGLLocalHead', 'PredSimLocalHead', 'AugLocalHead'):
        head = local_head(kind, soft).eval()
        logits = head.head((head.embed(Y, IMAGES),))
        losses = head.loss(Y, IMAGES, data)
        expected = -(score * logits.log_softmax(1)).sum(1).mean()
        weight = 1 if 'loss' in losses else 1 - head.beta
        assert torch.allclose(next(iter(losses.values())), weight * expected), kind


@pytest.mark.parametrize(
    ('head', 'kind'),
    [
        ({'type': 'VisionTransformerClsHead', 'num_classes': 3, 'in_channels': 7, 'hidden_dim': 5}, 'VisionTransformerClsHead'),
        ({'type': 'ClsHead', 'num_classes': 3}, 'LinearClsHead'),
        ({'type': 'DeiTClsHead', 'num_classes': 3, 'in_channels': 7}, 'VisionTransformerClsHead'),
        ({'type': 'MultiLabelClsHead', 'num_classes': 3}, 'MultiLabelLinearClsHead'),
        ({'type': 'CSRAClsHead', 'num_classes': 3, 'in_channels': 4, 'num_heads': 1, 'lam': 0.1}, 'MultiLabelLinearClsHead'),
        ({'type': 'ArcFaceClsHead', 'num_classes': 3, 'in_channels': 7}, 'ArcFaceClsHead'),
        ({'type': 'StackedLinearClsHead', 'num_classes': 3, 'in_channels': 7, 'mid_channels': [6]}, 'StackedLinearClsHead'),
    ],
)
def test_the_models_head_gives_the_classifier(head, kind):
    built = local_head('DGLLocalHead', head)
    assert type(built.head).__name__ == kind
    assert built.head((torch.randn(2, 512),)).shape == (2, 3)


@pytest.mark.parametrize(
    ('head', 'message'),
    [
        ({'type': 'ClsHead'}, 'does not set num_classes'),
        (
            {'type': 'ConformerHead', 'num_classes': 3, 'in_channels': [4, 5]},
            'ConformerHead cannot .* does not classify a vector',
        ),
        ({'type': 'MultiTaskHead', 'task_heads': {}}, 'MultiTaskHead cannot be .* train each task by a config of its own'),
    ],
)
def test_heads_that_cannot_serve(head, message):
    with pytest.raises(ConfigError, match=message):
        local_head('DGLLocalHead', head)


def test_the_loss_of_a_multi_label_head_with_attention_is_kept():
    own = {'type': 'mmpretrain.CSRAClsHead', 'num_classes': 3, 'in_channels': 4, 'num_heads': 2, 'lam': 0.1, 'thr': 0.4}
    own['loss'] = {'type': 'mmpretrain.CrossEntropyLoss', 'use_sigmoid': True, 'loss_weight': 0.5}
    head = local_head('LinearLocalHead', own).eval()
    scores = torch.tensor([1.0, 0.0, 1.0])
    logits = head.head((head.embed(Y, IMAGES),))
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, scores.expand(4, 3), reduction='sum') / 4
    losses = head.loss(Y, IMAGES, [DataSample().set_gt_score(scores) for _ in range(4)])
    assert torch.allclose(losses['loss'], expected)
    assert head.head.thr == 0.4
    assert LinearLocalHead.task_options({'head': own})['head'].keys() == {'type', 'num_classes', 'thr', 'loss'}


def test_a_margin_takes_the_label():
    """ArcFace's head adds a margin at the label's class before its softmax."""
    own = {'type': 'ArcFaceClsHead', 'num_classes': 3, 'in_channels': 4, 'loss': {'type': 'CrossEntropyLoss'}}
    head = local_head('LinearLocalHead', own)
    plain = F.cross_entropy(head.head((head.embed(Y, IMAGES),)), torch.tensor([0, 1, 2, 0]))
    assert head.loss(Y, IMAGES, samples())['loss'] > plain + 1


def test_identities_of_crops():
    """The head of mmdet's re-identification, with its triplet loss, in a child written by hand."""
    structures = pytest.importorskip('mmdet.structures')
    own = {'type': 'mmdet.LinearReIDHead', 'num_fcs': 1, 'in_channels': 9, 'fc_channels': 8, 'out_channels': 4}
    own |= {'num_classes': 3, 'norm_cfg': {'type': 'BN1d'}, 'act_cfg': {'type': 'ReLU'}}
    own |= {'loss_cls': {'type': 'mmpretrain.CrossEntropyLoss'}, 'loss_triplet': {'type': 'mmdet.TripletLoss', 'margin': 0.3}}
    crops = [structures.ReIDDataSample().set_gt_label(label) for label in (0, 1, 2, 0)]
    losses = local_head('DGLLocalHead', own).loss(Y, IMAGES, crops)
    assert losses['ce_loss'].isfinite() and losses['triplet_loss'].isfinite()


def test_a_retriever_localised_by_hand_trains():
    init_default_scope('mmpretrain')
    backbone = {'type': 'mmman.LocalBackbone', 'backbone': {'type': 'ResNet', 'depth': 18, 'base_channels': 4}, 'num_blocks': 2}
    own = {'type': 'ArcFaceClsHead', 'num_classes': 3, 'in_channels': 32}
    backbone['local_head'] = {'type': 'mmman.DGLLocalHead', 'head': own}
    neck = {'type': 'GlobalAveragePooling'}
    model = MODELS.build({'type': 'ImageToImageRetriever', 'image_encoder': [backbone, neck], 'head': own, 'prototype': 'x'})
    backbone = model.image_encoder[0]
    backbone.local.init_weights()
    for head in backbone.local.values():
        head.transfer.init_from_(head.source.of(backbone))
    wrapper = build_optim_wrapper(model, {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.0}})
    wrapper.zero_grad = lambda: None
    model.train_step({'inputs': IMAGES, 'data_samples': samples()}, wrapper)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_another_number_of_classes_is_refused():
    local_head('DGLLocalHead').check_model(Model(3))
    with pytest.raises(ConfigError, match='the local head has num_classes=3, but the model has 4: set .*num_classes=4'):
        local_head('DGLLocalHead').check_model(Model(4))


@pytest.mark.parametrize(('channels', 'side'), [(16, 32), (32, 16), (64, 8), (512, 28), (64, 3)])
def test_the_original_dgl_head(channels, side):
    """C channels on a quarter of the side, then 2x2 of them and layers of 4C: DGL's mlp-sr, of its VGG too."""
    head = local_head('DGLLocalHead', where=boundary(Feature(channels, 4)), original=True)
    assert [conv[0].weight.shape[:2] for conv in head.convs] == [(channels, channels)] * 3
    assert [fc[0].weight.shape for fc in head.fcs] == [(4 * channels, 4 * channels)] * 3
    assert head.head.fc.weight.shape == (3, 4 * channels)
    seen = []
    head.convs.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    head.loss(torch.randn(4, channels, side, side), IMAGES, samples())
    assert seen == [(-(-side // 4), -(-side // 4))]
    with pytest.raises(ConfigError, match='original=True fixes the sizes .* remove pool_size, conv_channels and fc_channels'):
        local_head('DGLLocalHead', original=True, conv_channels=64)
