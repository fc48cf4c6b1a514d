"""Restricts an optimizer's parameter groups to the parameters of one block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer


class BlockGroups:
    """Makes an optimizer step the parameters of one block only.

    Args:
        optimizer: The optimizer over the parameters of all blocks.
        blocks: The trainable parameters of the first K-1 blocks and their local heads, in order.

    Attributes:
        block_of: Maps a parameter of ``blocks`` to its block, 1 to K-1. All other parameters belong to the final block.
    """

    def __init__(self, optimizer: Optimizer, blocks: Sequence[Iterable[nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self.block_of = {parameter: j for j, block in enumerate(blocks, start=1) for parameter in block}
        self._groups = {j: self._groups_of(j) for j in range(1, len(blocks) + 1)}

    def _groups_of(self, block: int) -> dict[int, list[nn.Parameter]]:
        """Return the parameters of ``block``, by the index of their parameter group."""
        own = {
            i: [parameter for parameter in group['params'] if self.block_of.get(parameter) == block]
            for i, group in enumerate(self.optimizer.param_groups)
        }
        return {i: parameters for i, parameters in own.items() if parameters}

    @contextmanager
    def restrict(self, block: int) -> Iterator[None]:
        """Context in which the optimizer holds only the parameters of ``block``, 1 to K-1."""
        optimizer = self.optimizer
        groups, parameters = optimizer.param_groups, [group['params'] for group in optimizer.param_groups]
        optimizer.param_groups = [groups[i] for i in self._groups[block]]
        for i, own in self._groups[block].items():
            groups[i]['params'] = own
        try:
            yield
        finally:
            optimizer.param_groups = groups
            for group, whole in zip(groups, parameters, strict=True):
                group['params'] = whole
