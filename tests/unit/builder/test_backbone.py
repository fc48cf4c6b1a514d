"""``mmman.LocalBackbone``: what it passes to the stock backbone, and the check of its options without building it."""

import pytest
from mmengine.registry import MODELS

from mmman.builder.backbone import check_backbone_options
from mmman.errors import ConfigError
from tests.toy import ToyNet, toy_config
from tests.unit.partition.off import build


@pytest.mark.whole_models
def test_weights_that_a_segmentor_names_reach_the_stock_backbone():
    pytest.importorskip('mmseg')
    stock = {'type': 'mmseg.ResNetV1c', 'depth': 18}
    backbone = build('mmman', 'LocalBackbone', {'backbone': stock, 'num_blocks': 1, 'pretrained': 'a.pth'})
    assert backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'a.pth'}


def test_the_result_is_the_stock_backbone_with_local_heads():
    options = toy_config(num_blocks=3, partition=['layer1.0', 'layer2.1'], loss_weight=[1.0, 0.5], net={'width': 8})
    backbone = MODELS.build(options['backbone'])
    assert type(backbone) is ToyNet and backbone.stem.out_channels == 8
    assert [head.unit for head in backbone.local.values()] == ['layer1.0', 'layer2.1']
    assert [head.loss_weight for head in backbone.local.values()] == [1.0, 0.5]


OPTIONS = toy_config()['backbone']
del OPTIONS['type']


def test_a_backbone_that_is_not_registered_is_left_to_the_builder():
    check_backbone_options(OPTIONS)
    check_backbone_options({**OPTIONS, 'backbone': {'type': 'mmman.Nothing'}})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_blocks': 0}, '^model.backbone.num_blocks=0: expected'),
        ({'loss_weight': -1.0}, '^model.backbone.loss_weight=-1.0: expected'),
        ({'num_block': 4}, 'did you mean num_blocks?'),
        ({'out_indices': (1,)}, r'option of the stock backbone, ToyNet: set model.backbone.backbone.out_indices'),
        ({'out_indices': (1,), 'backbone': {'type': 'mmman.Nothing'}}, 'LocalBackbone has no option out_indices'),
        ({'transfer': {'ema': False}}, 'transfer.scale'),
        ({'local_head': {}}, '^model.backbone.local_head requires a type'),
    ],
)
def test_the_message_names_the_option(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_backbone_options({**OPTIONS, **changes})
    with pytest.raises(ConfigError, match=message):
        MODELS.build({'type': 'mmman.LocalBackbone', **OPTIONS, **changes})


def test_a_backbone_in_an_adapter_is_refused():
    lora = {'type': 'mmpretrain.LoRAModel', 'module': OPTIONS['backbone'], 'targets': [{'type': 'qkv'}]}
    with pytest.raises(
        ConfigError, match='^model.backbone.backbone: LoRAModel cannot be cut.*set its module as the stock backbone'
    ):
        MODELS.build({'type': 'mmman.LocalBackbone', **OPTIONS, 'backbone': lora})


def test_cuts_by_memory_are_refused_with_windows():
    with pytest.raises(ConfigError, match='cuts by memory assume that one block is alive at a time, not window=2'):
        MODELS.build(toy_config(3, {'type': 'memory'}, window=2)['backbone'])


def test_the_stock_backbone_is_required():
    with pytest.raises(ConfigError, match='LocalBackbone requires the option backbone'):
        check_backbone_options({'num_blocks': 2})
