"""The input of the simulator: how long each block of a model takes on one GPU, and how many bytes it sends."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmman.errors import ScalingError


@dataclass(frozen=True)
class BlockCost:
    """Times and sizes of one block in a training step, for one GPU's batch. Times are in seconds, sizes in bytes.

    Attributes:
        forward: Time of the block's forward pass.
        head: Time of the loss's forward pass: the local head, or neck, head and task loss after the last block.
        backward: Time of the backward pass of that loss.
        update: Time of the optimizer step and of the update of the momentum copy.
        gradients: Size of the block's gradients.
        head_gradients: Size of the gradients of the local head, or of neck and head after the last block.
        features: Size of the block's own part of the message to the next block: its output, and its outputs for the neck.
        taps: Size of the part of ``features`` that is for the neck. Later stages relay it.
        first_unit: Size of the state of the block's first unit. The previous block keeps a momentum copy of that unit.
        needs_images: Whether the local head uses the images.
    """

    forward: float
    head: float = 0.0
    backward: float = 0.0
    update: float = 0.0
    gradients: float = 0.0
    head_gradients: float = 0.0
    features: float = 0.0
    taps: float = 0.0
    first_unit: float = 0.0
    needs_images: bool = False

    @property
    def seconds(self) -> float:
        """Seconds that a GPU computes for the block in one iteration."""
        return self.forward + self.head + self.backward + self.update


@dataclass(frozen=True)
class StageProfile:
    """Times and sizes of a model's blocks, trained locally and end to end.

    Attributes:
        batch: Number of images of one GPU's batch.
        blocks: The K blocks of the localised model.
        end_to_end: The same blocks when trained end to end. Only the last has a ``head``; there are no messages.
        images: Bytes of the batch's images.
        labels: Bytes of the batch's labels.
        loading: Seconds that the data loader needs for one batch. It runs in parallel with the computation.
    """

    batch: int
    blocks: tuple[BlockCost, ...]
    end_to_end: tuple[BlockCost, ...]
    images: float = 0.0
    labels: float = 0.0
    loading: float = 0.0

    def __post_init__(self) -> None:
        if not self.blocks or not self.end_to_end or self.batch < 1:
            raise ScalingError('a profile needs a batch of at least one image, blocks, and end_to_end blocks')
        for block in (*self.blocks, *self.end_to_end):
            for name, value in asdict(block).items():
                if isinstance(value, str) or not (math.isfinite(value) and value >= 0):
                    raise ScalingError(f'{name}={value!r} of a block: must be a finite number of at least 0')
        if not sum(block.seconds for block in self.blocks):
            raise ScalingError('the times of all blocks are 0: set their times in seconds')

    def message(self, j: int) -> float:
        """Bytes per batch that stage ``j`` (from 0) sends: features, taps of earlier blocks, labels, images if needed."""
        relayed = sum(block.taps for block in self.blocks[:j])
        images = self.images if any(block.needs_images for block in self.blocks[j + 1 :]) else 0
        return self.blocks[j].features + relayed + self.labels + images

    def with_totals(self, local: float, end_to_end: float) -> StageProfile:
        """Scale the times so that all blocks together take ``local`` and ``end_to_end`` seconds."""
        return replace(self, blocks=_scaled(self.blocks, local), end_to_end=_scaled(self.end_to_end, end_to_end))

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> StageProfile:
        """Read a profile that :meth:`save` wrote, or that was written by hand in the same format.

        Raises:
            ScalingError: The file doesn't exist, or isn't a profile.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ScalingError(f'{path} is not a profile: {error}; write one with --measure --save-times') from None
        try:
            return cls.from_dict(data)
        except (KeyError, TypeError) as error:
            raise ScalingError(f'{path} is not a profile: {error}; it needs batch, blocks and end_to_end') from None

    @classmethod
    def from_dict(cls, data: dict) -> StageProfile:
        """The inverse of ``dataclasses.asdict``."""
        lists = {name: tuple(BlockCost(**values) for values in data[name]) for name in ('blocks', 'end_to_end')}
        return cls(**{**data, **lists})


def _scaled(blocks: Sequence[BlockCost], total: float) -> tuple[BlockCost, ...]:
    """Scale the times of blocks so that they take ``total`` seconds together."""
    factor = total / sum(block.seconds for block in blocks)
    times = ('forward', 'head', 'backward', 'update')
    return tuple(replace(block, **{name: getattr(block, name) * factor for name in times}) for block in blocks)
