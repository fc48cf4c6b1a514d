"""Images of any number of channels and any range are reconstructed; a target that would be a constant is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch import nn

from mmman import LocalLearningOptimWrapper, localize_
from mmman.errors import ConfigError
from mmman.heads.reconstruction import ReconstructionDecoder, ReconstructionTarget, reconstruction_loss, restore_pixels
from mmman.registry import MODELS
from tests.toy import ToyNet

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

GENERATOR = torch.Generator()


def images(top, channels=3, bottom=0.0, size=(2, 24, 32)):
    count, *sides = size
    fractions = torch.rand(count, channels, *sides, generator=GENERATOR.manual_seed(0))
    return bottom + (top - bottom) * fractions


def preprocessor(**options):
    return MODELS.build({'type': 'mmpretrain.ClsDataPreprocessor', **options})


def restored(raw, pixel_range=(0, 255), **options):
    normalise = preprocessor(**options)
    inputs = normalise({'inputs': raw})['inputs']
    return ReconstructionTarget(pixel_range, raw.shape[1])(inputs, normalise)


@pytest.mark.parametrize('normalised', [False, True])
@pytest.mark.parametrize('channels', [1, 3, 4, 13])
@pytest.mark.parametrize('pixel_range', [(0, 255), (0, 65535), (0, 1), (-1, 1), (1000, 3000)])
def test_every_range_and_number_of_channels(pixel_range, channels, normalised):
    low, high = pixel_range
    raw = images(high, channels, low)
    options = {}
    if normalised:
        options = {'mean': [low + 0.4 * (high - low)] * channels, 'std': [0.2 * (high - low)] * channels}
    target = restored(raw, pixel_range, **options)
    assert target.shape == raw.shape
    assert torch.allclose(target, (raw - low) / (high - low), atol=1e-5)


def test_channels_are_restored_in_the_order_of_the_models_input():
    raw = images(255)
    statistics = {'mean': [120.0, 110, 100], 'std': [60.0, 50, 40]}
    assert torch.allclose(restored(raw, **statistics, to_rgb=True), raw.flip(1) / 255, atol=1e-6)


def test_eight_bits_are_restored_to_the_same_bits():
    raw = torch.randint(256, (2, 3, 24, 32), dtype=torch.uint8, generator=GENERATOR.manual_seed(0))
    for options in ({}, {'mean': [123.675, 116.28, 103.53], 'std': [58.395, 57.12, 57.375]}):
        normalise = preprocessor(**options)
        inputs = normalise({'inputs': raw})['inputs']
        expected = inputs / 255
        if options:
            expected = (inputs * normalise.std).add_(normalise.mean).div_(255)
        assert torch.equal(restored(raw, **options), expected.clamp(0, 1))


@pytest.mark.parametrize(
    ('raw', 'pixel_range', 'message'),
    [
        (images(1), (0, 255), r'channel 0 of the first batch has values from 0\.0.* to 0\.99'),
        (images(65535), (0, 255), 'from .* to 6.*e\\+04'),
        (images(4095), (0, 255), r'local_head.pixel_range=\(0, 255\) does not fit'),
        (images(255), (0, 65535), 'so the reconstruction target is almost constant'),
        (images(255), (0, 1), r'e\.g\. \(0, 255\) for 8 bits'),
        (images(1, bottom=-1), (0, 1), r'pixel_range=\(0, 1\)'),
        (
            torch.cat([images(255), images(65535, 1)], 1),
            (0, 255),
            'channel 3 .* scale channels of different',
        ),
    ],
)
def test_a_range_that_does_not_fit_is_refused(raw, pixel_range, message):
    with pytest.raises(ConfigError, match=message):
        restored(raw, pixel_range)
    channels = raw.shape[1]
    with pytest.raises(ConfigError, match=message):
        restored(raw, pixel_range, mean=[0.25] * channels, std=[0.5] * channels)


def test_what_fits_well_enough():
    few_outside = images(255) * 1.2 - 20  # as augmentations in floating point leave
    assert restored(few_outside).amax() == 1
    dark = images(12)
    assert restored(dark).amax() < 0.05
    grey_band = torch.cat([images(255), torch.full((2, 1, 24, 32), 255.0)], 1)  # a channel of one value says nothing
    assert torch.equal(restored(grey_band)[:, 3], torch.ones(2, 24, 32))
    assert restored(images(255, size=(1, 1, 1))).shape == (1, 3, 1, 1)
    assert restored(images(255, size=(1, 300, 5))).shape == (1, 3, 300, 5)


def test_blank_batches_are_passed_over_and_later_ones_cost_nothing():
    target, normalise = ReconstructionTarget((0, 255), 3), preprocessor()
    target(torch.full((2, 3, 8, 8), 7.0), normalise)
    assert not target.is_checked
    with pytest.raises(ConfigError, match='does not fit'):
        copy.deepcopy(target)(images(1), normalise)
    target(images(255), normalise)
    assert target.is_checked
    target(images(1), normalise)  # nothing waits for the device any more


def test_an_empty_range_is_refused():
    for pixel_range in ((1, 0), (0, 0), (0, float('nan'))):
        with pytest.raises(ConfigError, match=r'^local_head.pixel_range=.* with lowest < highest'):
            ReconstructionTarget(pixel_range, 3)


class Model(BaseModel):
    def __init__(self, backbone, **options):
        super().__init__(data_preprocessor=preprocessor(**options))
        self.backbone = backbone

    def forward(self, inputs, data_samples=None, mode='loss'):
        return {'loss': sum(x.square().mean() for x in self.backbone(inputs))}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'mean': [1.0, 2, 3], 'std': [1.0, 2, 3]}, r'mean has 3 values and std 3, .* images of 4 channels'),
        ({'mean': [1.0] * 4, 'std': [1.0, 0, 1, 1]}, r'^data_preprocessor.std contains a zero'),
    ],
)
def test_statistics_that_restore_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ReconstructionTarget((0, 255), 4).check_model(Model(ToyNet(), **options))


def infopro(classifier):
    head = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 2, 'loss': {'type': 'mmpretrain.CrossEntropyLoss'}}
    return {'type': 'mmman.InfoProLocalHead', 'head': head, 'classifier': classifier, 'lambda_rec': 1.0}


def segmentation():
    own = {'type': 'mmseg.FCNHead', 'num_classes': 2, 'in_channels': 1, 'channels': 4, 'num_convs': 1, 'concat_input': False}
    own['loss_decode'] = {'type': 'mmseg.CrossEntropyLoss'}
    return {'type': 'mmman.SegLocalHead', 'decode_head': own, 'lambda_rec': 1.0}


class Segmented(DataSample):
    """Labels of an image and of its pixels, so that one batch serves all heads."""


def batch(channels, top):
    from mmengine.structures import PixelData

    raw = images(top, channels)
    samples = []
    for label in (0, 1):
        sample = Segmented().set_gt_label(label)
        sample.set_data({'gt_sem_seg': PixelData(data=torch.full((1, *raw.shape[2:]), label))})
        samples.append(sample)
    return {'inputs': raw, 'data_samples': samples}


@pytest.mark.parametrize(('channels', 'top'), [(1, 255), (3, 255), (4, 65535)])
def test_heads_reconstruct_what_the_backbone_takes(channels, top):
    pytest.importorskip('mmseg')
    init_default_scope('mmpretrain')
    for local_head in (infopro('1c2f'), infopro('imagenet'), segmentation()):
        torch.manual_seed(0)
        stock = MODELS.build({'type': 'mmpretrain.ResNet', 'depth': 18, 'in_channels': channels, 'base_channels': 8})
        stock = localize_(stock, 3, {**local_head, 'pixel_range': (0, top)})
        statistics = {'mean': [0.5 * top] * channels, 'std': [0.25 * top] * channels}
        model = Model(stock, **statistics)
        model.init_weights()
        for head in stock.local.values():
            head.transfer.init_from_(head.source.of(stock))
        wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
        model.train_step(batch(channels, top), wrapper)
        losses = {name: buffer.current() for name, buffer in wrapper.message_hub.log_scalars.items() if 'loss_rec' in name}
        assert len(losses) >= 2 and all(0.5 < value < 3 for value in losses.values())
        for head in stock.local.values():
            assert head.decoder.convs[-1].out_channels == channels
        if top > 255:
            wrong = copy.deepcopy(model)
            for head in wrong.backbone.local.values():
                head.target = ReconstructionTarget((0, 255), channels)
            with pytest.raises(ConfigError, match=r'pixel_range=\(0, 255\) does not fit the images: channel 0'):
                wrong.train_step(batch(channels, top), LocalLearningOptimWrapper(torch.optim.SGD(wrong.parameters(), lr=0.0)))


def test_the_loss_is_a_mean_over_all_channels():
    logits, target = torch.randn(2, 4, 6, 8, generator=GENERATOR.manual_seed(1)), images(1, 4, size=(2, 6, 8))
    narrow = [DataSample(metainfo={'img_shape': (6, 8)}), DataSample(metainfo={'img_shape': (4, 5)})]
    every = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    inside = torch.cat([every[0].flatten(), every[1, :, :4, :5].flatten()])
    assert torch.allclose(reconstruction_loss(logits, target, narrow), inside.mean())
    assert restore_pixels(target, preprocessor()).data_ptr() != target.data_ptr()


def test_pixels_are_restored():
    raw = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    for options in ({'mean': [120.0, 110, 100], 'std': [60.0, 50, 40]}, {}):
        normalise = preprocessor(**options)
        inputs = normalise({'inputs': raw})['inputs']
        assert torch.allclose(restore_pixels(inputs, normalise), raw / 255, atol=1e-6)
    swapped = preprocessor(mean=[120.0, 110, 100], std=[60.0, 50, 40], to_rgb=True)
    inputs = swapped({'inputs': raw})['inputs']
    assert torch.allclose(restore_pixels(inputs, swapped), raw.flip(1) / 255, atol=1e-6)


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
