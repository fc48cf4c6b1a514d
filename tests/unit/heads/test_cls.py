"""The local heads of classifiers: what each computes, on numbers that can be checked by hand."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmman import MomentumTransfer
from mmman.analysis import LiveBytes
from mmman.errors import ConfigError
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


def boundary(feature=MAP, block=1, num_blocks=4, following=()):
    modules, features = zip(*following, strict=True) if following else ((), ())
    return Boundary(block, num_blocks, 'u', Unit.single('v', 0), feature, feature, False, (4,), modules, features)


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


def test_the_linear_classifier_of_predsim_has_bounded_input():
    assert local_head('PredSimLocalHead', where=boundary(Feature(512, 4))).head.fc.in_features == 2048
    assert local_head('PredSimLocalHead', where=boundary(Feature(4096, 4))).head.fc.in_features == 4096


# ---- AugLocal


def conv(inputs, outputs, stride):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


FOLLOWING = [
    (conv(8, 8, 1), Feature(8, 4)), (conv(8, 16, 2), Feature(16, 8)), (conv(16, 16, 1), Feature(16, 8)),
    (conv(16, 32, 2), Feature(32, 16)), (conv(32, 32, 1), Feature(32, 16)),
]  # fmt: skip


@pytest.mark.parametrize(
    ('depth', 'chosen'), [(1, [4]), (2, [1, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_auglocal_spreads_its_units_evenly_up_to_the_last(depth, chosen):
    head = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=depth)
    assert [unit.weight.shape for unit in head.units] == [FOLLOWING[i][0].weight.shape for i in chosen]
    assert not any(torch.equal(unit.weight, FOLLOWING[i][0].weight) for unit, i in zip(head.units, chosen, strict=True))
    assert head.embed(Y, IMAGES).shape == (4, 32)


def test_auglocal_adapts_neighbours_that_do_not_fit():
    head = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=2)
    assert head.adapters[0].project is None
    between = head.adapters[1].project[0]  # from unit 1 to unit 4
    assert (between.in_channels, between.out_channels, between.stride) == (16, 32, (2, 2))
    jump = local_head('AugLocalHead', where=boundary(following=FOLLOWING), depth=1).adapters[0].project[0]
    assert (jump.in_channels, jump.out_channels, jump.stride) == (8, 32, (4, 4))


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
