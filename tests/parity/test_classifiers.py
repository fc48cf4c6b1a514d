"""Lock-step parity on mmpretrain's classifiers: every backbone family, under every system, in every row of the ablation."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmman.partition import chain_of
from tests.alive import without_gradient
from tests.narrow import is_narrowed, narrow
from tests.parity.grids import ALIKE, GRIDS
from tests.parity.lockstep import ROWS, compare_steps, reference_of, task_of, total

pytest.importorskip('mmpretrain')

CLASSES = 5
SIZE = 32
NARROW = {'depth': 18, 'base_channels': 8, 'zero_init_residual': False}
REGNET = {'w0': 8, 'wa': 36.0, 'wm': 2.2, 'group_w': 8, 'depth': 6, 'bot_mul': 1.0}


class Vit(nn.ModuleList):
    """What a ViT does in front of its layers, for images of the size that it was built for."""

    def __init__(self, backbone, modules):
        super().__init__(modules)
        self.tokens = [name for name in ('cls_token', 'dist_token') if getattr(backbone, name, None) is not None]
        for name in ('pos_embed', *self.tokens):
            setattr(self, name, getattr(backbone, name))

    def forward(self, images):
        embed, *rest = self
        x = embed(images)[0]
        if self.tokens:
            x = torch.cat([*(getattr(self, name).expand(len(x), -1, -1) for name in self.tokens), x], dim=1)
        x = x + self.pos_embed
        for module in rest:
            x = module(x)
        return x


class SwinStem(nn.Sequential):
    def __init__(self, backbone, modules):
        super().__init__(*modules)

    def forward(self, images):
        return self[1](self[0](images)[0])


class SwinUnit(nn.Sequential):
    """Blocks on square inputs, behind a patch merging where there is one."""

    def __init__(self, modules):
        super().__init__(*modules)

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        *mergings, block = self
        for module in mergings:
            x, (side, _) = module(x, (side, side))
        return block(x, (side, side))


class JoinedVit(nn.ModuleList):
    """An embedding that is one unit with the first layer: mmseg's BEiT and MAE, mmpretrain's MLP-Mixer and Vig."""

    def __init__(self, backbone, modules):
        super().__init__(modules)
        self.tokens = [name for name in ('cls_token', 'pos_embed') if getattr(backbone, name, None) is not None]
        for name in self.tokens:
            setattr(self, name, getattr(backbone, name))

    def forward(self, images):
        embed, *rest = self
        x = embed(images)
        x = x[0] if isinstance(x, tuple) else x
        if 'cls_token' in self.tokens:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.pos_embed if 'pos_embed' in self.tokens else x
        for module in rest:
            x = module(x)
        return x


class DeiT3Stem(Vit):
    """The class token is appended behind the position embedding."""

    def forward(self, images):
        embed, drop, layer = self
        x = drop(embed(images)[0] + self.pos_embed)
        return layer(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))


class WithoutToken(Vit):
    """mmseg's ViT that drops the class token in front of the layers."""

    def forward(self, images):
        embed, drop, layer = self
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), embed(images)[0]], dim=1)
        return layer(drop(x + self.pos_embed)[:, 1:])


class EvaLayer(nn.Sequential):
    """A layer on a class token and square patches."""

    def __init__(self, modules):
        super().__init__(*modules)

    def forward(self, x):
        side = round((x.shape[1] - 1) ** 0.5)
        return self[0](x, (side, side))


class DavitStem(nn.Sequential):
    def __init__(self, backbone, modules):
        super().__init__(*modules)

    def forward(self, images):
        embed, block = self
        return block(*embed(images))


def map_of(tokens, extra=1):
    """mmseg's map of square patches, without the class token."""
    patches = tokens[:, extra:]
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2).contiguous()


def swin_out(norm, x):
    side = round(x.shape[1] ** 0.5)
    return norm(x).view(len(x), side, side, -1).permute(0, 3, 1, 2).contiguous()


@MODELS.register_module()
class JoinOutputs(BaseModule):
    """All outputs of a backbone, pooled, as one feature vector, so that every output has a gradient."""

    def forward(self, outs):
        return (torch.cat([out.flatten(2).mean(2) if out.dim() > 2 else out for out in outs], dim=1),)


