"""The chains of convolutional backbones, and of other backbones whose features are maps (B, C, H, W)."""

from __future__ import annotations

from torch import nn

from mmman.errors import UnsupportedBackboneError
from mmman.partition.chain import Chain, Unit
from mmman.partition.layouts import children, first_two, in_pairs, isotropic, output_norms, staged, stem, stem_in_list


def resnet(backbone: nn.Module) -> Chain:
    """Stem (7x7 or deep), then residual blocks in ``layer1`` to ``layer4``; one output for each stage in ``out_indices``."""
    first = ('stem',) if backbone.deep_stem else ('conv1', backbone.norm1_name)
    return staged(backbone, stem(*first, 'maxpool'), backbone.res_layers)


def cifar_resnet(backbone: nn.Module) -> Chain:
    """mmman's ResNet of depth 6n+2: a 3x3 stem, then three stages of n residual blocks."""
    return staged(backbone, stem('stem'), backbone.res_layers)


def regnet(backbone: nn.Module) -> Chain:
    """A 3x3 stem without pooling, then four stages of residual blocks; mmpretrain's ResNet_CIFAR has the same layout."""
    return staged(backbone, stem('conv1', backbone.norm1_name, 'relu'), backbone.res_layers)


def mobilenet_v2(backbone: nn.Module) -> Chain:
    """A 3x3 stem, seven stages of inverted residuals, and an optional 1x1 convolution as the last stage."""
    return staged(backbone, stem('conv1'), backbone.layers)


def named_layers(backbone: nn.Module) -> Chain:
    """CSPNeXt, CSPDarknet and MobileNetV3: ``layers`` names the stem and the stages.

    In the CSP networks the downsampling convolution of a stage is a unit of its own. Together with the CSP layer behind it, a
    unit would be a whole stage, too large for a momentum transfer to copy.
    """
    return stem_in_list(backbone, backbone.layers)


def efficientnet(backbone: nn.Module) -> Chain:
    """EfficientNet and EfficientNetV2: a 3x3 stem, stages of inverted residuals, and a 1x1 convolution as the last stage."""
    return stem_in_list(backbone, children(backbone, 'layers'))


def darknet(backbone: nn.Module) -> Chain:
    """A 3x3 stem, then five stages of residual blocks; a downsampling convolution is one unit with the block behind it."""
    return stem_in_list(backbone, backbone.cr_blocks, first_two)


def csp_net(backbone: nn.Module) -> Chain:
    """mmpretrain's CSPDarkNet, CSPResNet and CSPResNeXt: every stage is one unit, because its two branches are joined last."""
    return staged(backbone, stem('stem'), children(backbone, 'stages'))


def repvgg(backbone: nn.Module) -> Chain:
    """A stem and stages of RepVGG blocks; the pooling of ``add_ppf`` is the last unit, and makes the last stage's output."""
    if isinstance(backbone.ppf, nn.Identity):
        return staged(backbone, stem('stem'), backbone.stages)
    return _with_last_layer(backbone, backbone.stages, 'ppf')


def mobileone(backbone: nn.Module) -> Chain:
    """A stem, then stages whose blocks are a depthwise and a pointwise module each."""
    return staged(backbone, stem('stage0'), backbone.stages, group=in_pairs)


def shufflenet(backbone: nn.Module) -> Chain:
    """A 3x3 stem with a max pooling, then stages of shuffle units; V2 has a 1x1 convolution as the last stage."""
    return staged(backbone, stem('conv1', 'maxpool'), children(backbone, 'layers'))


def mobilevit(backbone: nn.Module) -> Chain:
    """A stem and stages; a 1x1 convolution is the last unit, and makes the last stage's output."""
    return _with_last_layer(backbone, children(backbone, 'layers'), 'conv_1x1_exp')


def densenet(backbone: nn.Module) -> Chain:
    """Every dense block is one unit with the transition behind it, because its layers take the features of all before them."""
    stages = zip(children(backbone, 'stages'), children(backbone, 'transitions'), strict=True)
    units = [stem('stem'), *(Unit.sequence(paths, i) for i, paths in enumerate(stages))]
    return Chain(tuple(units), tuple(1 + i for i in range(backbone.num_stages) if i in backbone.out_indices))


def convmixer(backbone: nn.Module) -> Chain:
    """A patch stem, then blocks of one width."""
    return isotropic(backbone, ('stem',), 'stages', input_size=(8 * backbone.patch_size,) * 2)


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


