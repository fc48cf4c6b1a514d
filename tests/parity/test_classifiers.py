"""Lock-step parity on mmpretrain's classifiers: every backbone family, under every system, in every row of the ablation."""

import copy
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


def swin_out(norm, x):
    side = round(x.shape[1] ** 0.5)
    return norm(x).view(len(x), side, side, -1).permute(0, 3, 1, 2).contiguous()


@MODELS.register_module()
class JoinOutputs(BaseModule):
    """All outputs of a backbone, pooled, as one feature vector, so that every output has a gradient."""

    def forward(self, outs):
        return (torch.cat([out.flatten(2).mean(2) if out.dim() == 4 else out for out in outs], dim=1),)


@dataclass
class Family:
    """A backbone, and what its forward does around its units, for the reference to do the same.

    ``tail`` names the modules that make outputs of units' outputs, ``outputs`` does it.
    """

    config: dict
    stem: Callable | None = None
    wrap: Callable = field(default=lambda unit: unit)
    tail: tuple[str, ...] = ()
    outputs: Callable = field(default=lambda tail, taps: tuple(taps))


VIT = {
    'type': 'VisionTransformer',
    'img_size': SIZE,
    'patch_size': 8,
    'arch': {'embed_dims': 12, 'num_layers': 4, 'num_heads': 3, 'feedforward_channels': 24},
}
FAMILIES = {
    'cifar_resnet': Family({'type': 'mmman.CIFARResNet', 'depth': 20, 'out_indices': (1, 2)}),
    'resnet': Family({'type': 'ResNet', **NARROW}),
    'resnext': Family({'type': 'ResNeXt', **NARROW, 'depth': 50, 'base_channels': 16, 'groups': 4, 'width_per_group': 4}),
    'se_resnet': Family({'type': 'SEResNet', **NARROW, 'depth': 50, 'base_channels': 16}),
    'vgg': Family({'type': 'VGG', 'depth': 11}),
    'vgg_bn': Family({'type': 'VGG', 'depth': 11, 'norm_cfg': {'type': 'BN'}}),
    'regnet': Family({'type': 'RegNet', 'arch': REGNET, 'zero_init_residual': False}),
    'mobilenet_v2': Family({'type': 'MobileNetV2', 'widen_factor': 0.25}),
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
TRANSFORMERS = ('vit', 'vit_mean', 'deit', 'swin')
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
    config = FAMILIES[family].config
    loss = {'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1, 'num_classes': CLASSES}
    kind = 'DeiTClsHead' if family == 'deit' else 'LinearClsHead'
    head = {'type': kind, 'num_classes': CLASSES, 'in_channels': 1, 'loss': loss}
    stock = MODELS.build(copy.deepcopy(config))
    stock.eval()
    with torch.no_grad():
        outs = stock(torch.zeros(1, 3, SIZE, SIZE))
    if family != 'deit':
        outs = [torch.cat([out.flatten(1)[:, : out.shape[1]] for out in outs], dim=1)]
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
        'head': {**head, 'in_channels': outs[0][0].shape[-1]},
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
    return model


def images(count=6, seed=0):
    from mmpretrain.structures import DataSample

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
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
    batches = [images(seed=i) for i in range(iters)]
    return compare_steps(model, reference(model, family, row), batches, lambda model: task_modules(model, family))


CASES = [
    (family, system, row) for family in FAMILIES for system in SYSTEMS for row in ROWS if family in ONLY.get(system, FAMILIES)
]


@pytest.mark.filterwarnings('ignore:MMPretrain cannot train the distilled')
@pytest.mark.parametrize(('family', 'system', 'row'), CASES)
def test_bitwise_parity(family, system, row):
    torch.manual_seed(0)
    gradients = lockstep(classifier(family, system, row), family, row)
    # a constant per channel has no gradient in front of BatchNorm, in stock models too
    still = [name for name in without_gradient(gradients) if not name.endswith('.bias') or gradients[name] is None]
    assert not still, f'no gradient at {still}'


@pytest.mark.parametrize('family', ['cifar_resnet', 'vit'])
def test_parity_under_mixup_and_label_smoothing(family):
    torch.manual_seed(0)
    augments = {'augments': [{'type': 'Mixup', 'alpha': 0.8}, {'type': 'CutMix', 'alpha': 1.0}]}
    lockstep(classifier(family, batch_augments=augments), family, 'manpp')


@pytest.mark.filterwarnings('ignore:MMPretrain cannot train the distilled')
@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'vgg'])
def test_every_number_of_blocks(family):
    """From 2 to one unit a block: a training step, every parameter with a gradient but the scales, which start balanced."""
    units = len(chain_of(MODELS.build(FAMILIES[family].config | {'type': scoped(family)})).units)
    for num_blocks in range(2, units + 1):
        torch.manual_seed(0)
        model = classifier(family, num_blocks=num_blocks)
        assert len(model.backbone.local) == num_blocks - 1
        # an output from inside ConvNeXt's final block is summed with the next stage's gradient in another memory format there
        is_compared = num_blocks in (3 if family == 'convnext' else 2, units)
        gradients = lockstep(model, family, 'manpp') if is_compared else one_step(model)
        still = without_gradient(gradients)
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


def scoped(family):
    kind = FAMILIES[family].config['type']
    return kind if '.' in kind else f'mmpretrain.{kind}'


def one_step(model):
    wrapper = build_optim_wrapper(model, {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.05}})
    wrapper.initialize_count_status(model, 0, 1)
    wrapper.zero_grad = lambda: None
    model.train_step(images(), wrapper)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