@dataclass
class Family:
    """A backbone, and what its forward does around its units, for the reference to do the same.

    ``tail`` names the modules that make outputs of units' outputs, ``outputs`` does it. ``size`` is the side of the images.
    """

    config: dict
    stem: Callable | None = None
    wrap: Callable = field(default=lambda unit: unit)
    tail: tuple[str, ...] = ()
    outputs: Callable = field(default=lambda tail, taps: tuple(taps))
    size: int = SIZE


VIT = {
    'type': 'VisionTransformer',
    'img_size': SIZE,
    'patch_size': 8,
    'arch': {'embed_dims': 12, 'num_layers': 4, 'num_heads': 3, 'feedforward_channels': 24},
}
FAMILIES = {
    'cifar_resnet': Family({'type': 'mmman.CIFARResNet', 'depth': 20, 'out_indices': (1, 2)}),
    'resnet': Family({'type': 'ResNet', **NARROW}),
    'resnext': Family(
        {'type': 'mmpretrain.ResNeXt', **NARROW, 'depth': 50, 'base_channels': 16, 'groups': 4, 'width_per_group': 4}
    ),
    'se_resnet': Family({'type': 'mmpretrain.SEResNet', **NARROW, 'depth': 50, 'base_channels': 16}),
    'vgg': Family({'type': 'mmpretrain.VGG', 'depth': 11}),
    'vgg_bn': Family({'type': 'mmpretrain.VGG', 'depth': 11, 'norm_cfg': {'type': 'BN'}}),
    'regnet': Family({'type': 'RegNet', 'arch': REGNET, 'zero_init_residual': False}),
    'mobilenet_v2': Family({'type': 'mmpretrain.MobileNetV2', 'widen_factor': 0.25}),
    'vit': Family(VIT, Vit, tail=('ln1',), outputs=lambda tail, taps: (tail[0](taps[0])[:, 0],)),
    'vit_mean': Family(
        {**VIT, 'with_cls_token': False, 'out_type': 'avg_featmap', 'out_indices': [1, 3]},
        Vit,
        tail=('ln1', 'ln2'),
        outputs=lambda tail, taps: (tail[1](taps[0].mean(1)), tail[1](tail[0](taps[1]).mean(1))),
    ),
    'deit': Family(
        {**VIT, 'type': 'DistilledVisionTransformer'},
        Vit,
        tail=('ln1',),
        outputs=lambda tail, taps: (tail[0](taps[0])[:, :2].unbind(1),),
    ),
    'swin': Family(
        {
            'type': 'SwinTransformer',
            'arch': {'embed_dims': 8, 'depths': [1, 2, 1, 2], 'num_heads': [1, 2, 2, 4]},
            'img_size': SIZE,
            'patch_size': 2,
            'window_size': 2,
            'out_indices': (1, 3),
            'drop_path_rate': 0.0,
        },
        SwinStem,
        SwinUnit,
        tail=('norm1', 'norm3'),
        outputs=lambda tail, taps: tuple(swin_out(norm, x) for norm, x in zip(tail, taps, strict=True)),
    ),
    'convnext': Family(
        {
            'type': 'ConvNeXt',
            'arch': {'depths': [1, 2, 1, 2], 'channels': [8, 12, 16, 24]},
            'out_indices': [1, 3],
            'layer_scale_init_value': 0.1,
        },
        tail=('norm1', 'norm3'),
        outputs=lambda tail, taps: tuple(norm(x.mean((2, 3), True)).flatten(1) for norm, x in zip(tail, taps, strict=True)),
    ),
}
LAYERS = {'embed_dims': 12, 'num_layers': 4, 'num_heads': 3, 'img_size': SIZE, 'patch_size': 8}
DW = {'type': 'DW', 'kernel_size': 7}
POOLFORMER = {
    'arch': {'layers': [1, 2, 1, 1], 'embed_dims': [8, 12, 16, 24], 'layer_scale_init_value': 0.1},
    'frozen_stages': -1,
}
BY_NORM = {'outputs': lambda tail, taps: tuple(norm(x) for norm, x in zip(tail, taps, strict=True))}
# families whose forward pass runs through the same mechanisms as one above: one system and one row of the ablation are enough
FURTHER = {
    'cspnext': Family({'type': 'mmdet.CSPNeXt', 'widen_factor': 0.125, 'deepen_factor': 0.33, 'out_indices': (3, 4)}),
    'csp_darknet': Family({'type': 'mmdet.CSPDarknet', 'widen_factor': 0.125, 'deepen_factor': 0.33}),
    'darknet': Family({'type': 'mmdet.Darknet', 'norm_eval': False}),
    'ssd_vgg': Family({'type': 'mmdet.SSDVGG', 'depth': 11, 'out_feature_indices': (12, 24)}),
    'efficientnet': Family({'type': 'mmpretrain.EfficientNet', 'arch': 'b0'}),
    'efficientnet_v2': Family({'type': 'mmpretrain.EfficientNetV2', 'arch': 'b0'}),
    'det_efficientnet': Family({'type': 'mmdet.EfficientNet', 'arch': 'b0', 'out_indices': (4, 6)}),
    'mobilenet_v3': Family({'type': 'MobileNetV3', 'arch': 'small_050', 'out_indices': (8, 12)}),
    'seg_mobilenet_v3': Family({'type': 'mmseg.MobileNetV3', 'reduction_factor': 4, 'out_indices': (1, 12)}),
    'repvgg': Family(
        {
            'type': 'RepVGG',
            'arch': {'num_blocks': [1, 2, 2, 1], 'width_factor': [1, 1, 1, 1], 'group_layer_map': None, 'se_cfg': None},
            'base_channels': 8,
            'add_ppf': True,
        }
    ),
    'mobileone': Family(
        {
            'type': 'MobileOne',
            'arch': {
                'num_blocks': [1, 2, 1, 1],
                'width_factor': [0.125, 0.125, 0.0625, 0.0625],
                'num_conv_branches': [1, 2, 1, 1],
                'num_se_blocks': [0, 0, 1, 1],
            },
        }
    ),
    'shufflenet_v1': Family({'type': 'ShuffleNetV1', 'widen_factor': 0.5, 'out_indices': (1, 2)}),
    'shufflenet_v2': Family({'type': 'ShuffleNetV2', 'widen_factor': 0.5}),
    'csp_net': Family({'type': 'mmpretrain.CSPDarkNet', 'depth': 53, 'out_indices': (1, 2)}),
    'densenet': Family(
        {'type': 'DenseNet', 'arch': {'growth_rate': 4, 'depths': [2, 3, 2, 2], 'init_channels': 8}, 'out_indices': [2, 3]}
    ),
    'mobilevit': Family({'type': 'MobileViT', 'arch': 'xx_small', 'out_indices': (3, 4)}),
    'convmixer': Family(
        {'type': 'ConvMixer', 'arch': {'embed_dims': 8, 'depth': 4, 'patch_size': 4, 'kernel_size': 5}, 'out_indices': [1, 3]}
    ),
    'poolformer': Family(
        {'type': 'PoolFormer', **POOLFORMER, 'out_indices': [2, 6]}, tail=('norm2', 'norm6'), **BY_NORM, size=64
    ),
    'riformer': Family({'type': 'RIFormer', **POOLFORMER, 'out_indices': [2, 6]}, tail=('norm2', 'norm6'), **BY_NORM),
    'hornet': Family(
        {
            'type': 'HorNet',
            'arch': {'base_dim': 8, 'depths': [1, 2, 1, 1], 'orders': [2, 3, 2, 3], 'dw_cfg': [DW] * 4},
            'out_indices': (1, 3),
            'use_layer_scale': False,
            'scale': 1.0,
        },
        tail=('norm1', 'norm3'),
        outputs=lambda tail, taps: tuple(norm(x.mean((2, 3), True)).flatten(1) for norm, x in zip(tail, taps, strict=True)),
    ),
    'vig': Family({'type': 'mmpretrain.Vig', 'arch': 'tiny', 'out_indices': [1, 3]}, JoinedVit, size=224),
    'pyramid_vig': Family({'type': 'mmpretrain.PyramidVig', 'arch': 'tiny', 'out_indices': [1, 3]}, JoinedVit, size=224),
    'erfnet': Family(
        {
            'type': 'mmseg.ERFNet',
            'dropout_ratio': 0.0,
            'enc_downsample_channels': (8, 12, 16),
            'enc_stage_non_bottlenecks': (2, 2),
            'enc_non_bottleneck_dilations': (2, 4),
            'enc_non_bottleneck_channels': (12, 16),
            'dec_upsample_channels': (12, 8),
            'dec_stages_non_bottleneck': (2, 1),
            'dec_non_bottleneck_channels': (12, 8),
        }
    ),
    'seg_vit': Family(
        {'type': 'mmseg.VisionTransformer', **LAYERS, 'out_indices': (1, 3), 'final_norm': True},
        Vit,
        tail=('ln1',),
        outputs=lambda tail, taps: (map_of(taps[0]), map_of(tail[0](taps[1]))),
    ),
    'seg_vit_without_token': Family(
        {'type': 'mmseg.VisionTransformer', **LAYERS, 'out_indices': (1, 3), 'with_cls_token': False},
        WithoutToken,
        outputs=lambda tail, taps: tuple(map_of(x, 0) for x in taps),
    ),
    'beit': Family(
        {'type': 'mmseg.BEiT', **LAYERS, 'out_indices': (1, 3), 'final_norm': True},
        JoinedVit,
        tail=('ln1',),
        outputs=lambda tail, taps: (map_of(taps[0]), map_of(tail[0](taps[1]))),
    ),
    'mae': Family(
        {'type': 'mmseg.MAE', **LAYERS, 'out_indices': (1, 3)},
        JoinedVit,
        outputs=lambda tail, taps: tuple(map(map_of, taps)),
    ),
    'mlp_mixer': Family(
        {
            'type': 'MlpMixer',
            'arch': {'embed_dims': 12, 'num_layers': 4, 'tokens_mlp_dims': 8, 'channels_mlp_dims': 24},
            'img_size': SIZE,
            'patch_size': 8,
        },
        JoinedVit,
        tail=('ln1',),
        outputs=lambda tail, taps: (tail[0](taps[0]).transpose(1, 2),),
    ),
    'deit3': Family({**VIT, 'type': 'DeiT3'}, DeiT3Stem, tail=('ln1',), outputs=lambda tail, taps: (tail[0](taps[0])[:, 0],)),
    'eva02': Family(
        {**VIT, 'type': 'ViTEVA02', 'sub_ln': True},
        Vit,
        EvaLayer,
        tail=('ln1', 'rope'),
        outputs=lambda tail, taps: (tail[0](taps[0])[:, 0],),
    ),
    't2t_vit': Family(
        {'type': 'T2T_ViT', 'embed_dims': 12, 'num_layers': 4, 'img_size': 64, 't2t_cfg': {'token_dims': 8}},
        Vit,
        tail=('norm',),
        outputs=lambda tail, taps: (tail[0](taps[0])[:, 0],),
        size=64,
    ),
    'swin_v2': Family(
        {
            'type': 'SwinTransformerV2',
            'arch': {'embed_dims': 8, 'depths': [1, 2, 1, 2], 'num_heads': [1, 2, 2, 4], 'extra_norm_every_n_blocks': 2},
            'img_size': SIZE,
            'patch_size': 2,
            'window_size': 2,
            'out_indices': (1, 3),
            'drop_path_rate': 0.0,
        },
        SwinStem,
        SwinUnit,
        tail=('norm1', 'norm3'),
        outputs=lambda tail, taps: tuple(swin_out(norm, x) for norm, x in zip(tail, taps, strict=True)),
    ),
    'davit': Family(
        {
            'type': 'DaViT',
            'arch': {'embed_dims': 8, 'depths': [1, 2, 1, 2], 'num_heads': [1, 2, 2, 4]},
            'patch_size': 2,
            'window_size': 2,
            'out_indices': (1, 3),
            'drop_path_rate': 0.0,
        },
        DavitStem,
        SwinUnit,
        tail=('norm1', 'norm3'),
        outputs=lambda tail, taps: tuple(swin_out(norm, x) for norm, x in zip(tail, taps, strict=True)),
    ),
}
FURTHER |= {name: Family(**options) for name, options in GRIDS.items()}
FAMILIES |= FURTHER
TRANSFORMERS = ('vit', 'vit_mean', 'deit', 'swin', 'mlp_mixer', 'deit3', 'eva02', 't2t_vit', 'swin_v2', 'davit', 'pcpvt', 'svt')
ONLY = {'vit': TRANSFORMERS, 'lam': ('cifar_resnet', 'regnet', 'vit', 'swin')}  # LAM has no adapters
SYSTEMS = {
    'dgl': {'type': 'mmman.DGLLocalHead', 'conv_channels': 8, 'fc_channels': 12},
    'infopro': {'type': 'mmman.InfoProLocalHead'},
    'infopro_contrast': {'type': 'mmman.InfoProLocalHead', 'classifier': '1c2f', 'contrast': True, 'lambda_rec': (5.0, 1.0)},
    'predsim': {'type': 'mmman.PredSimLocalHead'},
    'auglocal': {'type': 'mmman.AugLocalHead', 'depth': 2},
    'lam': {'type': 'mmman.LAMLocalHead', 'depth': 3},
    'vit': {'type': 'mmman.ViTLocalHead'},
}


