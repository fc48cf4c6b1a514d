"""Find the units of a backbone that train, after the backbone has frozen its ``frozen_stages``, and blocks that all train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mmman.errors import PartitionError
from mmman.partition.chain import Chain
from mmman.partition.planner import Plan, plan_blocks


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


def plan_trained_blocks(
    backbone: nn.Module, chain: Chain, num_blocks: int | None = None, partition: str | Sequence[str] = 'stage'
) -> Plan:
    """Cut a backbone into K blocks, each of which its loss trains. Arguments and errors of :func:`plan_blocks`.

    Raises:
        PartitionError: A loss would train nothing: a block is frozen, or no output is taken from the last one.
    """
    plan = plan_blocks(chain, trainable_units(backbone, chain), num_blocks, partition)
    if (frozen := plan.frozen_block(backbone)) is not None:
        raise PartitionError(
            f'{frozen} of {type(backbone).__name__} has no trainable parameter, so its loss would train nothing: choose cuts '
            'that give every block a trainable parameter, or freeze consecutive units from the start of the backbone'
        )
    if len(plan.blocks) > 1 and not any(chain.units[tap] in plan.blocks[-1] for tap in chain.out_units):
        raise PartitionError(
            f'the last block ({plan}) produces none of the outputs of {type(backbone).__name__}, so no loss would train it: '
            'cut earlier, or remove the stages after the last one in out_indices (num_stages)'
        )
    return plan
