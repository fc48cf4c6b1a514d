"""The local head of segmentors: what it takes from the model's own head, and which networks serve."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

from mmman import MomentumTransfer
from mmman.errors import ConfigError
from mmman.heads import SegLocalHead
from mmman.local import Boundary
from mmman.partition import Feature, Unit

pytest.importorskip('mmseg')
from mmseg.models import FCNHead

OWN = {'type': 'UPerHead', 'in_channels': [1, 2], 'in_index': [0, 1], 'channels': 9, 'num_classes': 4, 'align_corners': True}
Y = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


FEATURE = Feature(8, 4)


def local_head(decode_head=OWN, num_blocks=2, stage=0, **options):
    init_default_scope('mmseg')
    where = Boundary(1, num_blocks, 'u', Unit.single('v', stage), FEATURE, FEATURE, False, (4,), next_stage=stage)
    transfer = MomentumTransfer(nn.Identity(), FEATURE, ema=False, bias=False, scale=False)
    config = {'type': 'mmman.SegLocalHead', 'decode_head': decode_head, 'boundary': where, 'transfer': transfer}
    return MODELS.build({**config, **options})


def samples(ignored=255):
    from mmseg.structures import SegDataSample

    labels = torch.randint(4, (2, 1, 32, 32), generator=torch.Generator().manual_seed(2))
    labels[:, :, :3] = ignored
    return [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]


def targets(data):
    return torch.cat([sample.gt_sem_seg.data for sample in data])


def test_the_default_network_is_one_convolution():
    head = local_head().decode_head
    assert type(head).__name__ == 'FCNHead'
    assert [conv.conv.weight.shape for conv in head.convs] == [(256, 8, 3, 3)]
    assert head.conv_seg.weight.shape == (4, 256, 1, 1)
    assert head.align_corners


@pytest.mark.parametrize('weights', [None, [1.0, 2.0, 3.0, 4.0]])
def test_the_loss_is_the_models_own(weights):
    loss = {'type': 'CrossEntropyLoss', 'loss_weight': 0.7, 'class_weight': weights, 'avg_non_ignore': True}
    head = local_head({**OWN, 'ignore_index': 200, 'loss_decode': loss}).eval()
    data = samples(ignored=0 if weights else 200)  # mmseg cannot weight classes where a pixel is ignored
    losses = head.loss(Y, IMAGES, data)
    logits = F.interpolate(head.decode_head((Y,)), (32, 32), mode='bilinear', align_corners=True)
    weights = weights and torch.tensor(weights)
    assert torch.allclose(losses['loss_ce'], 0.7 * F.cross_entropy(logits, targets(data), weights, ignore_index=200), rtol=1e-5)
    assert set(losses) == {'loss_ce', 'acc_seg'}


def test_hard_pixels():
    sampler = {'type': 'OHEMPixelSampler', 'thresh': 0.7, 'min_kept': 10}
    head = local_head({**OWN, 'sampler': sampler}).eval()
    assert type(head.decode_head.sampler).__name__ == 'OHEMPixelSampler'
    assert head.loss(Y, IMAGES, samples())['loss_ce'] != local_head().eval().loss(Y, IMAGES, samples())['loss_ce']


def test_several_losses():
    several = [{'type': 'CrossEntropyLoss', 'loss_name': 'loss_ce'}, {'type': 'DiceLoss', 'loss_name': 'loss_dice'}]
    head = local_head({**OWN, 'loss_decode': several}, lambda_task=0.5).eval()
    whole = head.decode_head.loss((Y,), samples(), {})
    assert set(whole) == {'loss_ce', 'loss_dice', 'acc_seg'}
    for name, value in head.loss(Y, IMAGES, samples()).items():
        assert torch.allclose(value, 0.5 * whole[name] if 'loss' in name else whole[name]), name


def test_reconstruction_is_a_loss_beside_the_heads():
    head = local_head(lambda_rec=1.5).eval()
    preprocessor = MODELS.build({'type': 'SegDataPreProcessor', 'mean': [120.0, 110, 100], 'std': [60.0, 50, 40]})
    head.session = SimpleNamespace(model=SimpleNamespace(data_preprocessor=preprocessor))
    inputs = (IMAGES * 255 - preprocessor.mean) / preprocessor.std
    losses = head.loss(Y, inputs, samples())
    expected = F.binary_cross_entropy(head.decoder(Y, (32, 32)).sigmoid(), IMAGES)
    assert torch.allclose(losses['loss_rec'], 1.5 * expected, rtol=1e-4)
    assert local_head().decoder is None


def test_lambdas_are_linear_in_the_stage():
    heads = [local_head(num_blocks=6, stage=i, lambda_rec=(3.0, 1.0), lambda_task=(1.0, 0.0)) for i in (0, 1, 3)]
    assert [head.lambda_rec for head in heads] == [2.5, 2, 1]
    assert [head.lambda_task for head in heads] == [0.75, 0.5, 0]


@pytest.mark.parametrize(
    'network',
    [
        {'type': 'ASPPHead', 'channels': 8, 'dilations': (1, 2)},
        {'type': 'PSPHead', 'channels': 8},
        {'type': 'mmseg.FCNHead', 'channels': 8, 'num_convs': 2, 'dropout_ratio': 0},
        {'type': 'DepthwiseSeparableASPPHead', 'channels': 8, 'c1_in_channels': 0, 'c1_channels': 0, 'dilations': (1, 2)},
    ],
    ids=lambda network: network['type'],
)
def test_any_single_level_head_serves(network):
    head = local_head(network=network).eval()
    assert head.decode_head.num_classes == 4
    head.loss(Y, IMAGES, samples())['loss_ce'].backward()


@pytest.mark.parametrize(
    ('network', 'reason'),
    [
        ({'type': 'UPerHead', 'channels': 8}, 'cannot be built for one feature map'),
        ({'type': 'FPNHead', 'channels': 8, 'feature_strides': [4]}, 'cannot be built for one feature map'),
        ({'type': 'PointHead', 'channels': 8}, ''),
        (
            {'type': 'DepthwiseSeparableASPPHead', 'channels': 8, 'c1_in_channels': 4, 'c1_channels': 2},
            'requires low-level features: set c1_in_channels=0',
        ),
    ],
)
def test_other_heads_are_refused_by_name(network, reason):
    with pytest.raises(ConfigError, match=f'{network["type"]} cannot be a local segmentation head: .*{reason}'):
        local_head(network=network)


def test_of_a_cascade_the_last_head_counts():
    cascade = [{'type': 'FCNHead', 'num_classes': 4}, {'type': 'PointHead', 'num_classes': 4, 'align_corners': True}]
    assert local_head(cascade).decode_head.align_corners


def test_of_k_net_the_head_that_makes_its_kernels_counts():
    k_net = {
        'type': 'IterativeDecodeHead',
        'num_stages': 1,
        'kernel_update_head': [{'type': 'KernelUpdateHead', 'num_classes': 4, 'in_channels': 512}],
        'kernel_generate_head': {**OWN, 'ignore_index': 7, 'loss_decode': {'type': 'CrossEntropyLoss', 'loss_weight': 0.3}},
    }
    head = local_head(k_net).decode_head
    assert (head.num_classes, head.ignore_index, head.align_corners, head.loss_decode.loss_weight) == (4, 7, True, 0.3)


@pytest.mark.parametrize('kind', ['Mask2FormerHead', 'MaskFormerHead'])
def test_of_a_head_that_predicts_masks_only_the_classes_count(kind):
    """Its ``out_channels`` is the width of its features, and its losses are not of pixels."""
    own = {'type': kind, 'num_classes': 4, 'out_channels': 256, 'align_corners': True, 'loss_decode': {'type': 'L1Loss'}}
    head = local_head(own).decode_head
    assert (head.num_classes, head.out_channels, head.align_corners) == (4, 4, True)
    assert type(head.loss_decode).__name__ == 'CrossEntropyLoss'


@pytest.mark.parametrize('kind', ['Mask2FormerHead', 'IterativeDecodeHead'])
def test_what_is_compared_is_what_local_heads_take(kind):
    """Another loss of a head that predicts masks is no difference, and the classes of a nested head are one."""
    init_default_scope('mmseg')
    own = {'num_classes': 4, 'align_corners': True, 'loss_decode': {'type': 'CrossEntropyLoss'}}
    options = {
        'Mask2FormerHead': {'type': kind, **own, 'out_channels': 256},
        'IterativeDecodeHead': {'type': kind, 'kernel_generate_head': {**own, 'type': 'FCNHead', 'channels': 512}},
    }[kind]
    expected = own if kind == 'IterativeDecodeHead' else {'num_classes': 4, 'align_corners': True}
    assert SegLocalHead.task_options({'decode_head': options}) == {'decode_head': expected}


@pytest.mark.parametrize(
    ('own', 'network', 'reason', 'advice'),
    [
        (
            {'type': 'IterativeDecodeHead'},
            None,
            'IterativeDecodeHead does not set num_classes',
            'decode_head=dict(num_classes=',
        ),
        (
            {**OWN, 'out_channels': 3},
            None,
            'FCNHead .*out_channels should be equal',
            'local_head.decode_head=dict(num_classes=',
        ),
        ({**OWN, 'loss_decode': {'type': 'BoundaryLoss'}}, None, 'FCNHead .*fails on one feature map', 'loss_decode=...'),
        (OWN, {'type': 'FCNHead', 'channels': 8, 'num_convs': -1}, 'FCNHead .*cannot be built', 'e.g. ASPPHead, PSPHead'),
        (OWN, {'type': 'ASPPHead', 'channels': 8, 'dilations': (1.5,)}, 'ASPPHead .*cannot be', 'e.g. FCNHead, PSPHead'),
    ],
)
def test_advice_can_be_followed(own, network, reason, advice):
    """It does not name the class that was refused; what a dry run finds is refused too."""
    with pytest.raises(ConfigError, match=reason) as refused:
        local_head(own, network=network)
    assert advice in str(refused.value)


@MODELS.register_module()
class IdleDecodeHead(FCNHead):
    """A decode head with a layer that its loss does not see."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.idle = nn.Linear(2, 2)


def test_what_the_loss_does_not_reach_is_frozen():
    head = local_head(network={'type': 'mmengine.IdleDecodeHead', 'channels': 8}).decode_head
    assert [name for name, p in head.named_parameters() if not p.requires_grad] == ['idle.weight', 'idle.bias']


def test_another_number_of_classes_is_refused():
    head = local_head()
    head.check_model(SimpleNamespace(num_classes=4))
    with pytest.raises(ConfigError, match='num_classes=4, but the model has 19: set .*decode_head.num_classes=19'):
        head.check_model(SimpleNamespace(num_classes=19))


def test_images_must_be_restorable():
    with pytest.raises(ConfigError, match='NoneType does not expose how it normalises'):
        local_head(lambda_rec=1.0).check_model(SimpleNamespace(num_classes=4))