def classifier(family, system='dgl', row='manpp', num_blocks=3, partition=None, **preprocessor):
    init_default_scope('mmpretrain')
    config = config_of(family)
    loss = {'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1, 'num_classes': CLASSES}
    kind = 'DeiTClsHead' if family == 'deit' else 'LinearClsHead'
    head = {'type': kind, 'num_classes': CLASSES, 'in_channels': 1, 'loss': loss}
    backbone = {
        'type': 'mmman.LocalBackbone',
        'backbone': copy.deepcopy(config),
        'num_blocks': num_blocks,
        'partition': partition or ('stage' if 'layers' in str(config) else 'uniform'),
        'transfer': ROWS[row],
        'local_head': {**SYSTEMS[system], 'head': head},
    }
    model = {
        'type': 'ImageClassifier',
        'backbone': backbone,
        'neck': None if family == 'deit' else {'type': 'JoinOutputs'},
        'head': {**head, 'in_channels': out_channels(family)},
        'data_preprocessor': {
            'type': 'ClsDataPreprocessor',
            'mean': [120.0, 110.0, 100.0],
            'std': [60.0, 55.0, 50.0],
            'num_classes': CLASSES,
            **preprocessor,
        },
    }
    model = MODELS.build(model).double().train()
    model.backbone.local.init_weights()
    for head in model.backbone.local.values():
        for module in head.modules():  # classifiers that start at 0 pass no gradient on
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.1)
        head.transfer.init_from_(head.source.of(model.backbone))
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.backbone.local.sync_modes(model.backbone)  # a backbone may set the mode of every BatchNorm in it (SSDVGG)
    return model


