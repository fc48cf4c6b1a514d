"""Off means off for every family of maps, and the units of those that aren't a stem and stages."""

import pytest

from mmman.errors import UnsupportedBackboneError
from mmman.partition import chain_of
from tests.unit.partition.off import build, check_off_means_off

pytestmark = pytest.mark.whole_models

DW = {'type': 'DW', 'kernel_size': 7}
FAMILIES = {
    'mmdet': [
        ('ResNet', {'depth': 18}),
        ('ResNet', {'depth': 34, 'frozen_stages': 1, 'norm_eval': False}),
        ('ResNet', {'depth': 50, 'with_cp': True}),
        ('ResNet', {'depth': 50, 'style': 'caffe', 'norm_cfg': {'type': 'BN', 'requires_grad': False}}),
        ('ResNet', {'depth': 34, 'norm_eval': False}),
        ('ResNet', {'depth': 50, 'deep_stem': True, 'avg_down': True, 'norm_eval': False}),
        ('ResNet', {'depth': 50, 'strides': (1, 2, 2, 1), 'dilations': (1, 1, 1, 2), 'out_indices': (1, 3)}),
        ('ResNetV1d', {'depth': 50}),
        ('ResNeXt', {'depth': 50, 'groups': 32, 'base_width': 4}),
        ('Res2Net', {'depth': 50, 'scales': 4, 'base_width': 26, 'norm_eval': False}),
        ('ResNeSt', {'depth': 50, 'stem_channels': 64, 'norm_eval': False}),
        ('RegNet', {'arch': 'regnetx_800mf', 'norm_eval': False}),
        ('MobileNetV2', {'out_indices': (1, 2, 4, 7)}),
        ('CSPNeXt', {'widen_factor': 0.125, 'deepen_factor': 0.33, 'out_indices': (4, 0, 2)}),
        (
            'CSPNeXt',
            {
                'arch': 'P6',
                'widen_factor': 0.125,
                'deepen_factor': 0.33,
                'out_indices': (2, 3, 4, 5),
                'use_depthwise': True,
                'channel_attention': False,
                'frozen_stages': 1,
                'norm_eval': True,
            },
        ),
        ('CSPDarknet', {'widen_factor': 0.125, 'deepen_factor': 0.33}),
        (
            'CSPDarknet',
            {
                'arch': 'P6',
                'widen_factor': 0.125,
                'deepen_factor': 0.33,
                'frozen_stages': 0,
                'out_indices': (0, 3, 5),
                'use_depthwise': True,
            },
        ),
        ('Darknet', {}),
        ('Darknet', {'out_indices': (0, 5), 'frozen_stages': 2, 'norm_eval': False}),
        ('EfficientNet', {'arch': 'b0', 'out_indices': (3, 4, 5), 'norm_cfg': {'type': 'BN'}, 'drop_path_rate': 0.2}),
        ('SSDVGG', {'depth': 16, 'out_feature_indices': (22, 34)}),
        ('SSDVGG', {'depth': 11, 'out_feature_indices': (9, 15, 24)}),
        ('SSDVGG', {'depth': 11, 'out_feature_indices': (24,)}),
    ],
    'mmseg': [
        ('ResNet', {'depth': 18, 'norm_eval': False}),
        ('ResNetV1c', {'depth': 50, 'strides': (1, 2, 1, 1), 'dilations': (1, 1, 2, 4), 'contract_dilation': True}),
        ('ResNetV1d', {'depth': 50, 'multi_grid': (1, 2, 4), 'norm_eval': True}),
        ('ResNeXt', {'depth': 50, 'groups': 32, 'base_width': 4, 'with_cp': True}),
        ('MobileNetV2', {'out_indices': (1, 2, 4, 6), 'strides': (1, 2, 2, 1, 1, 1, 1), 'dilations': (1, 1, 1, 2, 2, 4, 4)}),
        ('MobileNetV2', {'out_indices': (6,)}),
        ('MobileNetV3', {'arch': 'small'}),
        (
            'MobileNetV3',
            {'arch': 'large', 'out_indices': (1, 3, 16), 'frozen_stages': 0, 'reduction_factor': 2, 'norm_eval': True},
        ),
        ('ERFNet', {}),
    ],
    'mmpretrain': [
        ('ResNet', {'depth': 18}),
        ('ResNet', {'depth': 50, 'frozen_stages': 2, 'norm_eval': True, 'drop_path_rate': 0.1}),
        ('ResNetV1c', {'depth': 34, 'out_indices': (0, 1, 2, 3)}),
        ('ResNetV1d', {'depth': 50, 'with_cp': True}),
        ('ResNeXt', {'depth': 50}),
        ('SEResNet', {'depth': 50}),
        ('ResNet_CIFAR', {'depth': 18}),
        ('RegNet', {'arch': 'regnetx_400mf', 'out_indices': (0, 1, 2, 3)}),
        ('MobileNetV2', {'frozen_stages': 2}),
        ('VGG', {'depth': 11, 'num_classes': 10}),
        ('VGG', {'depth': 13, 'norm_cfg': {'type': 'BN'}, 'out_indices': (0, 2, 4), 'frozen_stages': 1}),
        ('VGG', {'depth': 16, 'with_last_pool': False}),
        ('ConvNeXt', {'arch': 'atto', 'drop_path_rate': 0.1}),
        ('ConvNeXt', {'arch': 'atto', 'out_indices': [0, 1, 2, 3], 'gap_before_final_norm': False, 'with_cp': True}),
        ('ConvNeXt', {'arch': 'atto', 'use_grn': True, 'layer_scale_init_value': 0.0, 'frozen_stages': 1}),
        ('EfficientNet', {'arch': 'b0', 'drop_path_rate': 0.2}),
        ('EfficientNet', {'arch': 'es', 'out_indices': (0, 3, 6), 'frozen_stages': 2, 'norm_eval': True, 'with_cp': True}),
        ('EfficientNetV2', {'arch': 'b0', 'frozen_stages': 1, 'out_indices': (3, -1)}),
        ('MobileNetV3', {'arch': 'small_050', 'out_indices': (0, 5, 12), 'with_cp': True}),
        ('MobileNetV3', {'arch': 'large', 'frozen_stages': 3}),
        ('RepVGG', {'arch': 'A0', 'base_channels': 16, 'add_ppf': True, 'out_indices': (1, 3)}),
        (
            'RepVGG',
            {
                'arch': {
                    'num_blocks': [1, 2, 2, 1],
                    'width_factor': [1, 1, 1, 1],
                    'group_layer_map': None,
                    'se_cfg': {'ratio': 16, 'divisor': 1},
                },
                'base_channels': 16,
                'frozen_stages': 1,
                'with_cp': True,
            },
        ),
        ('RepVGG', {'arch': 'A0', 'base_channels': 16, 'deploy': True}),
        (
            'MobileOne',
            {
                'arch': {
                    'num_blocks': [1, 2, 2, 1],
                    'width_factor': [0.25, 0.25, 0.125, 0.125],
                    'num_conv_branches': [1, 2, 1, 1],
                    'num_se_blocks': [0, 0, 1, 1],
                },
                'out_indices': (0, 3),
            },
        ),
        (
            'MobileOne',
            {
                'arch': {
                    'num_blocks': [1, 2, 2, 1],
                    'width_factor': [0.25, 0.25, 0.125, 0.125],
                    'num_conv_branches': [1, 2, 1, 1],
                    'num_se_blocks': [0, 0, 0, 0],
                },
                'frozen_stages': 1,
                'norm_eval': True,
            },
        ),
        ('RIFormer', {'arch': {'layers': [1, 2, 1, 1], 'embed_dims': [8, 12, 16, 32]}, 'drop_path_rate': 0.1}),
        (
            'RIFormer',
            {
                'arch': {'layers': [1, 2, 1, 1], 'embed_dims': [8, 12, 16, 32]},
                'out_indices': [1, 2, 6],
                'frozen_stages': 0,
                'deploy': True,
            },
        ),
        ('PoolFormer', {'arch': {'layers': [1, 2, 1, 1], 'embed_dims': [8, 12, 16, 32]}, 'drop_path_rate': 0.1}),
        (
            'PoolFormer',
            {'arch': {'layers': [1, 2, 1, 1], 'embed_dims': [8, 8, 16, 32]}, 'out_indices': [5, 0, 1], 'frozen_stages': -1},
        ),
        (
            'HorNet',
            {
                'arch': {'base_dim': 16, 'depths': [1, 2, 2, 1], 'orders': [2, 3, 4, 5], 'dw_cfg': [DW] * 4},
                'drop_path_rate': 0.1,
            },
        ),
        (
            'HorNet',
            {
                'arch': {
                    'base_dim': 16,
                    'depths': [1, 2, 2, 1],
                    'orders': [2, 3, 4, 5],
                    'dw_cfg': [DW, DW, {'type': 'GF', 'h': 14, 'w': 8}, {'type': 'GF', 'h': 7, 'w': 4}],
                },
                'out_indices': (3, 0, 1),
                'gap_before_final_norm': False,
                'use_layer_scale': False,
            },
        ),
        ('DenseNet', {'arch': {'growth_rate': 4, 'depths': [2, 3, 2, 2], 'init_channels': 8}, 'out_indices': [0, 3]}),
        (
            'DenseNet',
            {
                'arch': {'growth_rate': 4, 'depths': [2, 3, 2, 2], 'init_channels': 8},
                'memory_efficient': True,
                'drop_rate': 0.1,
            },
        ),
        ('ShuffleNetV1', {'widen_factor': 0.5}),
        (
            'ShuffleNetV1',
            {'widen_factor': 0.5, 'groups': 1, 'out_indices': (2, 0), 'frozen_stages': 1, 'norm_eval': True, 'with_cp': True},
        ),
        ('ShuffleNetV2', {'widen_factor': 0.5, 'out_indices': (1, 3)}),
        ('ShuffleNetV2', {'widen_factor': 0.5, 'frozen_stages': 2, 'with_cp': True}),
        ('CSPDarkNet', {'depth': 53, 'out_indices': (0, 2)}),
        ('CSPResNet', {'depth': 50, 'frozen_stages': 0}),
        ('CSPResNet', {'depth': 50, 'deep_stem': True, 'norm_eval': True}),
        ('ConvMixer', {'arch': {'embed_dims': 16, 'depth': 4, 'patch_size': 7, 'kernel_size': 5}, 'out_indices': [1, 3]}),
        ('ConvMixer', {'arch': {'embed_dims': 16, 'depth': 4, 'patch_size': 14, 'kernel_size': 5}, 'frozen_stages': 1}),
        ('MobileViT', {'arch': 'xx_small', 'out_indices': (4, 1)}),
        ('MobileViT', {'arch': 'xx_small', 'frozen_stages': 1}),
        ('Vig', {'arch': 'tiny', 'out_indices': (1, -1), 'drop_path': 0.1, 'relative_pos': True}),
        ('Vig', {'arch': 'tiny', 'use_stochastic': True, 'frozen_stages': 1, 'norm_eval': True}),
        ('PyramidVig', {'arch': 'tiny', 'out_indices': [0, 3], 'drop_path': 0.1}),
    ],
    'mmman': [
        ('CIFARResNet', {'depth': 32}),
        ('CIFARResNet', {'depth': 20, 'out_indices': (0, 2)}),
    ],
}
NARROW = {'base_channels': 16, 'stem_channels': 16}
WITH_WIDTH = ('ResNet', 'ResNetV1c', 'ResNetV1d')  # these take their width as options
CASES = [
    (library, kind, NARROW | options if kind in WITH_WIDTH else options)
    for library, rows in FAMILIES.items()
    for kind, options in rows
]


