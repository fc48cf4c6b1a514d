"""Backbones that hand tokens, or tokens and maps, on with their grid, and what their forward does around the modules of a unit.

Written after the libraries' own ``forward``, on square images; nothing here is mmman's.
"""

from torch import nn


def map_of(x):
    side = round(x.shape[1] ** 0.5)
    return x if x.dim() == 4 else x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2).contiguous()


def view_of(x):
    """mmseg's SegFormer leaves tokens as they lie in memory."""
    side = round(x.shape[1] ** 0.5)
    return x if x.dim() == 4 else x.transpose(1, 2).reshape(len(x), -1, side, side)


class GridUnit(nn.Sequential):
    """An embedding, blocks and a norm, those of them that a unit has, one after the other."""

    to_map = staticmethod(map_of)

    def __init__(self, modules):
        super().__init__(*modules)

    def forward(self, x):
        for module in self:
            x = self.run(module, x)
        return x

    def run(self, module, x):
        kind = type(module).__name__
        if kind in ('PatchEmbed', 'StemConv', 'OverlapPatchEmbed', 'VANPatchEmbed'):
            return module(self.to_map(x))[0]
        if kind == 'VANBlock':
            return module(x)
        if kind in ('LayerNorm', 'Identity', 'Dropout'):
            return module(x if x.dim() == 3 else x.flatten(2).transpose(1, 2))
        side = round(x.shape[1] ** 0.5)
        return module(x, side, side) if kind == 'MSCABlock' else module(x, (side, side))


class MitUnit(GridUnit):
    to_map = staticmethod(view_of)


PVT = {
    'embed_dims': 8,
    'num_layers': [2, 1, 1, 1],
    'num_heads': [1, 2, 2, 2],
    'strides': (2, 2, 2, 2),
    'sr_ratios': [4, 2, 1, 1],
}
PVT |= {'out_indices': (1, 3), 'drop_path_rate': 0.0}
TWINS = {
    'embed_dims': [8, 8, 12, 12],
    'depths': [2, 1, 1, 1],
    'num_heads': [1, 2, 2, 2],
    'patch_sizes': [2, 2, 2, 2],
    'strides': [2, 2, 2, 2],
    'mlp_ratios': [2, 2, 2, 2],
    'sr_ratios': [4, 2, 1, 1],
}
STAGES = {'embed_dims': [8, 8, 12, 12], 'depths': [2, 1, 1, 1]}
CONFIGS = {
    'mit': {'type': 'mmseg.MixVisionTransformer', **PVT},
    'pvt': {'type': 'mmdet.PyramidVisionTransformer', **PVT, 'mlp_ratios': (2, 2, 2, 2), 'pretrain_img_size': 64},
    'pvt_v2': {'type': 'mmdet.PyramidVisionTransformerV2', **PVT, 'mlp_ratios': (2, 2, 2, 2)},
    'pcpvt': {
        'type': 'mmpretrain.PCPVT',
        'arch': TWINS,
        'out_indices': (1, 3),
        'qkv_bias': True,
        'norm_after_stage': [True, False, False, True],
    },
    'svt': {'type': 'mmpretrain.SVT', 'arch': {**TWINS, 'window_sizes': [3, 2, 2, 2]}, 'out_indices': (1, 3)},
    'seg_pcpvt': {'type': 'mmseg.PCPVT', **TWINS, 'out_indices': (1, 3), 'qkv_bias': True},
    'seg_svt': {'type': 'mmseg.SVT', **TWINS, 'windiow_sizes': [3, 2, 2, 2], 'out_indices': (1, 3), 'drop_path_rate': 0.0},
    'mscan': {'type': 'mmseg.MSCAN', **STAGES, 'norm_cfg': {'type': 'BN'}},
    'van': {'type': 'mmpretrain.VAN', 'arch': {**STAGES, 'ffn_ratios': [2, 2, 2, 2]}, 'out_indices': (1, 3)},
}
UNITS = {'mit': MitUnit}


def about(name):
    """The arguments of a family of the classifiers' parity tests."""
    unit = UNITS.get(name, GridUnit)
    return {
        'config': CONFIGS[name],
        'stem': lambda backbone, modules: unit(modules),
        'wrap': unit,
        'outputs': lambda tail, taps: tuple(map(unit.to_map, taps)),
    }


ALIKE = ('pvt_v2', 'svt', 'seg_pcpvt', 'seg_svt')
"""Those whose units are those of another one with other layers in them."""
GRIDS = {name: about(name) for name in CONFIGS}