@functools.cache
def out_channels(family):
    """Channels of all outputs of the stock backbone."""
    with torch.random.fork_rng(), torch.no_grad():
        stock = MODELS.build(config_of(family))
        stock.eval()
        outs = stock(torch.zeros(1, 3, *[FAMILIES[family].size] * 2))
    return outs[0][0].shape[-1] if family == 'deit' else sum(out.shape[1] for out in outs)


def config_of(family):
    config = copy.deepcopy(FAMILIES[family].config)
    library, dot, _ = config['type'].partition('.')
    if dot and library != 'mmman':
        pytest.importorskip(library)
    return config | {'type': narrow(config['type']) if is_narrowed(config['type']) else config['type']}


def images(count=6, seed=0, size=SIZE):
    from mmpretrain.structures import DataSample

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return {'inputs': [*pixels], 'data_samples': [DataSample().set_gt_label(i % 3) for i in range(count)]}


def reference(model, family, row):
    about = FAMILIES[family]

    def local_loss(j, task, y, batch):
        task.session = SimpleNamespace(model=model)  # whose preprocessor says how images were normalised
        return total(task.loss(y, batch['inputs'], batch['data_samples']))

    def task_loss(own, features, batch):
        *tail, neck, head = own
        outs = about.outputs(tail, features)
        return total(head.loss(outs if isinstance(neck, nn.Identity) else neck(outs), batch['data_samples']))

    return reference_of(
        model.backbone,
        task_modules(model, family),
        ROWS[row],
        task_of,
        local_loss,
        task_loss,
        stem=about.stem,
        wrap=about.wrap,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        momentum=0.9,
    )


