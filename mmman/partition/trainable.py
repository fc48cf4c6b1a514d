"""Which units of a backbone train, once the backbone has frozen what it was told to freeze."""

from __future__ import annotations

from torch import nn

from mmman.errors import PartitionError
from mmman.partition.chain import Chain


def trainable_units(backbone: nn.Module, chain: Chain) -> list[bool]:
    """Whether each unit has a parameter that training changes.

    Some classes freeze in their constructor (ResNet, ConvNeXt), others in ``train()`` (Swin, MobileNetV2, VGG). So ``train()``
    is called first; the parameters that it freezes stay frozen, and every module returns to the mode it was in.

    Raises:
        PartitionError: No parameter of the units trains.
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.train()
    for module, mode in modes.items():
        module.training = mode
    trainable = [unit.is_trainable(backbone) for unit in chain.units]
    if not any(trainable):
        raise PartitionError(
            f'{type(backbone).__name__} is frozen completely (frozen_stages?), so no block of it can be trained locally: '
            'freeze fewer stages of the stock backbone, or leave mmman.LocalBackbone out'
        )
    return trainable