@pytest.mark.parametrize(('library', 'kind', 'options'), CASES)
def test_off_means_off(library, kind, options):
    check_off_means_off(library, kind, options)


def units(library, kind, **options):
    return {unit.name: unit.modules for unit in chain_of(build(library, kind, options)).units}


def test_a_downsampling_layer_is_one_unit_with_the_block_behind_it():
    assert units('mmdet', 'Darknet')['conv_res_block2.res0'] == ('conv_res_block2.conv', 'conv_res_block2.res0')
    arch = {'layers': [1, 2, 1, 1], 'embed_dims': [8, 12, 16, 32]}
    assert units('mmpretrain', 'PoolFormer', arch=arch)['network.2.0'] == ('network.1', 'network.2.0')
    assert units('mmpretrain', 'PyramidVig', arch='tiny')['stages.1.1'] == ('stages.1.0', 'stages.1.1')
    erfnet = units('mmseg', 'ERFNet')
    assert erfnet['encoder.2'] == ('encoder.1', 'encoder.2') and erfnet['decoder.4'] == ('decoder.3', 'decoder.4')


def test_a_decoder_that_ends_with_upsampling_has_a_unit_of_it():
    assert [*units('mmseg', 'ERFNet', dec_stages_non_bottleneck=(1, 0))][-1] == 'decoder.2'


def test_the_poolings_of_ssd_belong_to_the_unit_behind_them():
    ssd = units('mmdet', 'SSDVGG', depth=16)
    assert ssd['features.22'] == ('features.21', 'features.22')
    assert ssd['features.25'] == ('features.23', 'features.24', 'features.25')


def test_an_output_from_inside_a_unit_is_that_units():
    """Behind a patch embedding of PoolFormer, which is one unit with the block behind it."""
    arch = {'layers': [1, 2, 1, 1], 'embed_dims': [8, 12, 16, 32]}
    chain = chain_of(build('mmpretrain', 'PoolFormer', {'arch': arch, 'out_indices': [1, 6]}))
    assert [chain.units[i].name for i in chain.out_units] == ['network.2.0', 'network.6.0']


def test_hornet_that_checkpoints_whole_stages_is_refused():
    with pytest.raises(UnsupportedBackboneError, match='HorNet with with_cp=True cannot be cut .* use recompute'):
        chain_of(build('mmpretrain', 'HorNet', {'arch': 'tiny', 'with_cp': True}))
