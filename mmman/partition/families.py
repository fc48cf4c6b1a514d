"""A table of the backbone families that can be cut, with one row for each forward pass, and a table of those that can't be.

The key of a row is the class that *defines* ``forward``. The row serves all subclasses that inherit this forward unchanged
(ResNeXt, ResNetV1d, SE-ResNet, a user's subclass). A subclass with its own forward (DetectoRS_ResNet) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mmman.errors import UnsupportedBackboneError
from mmman.partition import convolutional, transformers
from mmman.partition.chain import Chain

_FAMILIES: dict[str, Callable[[nn.Module], Chain]] = {
    'mmdet.models.backbones.csp_darknet.CSPDarknet': convolutional.named_layers,
    'mmdet.models.backbones.cspnext.CSPNeXt': convolutional.named_layers,
    'mmdet.models.backbones.darknet.Darknet': convolutional.darknet,
    'mmdet.models.backbones.efficientnet.EfficientNet': convolutional.efficientnet,
    'mmdet.models.backbones.mobilenet_v2.MobileNetV2': convolutional.mobilenet_v2,
    'mmdet.models.backbones.pvt.PyramidVisionTransformer': transformers.pyramid_transformer,
    'mmdet.models.backbones.regnet.RegNet': convolutional.regnet,
    'mmdet.models.backbones.resnet.ResNet': convolutional.resnet,
    'mmdet.models.backbones.ssd_vgg.SSDVGG': convolutional.ssd_vgg,
    'mmdet.models.backbones.swin.SwinTransformer': transformers.swin,
    'mmman.backbones.cifar_resnet.CIFARResNet': convolutional.cifar_resnet,
    'mmpretrain.models.backbones.convmixer.ConvMixer': convolutional.convmixer,
    'mmpretrain.models.backbones.convnext.ConvNeXt': convolutional.convnext,
    'mmpretrain.models.backbones.cspnet.CSPNet': convolutional.csp_net,
    'mmpretrain.models.backbones.davit.DaViT': transformers.davit,
    'mmpretrain.models.backbones.deit.DistilledVisionTransformer': transformers.vision_transformer,
    'mmpretrain.models.backbones.deit3.DeiT3': transformers.deit3,
    'mmpretrain.models.backbones.densenet.DenseNet': convolutional.densenet,
    'mmpretrain.models.backbones.efficientnet.EfficientNet': convolutional.efficientnet,
    'mmpretrain.models.backbones.efficientnet_v2.EfficientNetV2': convolutional.efficientnet,
    'mmpretrain.models.backbones.hornet.HorNet': convolutional.hornet,
    'mmpretrain.models.backbones.mlp_mixer.MlpMixer': transformers.mlp_mixer,
    'mmpretrain.models.backbones.mobilenet_v2.MobileNetV2': convolutional.mobilenet_v2,
    'mmpretrain.models.backbones.mobilenet_v3.MobileNetV3': convolutional.named_layers,
    'mmpretrain.models.backbones.mobileone.MobileOne': convolutional.mobileone,
    'mmpretrain.models.backbones.mobilevit.MobileViT': convolutional.mobilevit,
    'mmpretrain.models.backbones.poolformer.PoolFormer': convolutional.poolformer,
    'mmpretrain.models.backbones.regnet.RegNet': convolutional.regnet,
    'mmpretrain.models.backbones.repvgg.RepVGG': convolutional.repvgg,
    'mmpretrain.models.backbones.resnet.ResNet': convolutional.resnet,
    'mmpretrain.models.backbones.resnet_cifar.ResNet_CIFAR': convolutional.regnet,
    'mmpretrain.models.backbones.riformer.RIFormer': convolutional.poolformer,
    'mmpretrain.models.backbones.shufflenet_v1.ShuffleNetV1': convolutional.shufflenet,
    'mmpretrain.models.backbones.shufflenet_v2.ShuffleNetV2': convolutional.shufflenet,
    'mmpretrain.models.backbones.swin_transformer.SwinTransformer': transformers.swin,
    'mmpretrain.models.backbones.swin_transformer_v2.SwinTransformerV2': transformers.swin_v2,
    'mmpretrain.models.backbones.t2t_vit.T2T_ViT': transformers.t2t_vit,
    'mmpretrain.models.backbones.twins.PCPVT': transformers.twins,
    'mmpretrain.models.backbones.van.VAN': transformers.van,
    'mmpretrain.models.backbones.vgg.VGG': convolutional.vgg,
    'mmpretrain.models.backbones.vig.PyramidVig': convolutional.pyramid_vig,
    'mmpretrain.models.backbones.vig.Vig': convolutional.vig,
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': transformers.vision_transformer,
    'mmpretrain.models.backbones.vit_eva02.ViTEVA02': transformers.eva02,
    'mmseg.models.backbones.beit.BEiT': transformers.beit,
    'mmseg.models.backbones.erfnet.ERFNet': convolutional.erfnet,
    'mmseg.models.backbones.mae.MAE': transformers.beit,
    'mmseg.models.backbones.mit.MixVisionTransformer': transformers.mix_transformer,
    'mmseg.models.backbones.mobilenet_v2.MobileNetV2': convolutional.mobilenet_v2,
    'mmseg.models.backbones.mobilenet_v3.MobileNetV3': convolutional.named_layers,
    'mmseg.models.backbones.mscan.MSCAN': transformers.mscan,
    'mmseg.models.backbones.resnet.ResNet': convolutional.resnet,
    'mmseg.models.backbones.swin.SwinTransformer': transformers.swin,
    'mmseg.models.backbones.twins.PCPVT': transformers.seg_twins,
    'mmseg.models.backbones.vit.VisionTransformer': transformers.seg_vision_transformer,
}

_HRNET = 'its branches of several resolutions exchange features at every stage, and all of them are passed on'
NO_CHAIN: dict[str, str] = {
    'mmdet.models.backbones.hourglass.HourglassNet': (
        'the input of every hourglass is added to its output, and each hourglass has connections across its own layers'
    ),
    'mmdet.models.backbones.hrnet.HRNet': _HRNET,
    'mmpretrain.models.backbones.beit.BEiTViT': 'its layers take a position bias beside their input',
    'mmpretrain.models.backbones.conformer.Conformer': 'a convolutional and a transformer branch exchange features all along',
    'mmpretrain.models.backbones.hrnet.HRNet': _HRNET,
    'mmpretrain.models.backbones.revvit.RevVisionTransformer': (
        'its reversible layers pass two streams on, and run again in the backward pass'
    ),
    'mmpretrain.models.backbones.tnt.TNT': 'its layers pass pixel and patch embeddings on side by side',
    'mmpretrain.models.backbones.xcit.XCiT': (
        'the class token is added in front of the last layers, so the number of extra tokens changes inside the network'
    ),
    'mmseg.models.backbones.bisenetv1.BiSeNetV1': 'a spatial and a context path run side by side and are fused at the end',
    'mmseg.models.backbones.bisenetv2.BiSeNetV2': 'a detail and a semantic branch run side by side and are fused at the end',
    'mmseg.models.backbones.cgnet.CGNet': 'the downsampled image and the first output of a stage are joined to the last one',
    'mmseg.models.backbones.ddrnet.DDRNet': 'a spatial and a context branch exchange features at every stage',
    'mmseg.models.backbones.fast_scnn.FastSCNN': 'high-resolution features bypass the extractor and are fused at the end',
    'mmseg.models.backbones.hrnet.HRNet': _HRNET,
    'mmseg.models.backbones.icnet.ICNet': 'a branch on the whole image runs beside a network on the image at half size',
    'mmseg.models.backbones.pidnet.PIDNet': 'three branches exchange features at every stage',
    'mmseg.models.backbones.stdc.STDCContextPathNet': (
        'a context path from the last stage back to earlier ones, and a fusion, follow the stages'
    ),
    'mmseg.models.backbones.unet.UNet': 'every stage of the decoder takes the output of an encoder stage, too',
}
"""Why a forward pass is no chain of units, by the class that defines it. docs/supported_models.md has this table, too."""


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
    path = f'{owner.__module__}.{owner.__qualname__}'
    enumerate_units = _FAMILIES.get(path)
    refused = f'{type(backbone).__name__} cannot be cut into blocks: '
    if enumerate_units is None and path in NO_CHAIN:
        raise UnsupportedBackboneError(f'{refused}{NO_CHAIN[path]} (docs/supported_models.md lists those that can)')
    if enumerate_units is None or 'forward' in vars(backbone):
        raise UnsupportedBackboneError(
            f'{refused}its forward pass '
            + ('was replaced on the instance' if enumerate_units else f'({path}) is not supported')
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
