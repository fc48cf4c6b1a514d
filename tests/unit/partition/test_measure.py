"""The dry run: which image a backbone is measured on, and the channels and strides that it shows."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmman import LocalLearningOptimWrapper, localize_, register_chain
from mmman.errors import UnsupportedBackboneError
from mmman.partition import Chain, Feature, Unit, chain_of, measure
from tests.toy import toy_batches
from tests.unit.partition.off import HEAD, build


class Stages(nn.Module):
    """Convolutions of given strides, one output; what a subclass does with the image comes first."""

    def __init__(self, strides=(2, 2, 2, 2), channels=3, size=None, padding=1):
        super().__init__()
        self.side = nn.Conv2d(77, 1, 1)  # the first convolution of `modules()` doesn't see the image
        self.size, widths = size, [channels, *(4 for _ in strides)]
        self.units = nn.Sequential(*(nn.Conv2d(a, 4, 3, stride, padding) for a, stride in zip(widths, strides, strict=False)))

    def forward(self, x):
        if self.size and not self.size(*x.shape[2:]):
            raise AssertionError(f'no image of {tuple(x.shape[2:])}')
        return (self.units(self.rearranged(x)),)

    def rearranged(self, x):
        return x


class Focus(Stages):
    """Four pixels become one with four times the channels (YOLOX)."""

    def __init__(self, channels=3, **options):
        super().__init__(channels=4 * channels, **options)
        del self.side

    def rearranged(self, x):
        return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)


@register_chain(f'{Stages.__module__}.Stages')
def stages_chain(backbone):
    units = tuple(Unit.single(f'units.{i}', i) for i in range(len(backbone.units)))
    return Chain(units, (len(units) - 1,))


def measured(backbone):
    return measure(backbone, chain_of(backbone))


def strides(found):
    return [feature.stride for feature in found.features]


def test_larger_images_are_tried():
    found = measured(Stages(size=lambda h, w: h >= 200))
    assert found.image_size == (224, 224) and strides(found) == [2, 4, 8, 16]
    assert measured(Stages()).image_size == (64, 64)


def test_the_last_error_is_reported_with_the_name():
    message = r'^Stages cannot be cut .* of 77 x 512 x 512 \(RuntimeError: .*set in_channels and input_size'
    with pytest.raises(UnsupportedBackboneError, match=message):
        measured(Stages(channels=5))
    with pytest.raises(UnsupportedBackboneError, match=r'no image of \(512, 512\)'):
        measured(Focus(size=lambda h, w: False))


def test_strides_that_the_first_image_does_not_show():
    found = measured(Stages([2] * 8))
    assert strides(found) == [2**i for i in range(1, 9)] and found.image_size == (224, 224)


@pytest.mark.parametrize('side', [50, 65, 96, 111, 300])
def test_strides_on_sizes_that_are_no_power_of_two(side):
    backbone = Stages((2, 1, 2, 3, 2))
    chain = Chain(chain_of(backbone).units, chain_of(backbone).out_units, input_size=(side, side + 7))
    assert strides(measure(backbone, chain)) == [2, 2, 4, 12, 24]
    resnet = build('mmdet', 'ResNet', {'depth': 18})
    units, taps = chain_of(resnet).units, chain_of(resnet).out_units
    found = measure(resnet, Chain(units, taps, input_size=(side, side)))
    assert strides(found) == [4] * 3 + [8] * 2 + [16] * 2 + [32] * 2


def test_units_that_lose_a_border_have_no_stride():
    assert strides(measured(Stages((2, 1, 1, 2), padding=0))) == [2, 2, 2, 4]


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_channels_of_the_image(channels):
    focus = Focus(channels)
    chain = chain_of(focus)
    assert measure(focus, chain).image_channels == channels if channels != 2 else True
    told = Chain(chain.units, chain.out_units, in_channels=channels)
    found = measure(focus, told)
    assert found.image_channels == channels and found.features[0] == Feature(4, 4)
    plain = build('mmdet', 'ResNet', {'depth': 18, 'in_channels': channels})
    assert measure(plain, chain_of(plain)).image_channels == channels


def test_a_backbone_without_convolutions():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Linear(48, 8), nn.Linear(8, 8)

        def forward(self, x):
            patches = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
            return (self.mix(self.embed(patches)),)

    units = (Unit.single('embed', 0), Unit.single('mix', 0))
    register_chain(f'{Patches.__module__}.{Patches.__qualname__}')(lambda backbone: Chain(units, (1,)))
    found = measured(Patches())
    assert found.image_channels == 3 and found.features == (Feature(8, 4, 0), Feature(8, 4, 0))


DCN = [
    ('mmdet', 'ResNet', {'type': 'DCN'}),
    ('mmdet', 'ResNeXt', {'type': 'DCNv2'}),
    ('mmseg', 'ResNetV1c', {'type': 'DCN'}),
    ('mmseg', 'ResNet', {'type': 'DCNv2'}),
]


@pytest.mark.parametrize(('library', 'kind', 'dcn'), DCN)
def test_deformable_convolutions_train_and_are_followed(library, kind, dcn):
    narrow = {'base_width': 4, 'groups': 4} if kind == 'ResNeXt' else {}
    dcn = {**dcn, 'deform_groups': 1, 'fallback_on_stride': False}
    options = {'depth': 50, 'dcn': dcn, 'stage_with_dcn': (False, True, True, True), 'base_channels': 8, **narrow}
    options |= {'out_indices': (1, 3), 'norm_eval': False, 'stem_channels': 8, 'zero_init_residual': False}
    torch.manual_seed(0)
    stock = build(library, kind, options)
    model = MODELS.build({'type': 'mmman.ToyClassifier', 'backbone': {'type': 'mmman.ToyNet'}, 'channels': (64, 256)})
    model.backbone = localize_(stock, 4, HEAD)
    assert [head.feature.stride for head in model.backbone.local.values()] == [8, 16, 32]
    model.init_weights()
    heads = [*model.backbone.local.values()]
    for head in heads:
        head.transfer.init_from_(head.source.of(model.backbone))
    batch = toy_batches(1, 2, 128, torch.float32)[0]
    before = {name: parameter.detach().clone() for name, parameter in model.backbone.named_parameters()}
    model.train().train_step(batch, LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    moved = {name for name, parameter in model.backbone.named_parameters() if not torch.equal(parameter, before[name])}
    for block in ('layer1.0', 'layer2.0', 'layer3.0', 'layer4.0'):
        assert f'{block}.conv2.weight' in moved
    assert 'local.layer1_2.transfer.bias.conv2.weight' in moved and 'layer2.0.conv2.conv_offset.weight' in moved
    for head in heads:
        head.transfer.ema_update_(head.source.of(model.backbone), 0.0)
        ours, theirs = head.transfer.momentum.state_dict(), head.source.of(model.backbone).state_dict()
        assert 'conv2.conv_offset.weight' in ours
        for name in ours:
            assert torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-6) or 'num_batches' in name, name
