"""The backbone families that can be cut: one row a forward pass.

A row is keyed by the class that *defines* ``forward``. Whatever inherits that forward unchanged (ResNeXt, ResNetV1d, SE-ResNet,
a user's subclass) is served by the row; a subclass with a forward of its own (DetectoRS_ResNet) is not, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mmman.errors import UnsupportedBackboneError
from mmman.partition.chain import Chain, Unit


def resnet(backbone: nn.Module) -> Chain:
    """Stem (7x7 or deep), then residual blocks in ``layer1`` to ``layer4``; one output a stage of ``out_indices``."""
    stem = ('stem',) if backbone.deep_stem else ('conv1', backbone.norm1_name)
    units = [Unit('stem', (*stem, 'maxpool'), output='maxpool', stage=0)]
    taps = []
    for stage, layer in enumerate(backbone.res_layers):
        units += [Unit.single(f'{layer}.{name}', stage) for name, _ in backbone.get_submodule(layer).named_children()]
        if stage in backbone.out_indices:
            taps.append(len(units) - 1)
    return Chain(tuple(units), tuple(taps))


_FAMILIES: dict[str, Callable[[nn.Module], Chain]] = {
    'mmdet.models.backbones.resnet.ResNet': resnet,
    'mmseg.models.backbones.resnet.ResNet': resnet,
    'mmpretrain.models.backbones.resnet.ResNet': resnet,
}


def register_chain(forward_class: str) -> Callable[[Callable[[nn.Module], Chain]], Callable[[nn.Module], Chain]]:
    """Add a family: decorates a function that enumerates the units of backbones whose forward ``forward_class`` defines.

    Args:
        forward_class: Import path of the class, e.g. ``my_project.models.MyNet``. It is not imported.

    Raises:
        ValueError: The class has a row already.
    """

    if forward_class in _FAMILIES:
        raise ValueError(f'{forward_class} is registered already')

    def register(enumerate_units: Callable[[nn.Module], Chain]) -> Callable[[nn.Module], Chain]:
        _FAMILIES[forward_class] = enumerate_units
        return enumerate_units

    return register


def chain_of(backbone: nn.Module) -> Chain:
    """The units of ``backbone``.

    Raises:
        UnsupportedBackboneError: No row knows its forward pass, or its forward was patched on the instance.
    """
    owner = next(cls for cls in type(backbone).__mro__ if 'forward' in vars(cls))
    enumerate_units = _FAMILIES.get(f'{owner.__module__}.{owner.__qualname__}')
    if enumerate_units is None or 'forward' in vars(backbone):
        raise UnsupportedBackboneError(
            f'{type(backbone).__name__} cannot be cut into blocks: its forward pass '
            + ('was replaced on the instance' if enumerate_units else f'({owner.__module__}.{owner.__qualname__}) is not known')
            + f'. Known are the classes that inherit it unchanged from {", ".join(sorted(_FAMILIES))}; '
            'docs/howto/new_backbone.md shows how to add another.'
        )
    chain = enumerate_units(backbone)
    for unit in chain.units[1:]:
        if unit.modules != (unit.output,):
            raise UnsupportedBackboneError(
                f'{type(backbone).__name__}: the unit {unit.name} is not one module; only the first may be several, because a '
                'momentum transfer copies the first unit of the next block'
            )
    return chain