def ssd_vgg(backbone: nn.Module) -> Chain:
    """Each convolution with its activation is a unit; a max pooling is part of the unit behind it.

    The outputs are those of the modules in ``out_feature_indices``, of which some come in front of a pooling.
    """
    units, out_units, paths, stage = [], [], (), 0
    for i, path in enumerate(children(backbone, 'features')):
        layer = backbone.get_submodule(path)
        stage += isinstance(layer, nn.MaxPool2d)
        paths += (path,)
        if i in backbone.out_feature_indices:
            out_units.append(len(units))
        if isinstance(layer, nn.ReLU):
            units.append(Unit.sequence(paths, stage))
            paths = ()
    return Chain(tuple(units), tuple(out_units))


def convnext(backbone: nn.Module) -> Chain:
    """A patch stem, then ConvNeXt blocks; a downsampling layer is one unit with the block that follows it."""
    units, out_units = [stem('downsample_layers.0')], []
    for i, stage in enumerate(backbone.stages):
        downsampling = (f'downsample_layers.{i}',) if i else ()
        units.append(Unit.sequence((*downsampling, f'stages.{i}.0'), i))
        units += [Unit.single(f'stages.{i}.{j}', i) for j in range(1, len(stage))]
        if i in backbone.out_indices:
            out_units.append(len(units) - 1)
    return Chain(tuple(units), tuple(out_units), output_norms(backbone))


def hornet(backbone: nn.Module) -> Chain:
    """The layout of ConvNeXt."""
    if backbone.with_cp:
        raise UnsupportedBackboneError(
            'HorNet with with_cp=True cannot be cut into blocks: it checkpoints a whole stage at once, so that its units run '
            'twice in a step; set with_cp=False and use recompute'
        )
    return convnext(backbone)


def poolformer(backbone: nn.Module) -> Chain:
    """PoolFormer and RIFormer: a patch embedding, then stages of blocks.

    ``network`` lists the stages and the patch embeddings between them, each of which is one unit with the block that follows
    it. ``out_indices`` counts both: an output behind a patch embedding comes from inside that unit.
    """
    units, out_units, embedding, stage = [stem('patch_embed')], [], (), 0
    for i, path in enumerate(children(backbone, 'network')):
        if isinstance(backbone.get_submodule(path), nn.Sequential):
            first, *others = children(backbone, path)
            units += [Unit.sequence((*embedding, first), stage), *(Unit.single(other, stage) for other in others)]
            embedding = ()
            stage += 1
        else:
            embedding = (path,)
        if i in backbone.out_indices:
            out_units.append(len(units) - 1 + len(embedding))
    return Chain(tuple(units), tuple(out_units), output_norms(backbone))


def vig(backbone: nn.Module) -> Chain:
    """A stem with a position embedding for images of 224x224, then graph blocks. The stem is one unit with the first block."""
    return isotropic(backbone, ('stem',), 'blocks', ('pos_embed',), joins_first_layer=True, input_size=(224, 224))


def pyramid_vig(backbone: nn.Module) -> Chain:
    """Vig in four stages; a downsampling layer is one unit with the block that follows it."""
    first, *others = children(backbone, 'stages.0')
    units = [Unit(first, ('stem', first), first, 0, ('pos_embed',)), *(Unit.single(path, 0) for path in others)]
    last = [len(units) - 1]
    for i in range(1, len(backbone.stages)):
        units += [Unit.sequence(paths, i) for paths in first_two(children(backbone, f'stages.{i}'))]
        last.append(len(units) - 1)
    out_units = tuple(last[i] for i in range(len(last)) if i in backbone.out_indices)
    return Chain(tuple(units), out_units, input_size=(224, 224))


def erfnet(backbone: nn.Module) -> Chain:
    """Encoder and decoder run one after the other; a down- or upsampling block is one unit with the block that follows it."""
    first, *others = (*children(backbone, 'encoder'), *children(backbone, 'decoder'))
    units, paths, stage = [stem(first)], (), -1
    for path in others:
        paths += (path,)
        if type(backbone.get_submodule(path)).__name__ in ('DownsamplerBlock', 'UpsamplerBlock'):
            stage += 1
        else:
            units.append(Unit.sequence(paths, stage))
            paths = ()
    if paths:
        units.append(Unit.sequence(paths, stage))
    return Chain(tuple(units), (len(units) - 1,))


def _with_last_layer(backbone: nn.Module, stages: list[str], last: str) -> Chain:
    """A stem and stages, then a layer that makes the output of the last stage, as a stage of its own."""
    end = len(stages) - 1
    return staged(backbone, stem('stem'), [*stages, last], [i + (i == end) for i in backbone.out_indices])
