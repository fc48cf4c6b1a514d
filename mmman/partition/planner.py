"""Cut a chain of units into gradient-isolated blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import nn

from mmman.errors import PartitionError
from mmman.partition.chain import STEM, Chain, Unit

Block = tuple[Unit, ...]

BY_MEMORY = "partition=dict(type='memory', model=_base_.model, optim_wrapper=_base_.optim_wrapper, batch=8, shape=(416, 640))"
"""The syntax for cuts by memory in a config, for error messages."""


@dataclass(frozen=True)
class Plan:
    """The blocks of a localised backbone.

    Attributes:
        frozen: Leading units without a trainable parameter. They have no local head and don't count as a block.
        blocks: K blocks of consecutive units. Each of the first K-1 ends at a boundary with a local head.
    """

    frozen: Block
    blocks: tuple[Block, ...]

    def frozen_block(self, backbone: nn.Module, only: int | None = None) -> str | None:
        """Describe the first block that has no trainable parameter. Returns None if every block has one.

        Args:
            backbone: The backbone that the plan is for.
            only: Check only the block with this index, counted from 0. Default: all blocks.
        """
        for j, (block, span) in enumerate(zip(self.blocks, map(_span, self.blocks), strict=True)):
            if only in (None, j) and not any(unit.is_trainable(backbone) for unit in block):
                return f'block {j + 1} ({span})'
        return None

    def __str__(self) -> str:
        spans = [_span(block) for block in self.blocks]
        frozen = f'frozen {self.frozen[0].name}..{self.frozen[-1].name} | ' if self.frozen else ''
        return frozen + ' | '.join(spans)


def _span(block: Block) -> str:
    return f'{block[0].name}..{block[-1].name}' if len(block) > 1 else block[0].name


def plan_blocks(
    chain: Chain, trainable: Sequence[bool], num_blocks: int | None = None, partition: str | Sequence[str] = 'stage'
) -> Plan:
    """Cut a chain into K blocks.

    Args:
        chain: The backbone's units.
        trainable: For every unit, whether any of its parameters is trained. Leading frozen units aren't part of any block.
        num_blocks: K, the number of blocks. Optional if ``partition`` names the cuts.
        partition: ``'stage'`` cuts at stage ends. If K is below the number of stages, neighbouring stages are merged so that
            the largest block has as few units as possible. If K is above it, the longest stages are split evenly, not counting
            a stem. ``'uniform'`` makes blocks whose numbers of units differ by at most one, counting the stem. A list names the
            last unit of each of the first K-1 blocks, e.g. ``['layer2.2', 'layer3.8']``.

    Raises:
        PartitionError: Every unit is frozen; K is missing, below 1 or above the number of trainable units; a cut names no
            unit, a frozen unit or the last unit; the cuts aren't in network order; or ``partition`` asks for cuts by memory,
            which only :func:`mmman.LocalBackbone` plans.
    """
    if partition == 'memory' or isinstance(partition, Mapping):
        raise PartitionError(
            f'cuts by memory depend on the whole model and its images, so they need an mmman.LocalBackbone that is built by a '
            f'config: {BY_MEMORY}; elsewhere name the cuts'
        )
    first = next((i for i, trains in enumerate(trainable) if trains), len(chain.units))
    frozen, units = chain.units[:first], chain.units[first:]
    names = [unit.name for unit in units]
    if not units:
        raise PartitionError(
            f'every unit of the backbone is frozen ({", ".join(unit.name for unit in frozen)}), so no block can be '
            'trained: lower frozen_stages of the stock backbone'
        )
    if not isinstance(partition, str):
        blocks = _cut_at_names(units, names, list(partition))
        if num_blocks not in (None, len(blocks)):
            raise PartitionError(f'partition names {len(partition)} cuts, so {len(blocks)} blocks, but num_blocks={num_blocks}')
        return Plan(frozen, blocks)
    if num_blocks is None:
        raise PartitionError(f'num_blocks is needed with partition={partition!r}')
    if not 1 <= num_blocks <= len(units):
        raise PartitionError(
            f'num_blocks={num_blocks}, but the backbone has {len(units)} trainable units ({", ".join(names)}); '
            f'choose a K from 1 to {len(units)}' + (f' (frozen: {", ".join(unit.name for unit in frozen)})' if frozen else '')
        )
    if partition == 'uniform':
        return Plan(frozen, _evenly(units, num_blocks))
    if partition == 'stage':
        return Plan(frozen, _by_stage(units, num_blocks))
    raise PartitionError(f"partition={partition!r}: choose 'stage', 'uniform' or a list of unit names, or write {BY_MEMORY}")


def _cut_at_names(units: Block, names: list[str], cuts: list[str]) -> tuple[Block, ...]:
    for cut in cuts:
        if cut not in names[:-1]:
            raise PartitionError(f'cannot cut after {cut!r}; choose from the units {", ".join(names[:-1])}')
    ends = [names.index(cut) + 1 for cut in cuts]
    if ends != sorted(set(ends)):
        raise PartitionError(f'the cuts {cuts} are not in the order of the network: {", ".join(names)}')
    return tuple(units[a:b] for a, b in zip([0, *ends], [*ends, len(units)], strict=True))


def _evenly(units: Block, count: int) -> tuple[Block, ...]:
    ends = [i * len(units) // count for i in range(count + 1)]
    return tuple(units[a:b] for a, b in pairwise(ends))


def _by_stage(units: Block, count: int) -> tuple[Block, ...]:
    stages = [tuple(group) for _, group in groupby(units, key=lambda unit: unit.stage)]
    if count <= len(stages):
        return _merge(stages, count)
    pieces = [1] * len(stages)
    for _ in range(count - len(stages)):
        longest = max(range(len(stages)), key=lambda i: len(stages[i]) / pieces[i])
        pieces[longest] += 1
    return tuple(block for stage, n in zip(stages, pieces, strict=True) for block in _split(stage, n))


def _split(stage: Block, count: int) -> tuple[Block, ...]:
    """Split a stage into pieces whose sizes differ by at most one unit. A stem joins the first piece and isn't counted."""
    if stage[0].name != STEM or count >= len(stage):
        return _evenly(stage, count)
    first, *rest = _evenly(stage[1:], count)
    return ((stage[0], *first), *rest)


def _merge(stages: list[Block], count: int) -> tuple[Block, ...]:
    """Merge neighbouring stages so that the largest group has the fewest units. Of equal solutions, take the earliest cuts."""
    if count == 1:
        return (sum(stages, ()),)
    candidates = [(sum(stages[:i], ()), *_merge(stages[i:], count - 1)) for i in range(1, len(stages) - count + 2)]
    return min(candidates, key=lambda blocks: max(map(len, blocks)))
