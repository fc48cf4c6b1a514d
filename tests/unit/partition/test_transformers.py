"""Off means off for every family of tokens, and what the dry run needs to know of them."""

from dataclasses import replace

import pytest

from mmman.partition import chain_of, measure
from tests.unit.partition.off import SWIN, VIT, build, check_off_means_off

pytestmark = pytest.mark.whole_models

LAYERS = {'embed_dims': 24, 'num_layers': 4, 'num_heads': 3}
PVT = {'embed_dims': 8, 'num_layers': [2, 1, 1, 1], 'num_heads': [1, 2, 2, 2]}
TWINS = {'embed_dims': [8, 8, 16, 16], 'depths': [2, 1, 1, 1], 'num_heads': [1, 2, 2, 2], 'mlp_ratios': [2, 2, 2, 2]}
TWINS |= {'sr_ratios': [8, 4, 2, 1]}
PATCHES = {'patch_sizes': [4, 2, 2, 2], 'strides': [4, 2, 2, 2]}
STAGES = {'embed_dims': [8, 8, 16, 16], 'depths': [2, 1, 1, 1]}
FAMILIES = {
    'mmdet': [
        ('PyramidVisionTransformer', {**PVT, 'pretrain_img_size': 64, 'out_indices': (3, 1)}),
        ('PyramidVisionTransformerV2', {**PVT, 'drop_rate': 0.1}),
        ('SwinTransformer', {'embed_dims': 24, 'depths': (2, 2, 2, 2), 'frozen_stages': 1}),
        ('SwinTransformer', {'embed_dims': 24, 'depths': (1, 2, 3, 2), 'use_abs_pos_embed': True, 'with_cp': True}),
    ],
    'mmseg': [
        ('MixVisionTransformer', {**PVT, 'out_indices': (1, 3), 'with_cp': True}),
        ('PCPVT', {**TWINS, 'drop_rate': 0.1}),
        ('SVT', {**TWINS, 'windiow_sizes': [7, 7, 7, 7], 'out_indices': (1, 3)}),
        ('MSCAN', {**STAGES, 'norm_cfg': {'type': 'BN'}, 'drop_path_rate': 0.1}),
        ('SwinTransformer', {'embed_dims': 24, 'depths': (2, 2, 2, 2), 'out_indices': (1, 3)}),
        ('VisionTransformer', {**LAYERS, 'out_indices': (1, 3), 'img_size': 64}),
        (
            'VisionTransformer',
            {
                **LAYERS,
                'out_indices': (3, 2),
                'final_norm': True,
                'with_cls_token': False,
                'drop_path_rate': 0.1,
                'with_cp': True,
            },
        ),
        ('VisionTransformer', {**LAYERS, 'out_origin': True, 'pre_norm': True, 'with_cls_token': False}),
        ('VisionTransformer', {**LAYERS, 'out_origin': True, 'output_cls_token': True, 'patch_size': 14}),
        ('VisionTransformer', {**LAYERS, 'out_origin': True, 'with_cls_token': False}),
        ('BEiT', {**LAYERS, 'img_size': 64, 'out_indices': (1, 3), 'final_norm': True, 'qv_bias': False}),
        ('BEiT', {**LAYERS, 'img_size': (64, 64), 'patch_norm': True}),
        ('MAE', {**LAYERS, 'img_size': 64, 'out_indices': (3, 1, 0), 'drop_path_rate': 0.1}),
    ],
    'mmpretrain': [
        ('PCPVT', {'arch': {**TWINS, **PATCHES}, 'norm_after_stage': [True, False, False, True], 'out_indices': (0, 3)}),
        ('SVT', {'arch': {**TWINS, **PATCHES, 'window_sizes': [7, 7, 7, 7]}, 'drop_path_rate': 0.1}),
        ('VAN', {'arch': {**STAGES, 'ffn_ratios': [2, 2, 2, 2]}, 'out_indices': (3, 1), 'frozen_stages': 0}),
        ('VisionTransformer', {'arch': VIT, 'img_size': 64}),
        ('VisionTransformer', {'arch': VIT, 'out_type': 'avg_featmap', 'out_indices': [1, 4, 5], 'drop_path_rate': 0.1}),
        (
            'VisionTransformer',
            {'arch': VIT, 'out_type': 'featmap', 'out_indices': [0, 5], 'pre_norm': True, 'final_norm': False},
        ),
        ('VisionTransformer', {'arch': VIT, 'out_type': 'raw', 'with_cls_token': False, 'frozen_stages': 2}),
        ('DistilledVisionTransformer', {'arch': VIT, 'out_indices': [2, 5]}),
        ('SwinTransformer', {'arch': SWIN, 'use_abs_pos_embed': True, 'frozen_stages': 0}),
        ('SwinTransformer', {'arch': SWIN, 'out_indices': (0, 1, 2, 3), 'pad_small_map': True, 'with_cp': True}),
        ('SwinTransformer', {'arch': SWIN, 'out_indices': (1, 3), 'pad_small_map': True, 'out_after_downsample': True}),
        (
            'MlpMixer',
            {
                'arch': {'embed_dims': 24, 'num_layers': 4, 'tokens_mlp_dims': 8, 'channels_mlp_dims': 48},
                'img_size': 64,
                'drop_path_rate': 0.1,
                'out_indices': [-3, -1],
            },
        ),
        (
            'SwinTransformerV2',
            {
                'arch': {'embed_dims': 24, 'depths': [2, 2, 2, 1], 'num_heads': [1, 2, 4, 8], 'extra_norm_every_n_blocks': 2},
                'img_size': 64,
                'window_size': 2,
                'use_abs_pos_embed': True,
                'with_cp': True,
            },
        ),
        (
            'SwinTransformerV2',
            {
                'arch': {'embed_dims': 24, 'depths': [1, 2, 2, 1], 'num_heads': [1, 2, 4, 8], 'extra_norm_every_n_blocks': 0},
                'out_indices': (3, 0, 1),
                'pad_small_map': True,
                'frozen_stages': 0,
                'img_size': 64,
            },
        ),
        ('DaViT', {'arch': {'embed_dims': 24, 'depths': [1, 2, 1, 1], 'num_heads': [1, 2, 4, 8]}}),
        (
            'DaViT',
            {
                'arch': {'embed_dims': 24, 'depths': [1, 2, 1, 1], 'num_heads': [1, 2, 4, 8]},
                'out_indices': (3, 0, 1),
                'frozen_stages': 0,
                'pad_small_map': True,
                'with_cp': True,
            },
        ),
        ('T2T_ViT', {'embed_dims': 24, 'num_layers': 4, 'img_size': 64, 't2t_cfg': {'token_dims': 8}, 'drop_path_rate': 0.1}),
        (
            'T2T_ViT',
            {
                'embed_dims': 24,
                'num_layers': 4,
                'img_size': 64,
                't2t_cfg': {'token_dims': 8},
                'out_type': 'featmap',
                'with_cls_token': False,
                'out_indices': [1, -1],
                'final_norm': False,
            },
        ),
        ('DeiT3', {'arch': VIT, 'img_size': 64, 'drop_path_rate': 0.1}),
        (
            'DeiT3',
            {
                'arch': VIT,
                'img_size': 64,
                'out_type': 'raw',
                'out_indices': [5, 1],
                'with_cls_token': False,
                'use_layer_scale': False,
            },
        ),
        ('ViTEVA02', {'arch': VIT, 'img_size': 64, 'sub_ln': True, 'drop_path_rate': 0.1}),
        (
            'ViTEVA02',
            {
                'arch': VIT,
                'img_size': 64,
                'out_type': 'avg_featmap',
                'out_indices': [1, 5],
                'with_cls_token': False,
                'frozen_stages': 1,
                'pre_norm': True,
            },
        ),
    ],
}
CASES = [(library, kind, options) for library, rows in FAMILIES.items() for kind, options in rows]


