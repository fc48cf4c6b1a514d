"""A table of the backbone families that can be cut, with one row for each forward pass.

The key of a row is the class that *defines* ``forward``. The row serves all subclasses that inherit this forward unchanged
(ResNeXt, ResNetV1d, SE-ResNet, a user's subclass). A subclass with its own forward (DetectoRS_ResNet) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mmman.errors import UnsupportedBackboneError
from mmman.partition.chain import STEM, Chain, Unit


def resnet(backbone: nn.Module) -> Chain:
    """Stem (7x7 or deep), then residual blocks in ``layer1`` to ``layer4``; one output for each stage in ``out_indices``."""
    stem = ('stem',) if backbone.deep_stem else ('conv1', backbone.norm1_name)
    return _staged(backbone, Unit(STEM, (*stem, 'maxpool'), 'maxpool', 0), backbone.res_layers)


def cifar_resnet(backbone: nn.Module) -> Chain:
    """mmman's ResNet of depth 6n+2: a 3x3 stem, then three stages of n residual blocks."""
    return _staged(backbone, Unit(STEM, ('stem',), 'stem', 0), backbone.res_layers)


def regnet(backbone: nn.Module) -> Chain:
    """A 3x3 stem without pooling, then four stages of residual blocks; mmpretrain's ResNet_CIFAR has the same layout."""
    return _staged(backbone, Unit(STEM, ('conv1', backbone.norm1_name, 'relu'), 'relu', 0), backbone.res_layers)


def mobilenet_v2(backbone: nn.Module) -> Chain:
    """A 3x3 stem, seven stages of inverted residuals, and an optional 1x1 convolution as the last stage."""
    return _staged(backbone, Unit(STEM, ('conv1',), 'conv1', 0), backbone.layers)


def vgg(backbone: nn.Module) -> Chain:
    """Each convolution with its norm and activation is a unit; a max pooling is part of the unit before it.

    The fully connected layers of a VGG with ``num_classes`` only make an output, so they count as part of the model's head.
    """
    units, out_units = [], []
    for stage, (first, end) in enumerate(backbone.range_sub_modules):
        layers = [f'{backbone.module_name}.{i}' for i in range(first, end)]
        pools = [path for path in layers if isinstance(backbone.get_submodule(path), nn.MaxPool2d)]
        convolutions = [path for path in layers if path not in pools]
        units += [Unit.single(path, stage) for path in convolutions[:-1]]
        last = (convolutions[-1], *pools)
        units.append(Unit(convolutions[-1], last, last[-1], stage))
        if stage in backbone.out_indices:
            out_units.append(len(units) - 1)
    if backbone.num_classes > 0:
        out_units.append(len(units) - 1)
        return Chain(tuple(units), tuple(out_units), input_size=(224, 224))
    return Chain(tuple(units), tuple(out_units))


def vision_transformer(backbone: nn.Module) -> Chain:
    """Patch, class and position embedding, then the layers. The final norm counts as part of the model's head."""
    own = ('pos_embed', 'cls_token', 'dist_token')
    tensors = tuple(name for name in own if isinstance(getattr(backbone, name, None), nn.Parameter))
    is_distilled = 'dist_token' in tensors  # a distilled ViT's forward has no pre_norm
    stem = ('patch_embed', 'drop_after_pos') if is_distilled else ('patch_embed', 'drop_after_pos', 'pre_norm')
    units = [Unit(STEM, stem, stem[-1], 0, tensors), *(Unit.single(f'layers.{i}', 0) for i in range(len(backbone.layers)))]
    out_units = tuple(1 + i for i in range(len(backbone.layers)) if i in backbone.out_indices)
    norms = dict.fromkeys(range(len(out_units)), 'ln2') if backbone.out_type == 'avg_featmap' else {}
    size = tuple(backbone.patch_embed.init_input_size)
    return Chain(tuple(units), out_units, norms, extra_tokens=backbone.num_extra_tokens, input_size=size)


def swin(backbone: nn.Module) -> Chain:
    """Patch embedding, then window-attention blocks; a patch merging is one unit with the block that follows it."""
    tensors = ('absolute_pos_embed',) if backbone.use_abs_pos_embed else ()
    units = [Unit(STEM, ('patch_embed', 'drop_after_pos'), 'drop_after_pos', 0, tensors)]
    last, out_units = [], []
    after = getattr(backbone, 'out_after_downsample', False)
    for i, stage in enumerate(backbone.stages):
        merging = (f'stages.{i - 1}.downsample',) if i else ()
        units.append(Unit.sequence((*merging, f'stages.{i}.blocks.0'), i))
        units += [Unit.single(f'stages.{i}.blocks.{j}', i) for j in range(1, len(stage.blocks))]
        last.append(len(units) - 1)
    for i in backbone.out_indices:
        # an output after the patch merging comes from inside the next stage's first unit
        out_units.append(last[i] + 1 if after and i + 1 < len(last) else last[i])
    norms = {element: f'norm{i}' for element, i in enumerate(sorted(backbone.out_indices))}
    size = backbone.patch_embed.init_input_size or (224, 224)
    return Chain(tuple(units), tuple(sorted(out_units)), norms, needs_hw_shape=True, input_size=tuple(size))


