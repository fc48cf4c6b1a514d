"""What trains is asked after the backbone has frozen what it freezes, wherever its class does that."""

import pytest
import torch
from torch import nn

from mmman import LocalLearningOptimWrapper, localize_
from mmman.errors import ConfigError, PartitionError
from mmman.partition import chain_of, trainable_units
from tests.toy import ToyNet, block_parameters, toy_batches
from tests.unit.local.test_session import step, toy
from tests.unit.partition.off import HEAD, SWIN, VIT, build

SMALL_SWIN = {'embed_dims': 24, 'depths': (2, 2, 2, 2)}
FREEZING = [
    # library, class, options, the first unit that trains
    ('mmdet', 'ResNet', {'depth': 18, 'frozen_stages': 1}, 'layer2.0'),
    ('mmdet', 'RegNet', {'arch': 'regnetx_400mf', 'frozen_stages': 1}, 'layer2.0'),
    ('mmdet', 'MobileNetV2', {'frozen_stages': 1}, 'layer2.0'),
    ('mmdet', 'SwinTransformer', {**SMALL_SWIN, 'frozen_stages': 1}, 'stages.1.blocks.0'),
    ('mmseg', 'ResNetV1c', {'depth': 18, 'frozen_stages': 1}, 'layer2.0'),
    ('mmseg', 'MobileNetV2', {'frozen_stages': 2, 'norm_eval': True}, 'layer3.0'),
    ('mmseg', 'SwinTransformer', {**SMALL_SWIN, 'frozen_stages': 0}, 'stages.0.blocks.0'),
    ('mmseg', 'SwinTransformer', {**SMALL_SWIN, 'frozen_stages': 1}, 'stages.1.blocks.0'),
    ('mmpretrain', 'ResNet', {'depth': 18, 'frozen_stages': 1}, 'layer2.0'),
    ('mmpretrain', 'RegNet', {'arch': 'regnetx_400mf', 'frozen_stages': 1}, 'layer2.0'),
    ('mmpretrain', 'MobileNetV2', {'frozen_stages': 2}, 'layer3.0'),
    ('mmpretrain', 'VGG', {'depth': 11, 'frozen_stages': 2}, 'features.4'),
    ('mmpretrain', 'VisionTransformer', {'arch': VIT, 'img_size': 32, 'frozen_stages': 2}, 'layers.2'),
    ('mmpretrain', 'SwinTransformer', {'arch': SWIN, 'frozen_stages': 0}, 'stages.1.blocks.0'),
    ('mmpretrain', 'ConvNeXt', {'arch': 'atto', 'frozen_stages': 1}, 'stages.1.0'),
]


@pytest.mark.parametrize(('library', 'kind', 'options', 'first'), FREEZING)
def test_no_head_is_on_a_frozen_block(library, kind, options, first):
    backbone = build(library, kind, options)
    modes = [module.training for module in backbone.modules()]
    units = chain_of(backbone).units
    trains = trainable_units(backbone, chain_of(backbone))
    assert modes == [module.training for module in backbone.modules()]
    names = [unit.name for unit in units]
    assert trains == [i >= names.index(first) for i in range(len(names))]
    plan = localize_(backbone, 3, HEAD).local.plan
    assert [unit.name for unit in plan.frozen] == names[: names.index(first)]
    backbone.train()  # as a runner does: nothing more is frozen
    assert len(plan.blocks) == 3 and plan.frozen_block(backbone) is None
    for parameters in block_parameters(backbone):
        assert any(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(
    ('library', 'kind', 'options'),
    [
        ('mmdet', 'ResNet', {'depth': 18, 'frozen_stages': 4}),
        ('mmdet', 'SwinTransformer', {**SMALL_SWIN, 'frozen_stages': 4}),
        ('mmpretrain', 'MobileNetV2', {'frozen_stages': 7, 'out_indices': (6,)}),
        ('mmpretrain', 'VGG', {'depth': 11, 'frozen_stages': 5}),
    ],
)
def test_a_frozen_backbone_is_refused_by_name(library, kind, options):
    backbone = build(library, kind, options)
    if kind == 'MobileNetV2':
        backbone.conv2.requires_grad_(False)  # the last stage, which frozen_stages doesn't reach
    name = type(backbone).__name__
    for num_blocks in (1, 3):
        with pytest.raises(PartitionError, match=f'^{name} is frozen completely .*freeze fewer stages of the stock backbone'):
            localize_(backbone, num_blocks, HEAD)


def test_a_frozen_block_in_the_middle_is_refused_by_name():
    backbone = ToyNet()
    backbone.layer2.requires_grad_(False)
    with pytest.raises(PartitionError, match=r'^block 2 \(layer2.0..layer2.1\) of ToyNet has no trainable parameter'):
        localize_(backbone, 3, HEAD)


def test_what_is_frozen_after_planning_is_refused_by_name():
    model = toy(num_blocks=3, partition='stage')
    model.backbone.layer1.requires_grad_(False)
    step(model)  # the stem of the first block still trains
    model.backbone.stem.requires_grad_(False)
    with pytest.raises(
        ConfigError, match=r'^block 1 \(stem..layer1.1\) of ToyNet has no trainable parameter: it was frozen after'
    ):
        step(model)


class FreezesWhenInitialised(ToyNet):
    def init_weights(self):
        super().init_weights()
        for module in (self.stem, self.layer1):
            module.requires_grad_(False)


def test_a_backbone_that_freezes_in_init_weights_is_refused_by_name():
    from mmengine.registry import MODELS

    from tests.toy import ToyClassifier  # noqa: F401  registers

    model = MODELS.build({'type': 'mmman.ToyClassifier', 'backbone': {'type': 'mmman.ToyNet'}}).double()
    model.backbone = localize_(FreezesWhenInitialised().double(), 3, HEAD, partition='stage')
    model.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    with pytest.raises(ConfigError, match='^block 1 .* of FreezesWhenInitialised has no trainable parameter'):
        model.train_step(toy_batches(1)[0], LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_modes_of_single_layers_stay():
    backbone = ToyNet(norm_eval=True)
    backbone.layer1[0].bn.eval()
    trainable_units(backbone, chain_of(backbone))
    modes = {name: module.training for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert [name for name, mode in modes.items() if not mode] == ['layer1.0.bn']
