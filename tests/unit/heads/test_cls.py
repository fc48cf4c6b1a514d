"""The local heads of classifiers: what each computes, on numbers that can be checked by hand."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmman import MomentumTransfer
from mmman.analysis import LiveBytes
from mmman.errors import ConfigError
from mmman.heads.auglocal import _sampled_units
from mmman.heads.infopro import supervised_contrast
from mmman.heads.predsim import similarity_matrix
from mmman.heads.reconstruction import ReconstructionDecoder, reconstruction_loss, restore_pixels
from mmman.heads.vit import forward_class_token
from mmman.local import Boundary
from mmman.memory.recompute import recompute_
from mmman.partition import Feature, Unit

pytest.importorskip('mmpretrain')
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.structures import DataSample

MAP = Feature(8, 4)
HEAD = {
    'type': 'mmpretrain.LinearClsHead',
    'num_classes': 3,
    'in_channels': 99,
    'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
}


def boundary(feature=MAP, block=1, num_blocks=4, following=(), unit='u', stage=0, position=0):
    modules, features = zip(*following, strict=True) if following else ((), ())
    source = Unit.single('v', stage)
    return Boundary(block, num_blocks, unit, source, feature, feature, False, (4,), modules, features, position=position)


def local_head(kind, head=HEAD, where=None, **options):
    init_default_scope('mmpretrain')
    where = where or boundary()
    transfer = MomentumTransfer(nn.Identity(), where.feature, ema=False, bias=False, scale=False)
    return MODELS.build({'type': f'mmman.{kind}', 'head': head, 'boundary': where, 'transfer': transfer, **options})


def samples(labels=(0, 1, 2, 0), **metainfo):
    return [DataSample(metainfo=metainfo).set_gt_label(label) for label in labels]


Y = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """As much of a model as a head looks at."""

    def __init__(self, num_classes=3, **preprocessor):
        super().__init__()
        self.head = nn.Module()
        self.head.num_classes = num_classes
        self.data_preprocessor = MODELS.build({'type': 'mmpretrain.ClsDataPreprocessor', **preprocessor})


class Session:
    model = None


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
        ({'type': 'CSRAClsHead', 'num_classes': 3, 'in_channels': 4, 'num_heads': 1, 'lam': 0.1}, 'CSRAClsHead cannot be'),
        ({'type': 'MultiTaskHead', 'task_heads': {}}, 'MultiTaskHead cannot be a local classification head'),
    ],
)
def test_heads_that_cannot_serve(head, message):
    with pytest.raises(ConfigError, match=message):
        local_head('DGLLocalHead', head)


def test_another_number_of_classes_is_refused():
    local_head('DGLLocalHead').check_model(Model(3))
    with pytest.raises(ConfigError, match='the local head has num_classes=3, but the model has 4: set .*num_classes=4'):
        local_head('DGLLocalHead').check_model(Model(4))


# ---- InfoPro


def test_pixels_are_restored():
    raw = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    for options in ({'mean': [120.0, 110, 100], 'std': [60.0, 50, 40]}, {}):
        model = Model(**options)
        inputs = model.data_preprocessor({'inputs': raw})['inputs']
        assert torch.allclose(restore_pixels(inputs, model.data_preprocessor), raw / 255, atol=1e-6)
    swapped = Model(mean=[120.0, 110, 100], std=[60.0, 50, 40], to_rgb=True)
    inputs = swapped.data_preprocessor({'inputs': raw})['inputs']
    assert torch.allclose(restore_pixels(inputs, swapped.data_preprocessor), raw.flip(1) / 255, atol=1e-6)


def test_reconstruction_loss_leaves_padding_out():
    logits = torch.randn(2, 3, 6, 8)
    images = torch.rand(2, 3, 6, 8)
    data = [DataSample(metainfo={'img_shape': (4, 8)}), DataSample(metainfo={'img_shape': (6, 5)})]
    every = F.binary_cross_entropy(logits.sigmoid(), images, reduction='none')
    inside = torch.cat([every[0, :, :4, :8].flatten(), every[1, :, :6, :5].flatten()])
    assert torch.allclose(reconstruction_loss(logits, images, data), inside.mean())
    everything = F.binary_cross_entropy(logits.sigmoid(), images)
    assert torch.allclose(
        reconstruction_loss(logits, images, [DataSample(), DataSample(metainfo={'img_shape': (9, 9)})]), everything
    )


@pytest.mark.parametrize(('stepwise', 'stride', 'widths'), [
    (False, 1, [12, 3]), (False, 4, [12, 3]), (True, 1, [3]), (True, 2, [3]), (True, 8, [32, 12, 3]),
    (True, 16, [64, 32, 12, 3]), (True, 32, [64, 64, 32, 12, 3]),
])  # fmt: skip
def test_decoder_widths_and_size(stepwise, stride, widths):
    decoder = ReconstructionDecoder(16, stride, stepwise)
    assert [(conv[0] if isinstance(conv, nn.Sequential) else conv).out_channels for conv in decoder.convs] == widths
    size = (4 * stride, 6 * stride - (stride > 4))  # a width that strides don't divide
    assert decoder(torch.randn(2, 16, 4, 6), size).shape == (2, 3, *size)


@pytest.mark.parametrize(('channels', 'stride', 'widths', 'kernels'), [
    (512, 8, [128, 32, 12, 3], [1, 3, 3, 3]),  # InfoPro on ImageNet
    (1024, 8, [128, 32, 12, 3], [1, 3, 3, 3]),  # InfoPro on Cityscapes
    (1024, 16, [192, 64, 32, 12, 3], [1, 1, 3, 3, 3]),  # MAN++ on ImageNet
    (256, 4, [64, 12, 3], [1, 3, 3]), (2048, 32, [192, 64, 64, 32, 12, 3], [1, 1, 1, 3, 3, 3]),
])  # fmt: skip
def test_decoders_of_the_authors(channels, stride, widths, kernels):
    decoder = ReconstructionDecoder(channels, stride, stepwise=True)
    convs = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.out_channels, conv.kernel_size[0]) for conv in convs] == [*zip(widths, kernels, strict=True)]


@pytest.mark.parametrize('stepwise', [False, True])
def test_decoders_align_corners(stepwise):
    """A pixel at a corner of the image sees the feature at that corner alone."""
    decoder = ReconstructionDecoder(4, 4, stepwise)
    decoder.reduce, decoder.convs = nn.Identity(), nn.ModuleList([nn.Identity() for _ in decoder.convs])
    y = torch.rand(1, 4, 3, 5)
    assert torch.equal(decoder(y, (12, 20))[..., ::11, ::19], y[..., ::2, ::4])


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


# ---- PredSim


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


# ---- AugLocal


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


def test_auglocal_where_nothing_follows():
    head = local_head('AugLocalHead')
    assert torch.equal(head.embed(Y, IMAGES), Y.mean((2, 3)))
    with pytest.raises(ConfigError, match='depth=0'):
        local_head('AugLocalHead', depth=0)


# ---- ViT


TOKENS = Feature(8, 8, extra_tokens=1)
X = torch.randn(4, 17, 8)


def test_vit_head_is_layer_norm_token_linear():
    layer = nn.Linear(8, 8)
    head = local_head('ViTLocalHead', where=boundary(TOKENS, following=[(layer, TOKENS), (nn.Linear(8, 8), TOKENS)]))
    assert len(head.layers) == 1
    assert head.layers[0] is not layer
    assert torch.equal(head.embed(X, IMAGES), F.layer_norm(head.layers[0](X), (8,), eps=1e-6)[:, 0])
    assert local_head('ViTLocalHead', where=boundary(TOKENS)).embed(X, IMAGES).shape == (4, 8)


@pytest.mark.parametrize(('pool', 'tokens'), [(None, 1), ('cls_token', 1), ('mean', 1), (None, 0), ('mean', 0), (None, 2)])
def test_what_the_vit_head_classifies(pool, tokens):
    head = local_head('ViTLocalHead', where=boundary(Feature(8, 8, tokens)), pool=pool)
    normed = F.layer_norm(X, (8,), eps=1e-6)
    expected = normed[:, 0] if tokens and pool != 'mean' else normed[:, tokens:].mean(1)
    assert torch.equal(head.embed(X, IMAGES), expected)


def encoder_layer(seed, **options):
    torch.manual_seed(seed)
    layer = TransformerEncoderLayer(8, 2, 16, **options).double().train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('layers', [0, 1, 2])
def test_only_the_class_token_is_computed(layers, recompute):
    """The values and gradients of whole layers, of which the class token is taken, in fewer FLOPs."""
    source, *following = (encoder_layer(seed) for seed in range(3))
    where = boundary(TOKENS, following=[(layer, TOKENS) for layer in following])
    transfer = MomentumTransfer(source, TOKENS)
    head = MODELS.build(
        {'type': 'mmman.ViTLocalHead', 'head': HEAD, 'boundary': where, 'transfer': transfer, 'layers': layers}
    ).double()
    assert len(head.layers) == layers
    if recompute:
        for layer in (*head.layers, *transfer.copies):
            recompute_(layer)
    results, flops = [], []
    for is_whole in (False, True):
        x = X.double().requires_grad_()
        head.zero_grad()
        with LiveBytes() as counter:
            if is_whole:
                y = transfer(x)
                for layer in head.layers:
                    y = layer(y)
                feature = F.layer_norm(y, (8,), eps=1e-6)[:, 0]
            else:
                feature = head.embed(head.apply_transfer(x, IMAGES), IMAGES)
            feature.square().sum().backward()
        flops.append(counter.flops)
        own = [p.grad for p in (*transfer.bias.parameters(), *head.layers.parameters())]
        assert all(gradient.any() for gradient in own)
        results.append([feature.detach(), x.grad, transfer.delta.grad, *own])
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-11)
    assert flops[0] < (0.4 if layers == 0 else 1) * flops[1]


@pytest.mark.parametrize('options', [{'qkv_bias': False}, {'layer_scale_init_value': 0.3}, {'attn_drop_rate': 0.5}])
def test_the_class_token_of_a_layer_with_options(options):
    layer = encoder_layer(0, **options).train('attn_drop_rate' not in options)  # whose numbers are others when it trains
    torch.testing.assert_close(forward_class_token(layer, X.double()), layer(X.double())[:, :1], rtol=1e-10, atol=1e-11)


def test_dropped_answers_leave_the_bias_of_values_out():
    layer, x = encoder_layer(0, attn_drop_rate=1 - 1e-9), X.double()
    seen = forward_class_token(layer, x)
    layer.attn.qkv.bias.data[16:] += 1.0
    assert torch.equal(forward_class_token(layer, x), seen)


def test_the_class_token_of_an_attention_that_is_another():
    layer = encoder_layer(0)
    expected = layer(X.double())[:, :1]
    layer.attn.qkv = nn.Sequential(layer.attn.qkv)  # an adapter around it, say
    torch.testing.assert_close(forward_class_token(layer, X.double()), expected, rtol=1e-10, atol=1e-11)


def test_vit_head_options_are_checked():
    with pytest.raises(ConfigError, match='layers=-1: expected an integer >= 0'):
        local_head('ViTLocalHead', where=boundary(TOKENS), layers=-1)
    with pytest.raises(ConfigError, match='requires a transformer; .*DGLLocalHead'):
        local_head('ViTLocalHead')
    with pytest.raises(ConfigError, match="choose 'mean'$"):
        local_head('ViTLocalHead', where=boundary(Feature(8, 8, 0)), pool='cls_token')


def test_tokens_become_a_map():
    feature = Feature(2, 4, extra_tokens=1)
    tokens = torch.arange(2 * 13 * 2.0).reshape(2, 13, 2)
    as_map = feature.as_map(tokens, (10, 15))  # rounded up to 3 x 4 patches
    assert as_map.shape == (2, 2, 3, 4)
    assert torch.equal(as_map[1, :, 2, 1], tokens[1, 1 + 2 * 4 + 1])