def task_modules(model, family):
    tail = [model.backbone.get_submodule(name) for name in FAMILIES[family].tail]
    return [*tail, model.neck or nn.Identity(), model.head]


def lockstep(model, family, row, iters=2):
    batches = [images(seed=i, size=FAMILIES[family].size) for i in range(iters)]
    return compare_steps(model, reference(model, family, row), batches, lambda model: task_modules(model, family))


CASES = [
    (family, system, row)
    for family in FAMILIES
    for system in SYSTEMS
    for row in ROWS
    if family in ONLY.get(system, FAMILIES)
    if family not in FURTHER
    or (
        system == ('vit' if family in TRANSFORMERS else 'dgl') and (row == 'manpp' or (family in GRIDS and family not in ALIKE))
    )
]


@pytest.mark.filterwarnings('ignore:MMPretrain cannot train the distilled')
@pytest.mark.parametrize(('family', 'system', 'row'), CASES)
def test_bitwise_parity(family, system, row):
    torch.manual_seed(0)
    gradients = lockstep(classifier(family, system, row), family, row)
    # a constant per channel has no gradient in front of BatchNorm, in stock models too
    still = [name for name in dead(gradients, family) if not name.endswith('.bias') or gradients[name] is None]
    assert not still, f'no gradient at {still}'