@pytest.mark.parametrize(('library', 'kind', 'options'), CASES)
def test_off_means_off(library, kind, options):
    check_off_means_off(library, kind, options)


@pytest.mark.parametrize(
    ('options', 'first', 'modules', 'extra_tokens', 'out_units'),
    [
        ({}, 'stem', ('patch_embed', 'drop_after_pos'), 1, (4,)),
        ({'pre_norm': True, 'with_cls_token': False}, 'stem', ('patch_embed', 'drop_after_pos', 'ln_pre'), 0, (4,)),
        ({'with_cls_token': False}, 'layers.0', ('patch_embed', 'drop_after_pos', 'layers.0'), 0, (3,)),
        ({'out_origin': True, 'out_indices': (3, 0)}, 'stem', ('patch_embed', 'drop_after_pos'), 1, (0, 1, 4)),
    ],
)
def test_the_first_unit_of_mmsegs_vit(options, first, modules, extra_tokens, out_units):
    """Without class token it drops that token in front of the layers, where no module has it for an output."""
    chain = chain_of(build('mmseg', 'VisionTransformer', {**LAYERS, **options}))
    assert (chain.units[0].name, chain.units[0].modules) == (first, modules)
    assert (chain.extra_tokens, chain.out_units) == (extra_tokens, out_units)