def convnext(backbone: nn.Module) -> Chain:
    """A patch stem, then ConvNeXt blocks; a downsampling layer is one unit with the block that follows it."""
    units, out_units = [Unit(STEM, ('downsample_layers.0',), 'downsample_layers.0', 0)], []
    for i, stage in enumerate(backbone.stages):
        downsampling = (f'downsample_layers.{i}',) if i else ()
        units.append(Unit.sequence((*downsampling, f'stages.{i}.0'), i))
        units += [Unit.single(f'stages.{i}.{j}', i) for j in range(1, len(stage))]
        if i in backbone.out_indices:
            out_units.append(len(units) - 1)
    norms = {element: f'norm{i}' for element, i in enumerate(sorted(backbone.out_indices))}
    return Chain(tuple(units), tuple(out_units), norms)


def _staged(backbone: nn.Module, stem: Unit, layers: Sequence[str]) -> Chain:
    """A stem, then stages that are sequences of units or single units; one output for each stage in ``out_indices``."""
    units, out_units = [stem], []
    for stage, layer in enumerate(layers):
        module = backbone.get_submodule(layer)
        names = [f'{layer}.{name}' for name, _ in module.named_children()] if isinstance(module, nn.Sequential) else [layer]
        units += [Unit.single(name, stage) for name in names]
        if stage in backbone.out_indices:
            out_units.append(len(units) - 1)
    return Chain(tuple(units), tuple(out_units))


_FAMILIES: dict[str, Callable[[nn.Module], Chain]] = {
    'mmdet.models.backbones.mobilenet_v2.MobileNetV2': mobilenet_v2,
    'mmdet.models.backbones.regnet.RegNet': regnet,
    'mmdet.models.backbones.resnet.ResNet': resnet,
    'mmdet.models.backbones.swin.SwinTransformer': swin,
    'mmman.backbones.cifar_resnet.CIFARResNet': cifar_resnet,
    'mmpretrain.models.backbones.convnext.ConvNeXt': convnext,
    'mmpretrain.models.backbones.deit.DistilledVisionTransformer': vision_transformer,
    'mmpretrain.models.backbones.mobilenet_v2.MobileNetV2': mobilenet_v2,
    'mmpretrain.models.backbones.regnet.RegNet': regnet,
    'mmpretrain.models.backbones.resnet.ResNet': resnet,
    'mmpretrain.models.backbones.resnet_cifar.ResNet_CIFAR': regnet,
    'mmpretrain.models.backbones.swin_transformer.SwinTransformer': swin,
    'mmpretrain.models.backbones.vgg.VGG': vgg,
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': vision_transformer,
    'mmseg.models.backbones.mobilenet_v2.MobileNetV2': mobilenet_v2,
    'mmseg.models.backbones.resnet.ResNet': resnet,
    'mmseg.models.backbones.swin.SwinTransformer': swin,
}


def register_chain(forward_class: str) -> Callable[[Callable[[nn.Module], Chain]], Callable[[nn.Module], Chain]]:
    """Register a backbone family. Decorates a function that enumerates the units of a backbone.

    The function is used for backbones whose ``forward`` is defined by ``forward_class``.

    Args:
        forward_class: Import path of the class, e.g. ``my_project.models.MyNet``. The class isn't imported.

    Raises:
        ValueError: The class is already registered.
    """

    if forward_class in _FAMILIES:
        raise ValueError(f'{forward_class} is already registered')

    def register(enumerate_units: Callable[[nn.Module], Chain]) -> Callable[[nn.Module], Chain]:
        _FAMILIES[forward_class] = enumerate_units
        return enumerate_units

    return register


def chain_of(backbone: nn.Module) -> Chain:
    """Return the chain of units of ``backbone``.

    Raises:
        UnsupportedBackboneError: The class that defines ``forward`` isn't registered; ``forward`` was replaced on the instance;
            or a unit other than the first has an output that isn't that of its last module.
    """
    owner = next(cls for cls in type(backbone).__mro__ if 'forward' in vars(cls))
    enumerate_units = _FAMILIES.get(f'{owner.__module__}.{owner.__qualname__}')
    if enumerate_units is None or 'forward' in vars(backbone):
        raise UnsupportedBackboneError(
            f'{type(backbone).__name__} cannot be cut into blocks: its forward pass '
            + (
                'was replaced on the instance'
                if enumerate_units
                else f'({owner.__module__}.{owner.__qualname__}) is not supported'
            )
            + f'. Supported are the classes that inherit it unchanged from {", ".join(sorted(_FAMILIES))}; '
            'docs/howto/new_backbone.md shows how to add another.'
        )
    chain = enumerate_units(backbone)
    for unit in chain.units[1:]:
        if unit.modules[-1] != unit.output:
            raise UnsupportedBackboneError(
                f'{type(backbone).__name__}: the output of the unit {unit.name} is not that of its last module, '
                f'{unit.modules[-1]}; only the first unit may do more than run its modules in order, because a momentum '
                'transfer copies the first unit of the next block'
            )
    return chain