@pytest.mark.parametrize('family', ['cifar_resnet', 'vit'])
def test_parity_under_mixup_and_label_smoothing(family):
    torch.manual_seed(0)
    augments = {'augments': [{'type': 'Mixup', 'alpha': 0.8}, {'type': 'CutMix', 'alpha': 1.0}]}
    lockstep(classifier(family, batch_augments=augments), family, 'manpp')


@pytest.mark.filterwarnings('ignore:MMPretrain cannot train the distilled')
@pytest.mark.parametrize('family', [family for family in FAMILIES if family not in ('vgg', 'ssd_vgg', *ALIKE)])
def test_every_number_of_blocks(family):
    """From 2 to one unit a block: a training step, every parameter with a gradient but the scales, which start balanced.

    For further families some of these numbers.
    """
    init_default_scope('mmpretrain')
    units = len(chain_of(MODELS.build(config_of(family))).units)
    for num_blocks in sorted({2, 3, units // 2, units} - {0, 1}) if family in FURTHER else range(2, units + 1):
        torch.manual_seed(0)
        model = classifier(family, num_blocks=num_blocks)
        assert len(model.backbone.local) == num_blocks - 1
        # an output from inside ConvNeXt's final block is summed with the next stage's gradient in another memory format there
        is_compared = num_blocks in (3 if family in ('convnext', 'hornet') else 2, units)
        gradients = lockstep(model, family, 'manpp') if is_compared else one_step(model, FAMILIES[family].size)
        still = dead(gradients, family)
        assert all(gradients[name] is not None for name in still)
        # B starts as E, so s has no gradient; a constant per channel has none in front of BatchNorm, in stock models too
        assert all(name.endswith(('delta', '.bias')) for name in still), f'no gradient at {still} with K={num_blocks}'


INNER = {'vit_mean': 'layers.2', 'swin': 'stages.2.blocks.0', 'convnext': 'stages.2.0'}


@pytest.mark.parametrize('family', INNER)
def test_norms_on_outputs_from_inside_a_block(family, monkeypatch):
    """They are trained by the task loss, the block in front of them is not."""
    torch.manual_seed(0)
    lockstep(classifier(family, num_blocks=2, partition=[INNER[family]]), family, 'manpp')
    monkeypatch.setattr('mmman.local.blocks.LocalBlocks.detach_norm_input', lambda self, norm, args: None)
    with pytest.raises(
        (AssertionError, RuntimeError), match='differs after iteration|backward through the graph a second time'
    ):
        lockstep(classifier(family, num_blocks=2, partition=[INNER[family]]), family, 'manpp')


UNUSED = {'deit3': '.ln2.', 'seg_vit_without_token': '.cls_token', 'seg_pcpvt': 'backbone.norm1.', 'seg_svt': 'backbone.norm1.'}
"""Parameters that the stock forward pass doesn't use: a second norm of every layer, a token that is dropped, a last norm."""


def dead(gradients, family):
    """Names of parameters without a gradient, other than those that are unused."""
    return [name for name in without_gradient(gradients) if family not in UNUSED or UNUSED[family] not in name]


def one_step(model, size=SIZE):
    wrapper = build_optim_wrapper(model, {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.05}})
    wrapper.initialize_count_status(model, 0, 1)
    wrapper.zero_grad = lambda: None
    model.train_step(images(size=size), wrapper)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
