"""Find the units of a backbone that train, after the backbone has frozen its ``frozen_stages``."""

from __future__ import annotations

from torch import nn

from mmman.errors import PartitionError
from mmman.partition.chain import Chain


def trainable_units(backbone: nn.Module, chain: Chain) -> list[bool]:
    """Return for each unit whether it has a trainable parameter.

    Some classes freeze parameters in the constructor (ResNet, ConvNeXt), others in ``train()`` (Swin, MobileNetV2, VGG). So
    this calls ``train()`` first. Parameters that ``train()`` freezes stay frozen; the mode of every module is restored.

    Raises:
        PartitionError: No unit has a trainable parameter.
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.train()
    for module, mode in modes.items():
        module.training = mode
    trainable = [unit.is_trainable(backbone) for unit in chain.units]
    if not any(trainable):
        raise PartitionError(
            f'{type(backbone).__name__} is frozen completely (frozen_stages?), so none of its blocks can be trained locally: '
            'freeze fewer stages of the stock backbone, or leave mmman.LocalBackbone out'
        )
    return trainable