@pytest.mark.parametrize(('with_cls_token', 'first'), [(True, 'layers.0'), (False, 'stem')])
def test_the_first_unit_of_deit3(with_cls_token, first):
    """The class token is appended in front of the first layer."""
    options = {'arch': VIT, 'with_cls_token': with_cls_token, 'out_type': 'cls_token' if with_cls_token else 'raw'}
    assert chain_of(build('mmpretrain', 'DeiT3', options)).units[0].name == first


def test_the_merging_of_swin_v2_is_in_the_stage_of_its_blocks():
    arch = {**SWIN, 'extra_norm_every_n_blocks': 0}
    chain = chain_of(build('mmpretrain', 'SwinTransformerV2', {'arch': arch}))
    assert chain.units[3].modules == ('stages.1.downsample', 'stages.1.blocks.0')


def test_units_of_pvt_have_the_names_of_its_blocks():
    """The position embedding is the first of a stage's blocks, and part of the unit of the first layer."""
    chain = chain_of(build('mmdet', 'PyramidVisionTransformer', {**PVT, 'pretrain_img_size': 64}))
    assert [unit.modules for unit in chain.units[:2]] == [
        ('layers.0.0', 'layers.0.1.0', 'layers.0.1.1'),
        ('layers.0.1.2', 'layers.0.2'),
    ]
    assert [unit.name for unit in chain.units] == [f'layers.{i}' for i in ('0.1.1', '0.1.2', '1.1.1', '2.1.1', '3.1.1')]


@pytest.mark.parametrize('extra', [{}, {'norm_after_stage': True}])
def test_mmsegs_twins_with_and_without_norms(extra):
    chain = chain_of(build('mmseg', 'PCPVT', {**TWINS, **extra}))
    assert chain.units[1].modules == (('layers.0.1', 'norm_list.0') if extra else ('layers.0.1',))


@pytest.mark.parametrize('size', [(64, 64), (70, 100)])
def test_layouts_of_van_are_measured(size):
    """Maps inside a stage, tokens behind its norm."""
    found = measured('mmpretrain', 'VAN', {'arch': {**STAGES, 'ffn_ratios': [2, 2, 2, 2]}}, size)
    assert [feature.extra_tokens for feature in found.features] == [None, 0, 0, 0, 0]
    assert [feature.stride for feature in found.features] == [4, 4, 8, 16, 32]


def measured(library, kind, options, size):
    backbone = build(library, kind, options)
    return measure(backbone, replace(chain_of(backbone), input_size=size))
