"""Find the unit that the momentum transfer behind a block copies."""

from __future__ import annotations

from collections.abc import Sequence

from mmman.errors import ConfigError
from mmman.partition.chain import Unit


def find_source(units: Sequence[Unit], cut: int, source_unit: str | Sequence[str] = 'next') -> int:
    """Find the unit that the transfer behind a block copies.

    Args:
        units: All units of the backbone, in order.
        cut: Index of the block's last unit.
        source_unit: The option of :class:`mmman.MomentumTransfer`.

    Returns:
        The unit's index, above ``cut``.

    Raises:
        ConfigError: ``source_unit`` names a unit that the backbone doesn't have, or none that follows the block.
    """
    following = range(cut + 1, len(units))
    if source_unit == 'next':
        return cut + 1
    if source_unit == 'next_stage':
        return next((i for i in following if units[i].stage > units[cut].stage), cut + 1)
    names = [unit.name for unit in units]
    if unknown := [name for name in source_unit if name not in names]:
        raise ConfigError(f'transfer.source_unit names {unknown}: choose from the units {", ".join(names)}')
    found = next((i for i in following if names[i] in source_unit), None)
    if found is None:
        raise ConfigError(
            f'transfer.source_unit={[*source_unit]} names no unit after {names[cut]}, the end of a block: add one of '
            f'{", ".join(names[cut + 1 :])}'
        )
    return found
