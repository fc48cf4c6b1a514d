"""What is known of a model before it is scaled: how long each block takes on one GPU, and how many bytes it sends."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmman.errors import ScalingError


@dataclass(frozen=True)
class BlockCost:
    """One block of a training step. Times are seconds, sizes bytes, all for one GPU's batch.

    Attributes:
        forward: Forward pass of the block.
        head: Forward pass of what gives its loss: its local head, or neck, head and task loss behind the last block.
        backward: Backward pass of that loss.
        update: Optimizer step, and the update of the momentum copy.
        gradients: Gradients of the block.
        head_gradients: Gradients of its local head, or of neck and head.
        features: What the block itself puts into the message to the next: its output, and outputs for the neck from inside it.
        taps: The part of ``features`` that the neck takes, and that later stages therefore pass on.
        first_unit: State of its first unit, which the block before keeps a momentum copy of.
        needs_images: Whether its local head looks at the images.
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
        """What a GPU computes for the block in one iteration."""
        return self.forward + self.head + self.backward + self.update


@dataclass(frozen=True)
class StageProfile:
    """A model, once trained locally and once end to end.

    Attributes:
        batch: Images of one GPU's batch.
        blocks: The K blocks of the localised model.
        end_to_end: The same blocks of the model trained end to end: a ``head`` on the last alone, no messages.
        images: Bytes of the batch's images.
        labels: Bytes of its labels.
        loading: Seconds in which the data loader makes one batch, beside the computing.
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
                    raise ScalingError(f'{name}={value!r} of a block: a finite number from 0 is needed')
        if not sum(block.seconds for block in self.blocks):
            raise ScalingError('the times of all blocks are 0: give seconds')

    def message(self, j: int) -> float:
        """Bytes that the stage of block ``j`` (from 0) sends on a batch: features, taps of blocks before, labels, images."""
        relayed = sum(block.taps for block in self.blocks[:j])
        images = self.images if any(block.needs_images for block in self.blocks[j + 1 :]) else 0
        return self.blocks[j].features + relayed + self.labels + images

    def with_totals(self, local: float, end_to_end: float) -> StageProfile:
        """The same proportions, with these seconds for all blocks together."""
        return replace(self, blocks=_slower(self.blocks, local), end_to_end=_slower(self.end_to_end, end_to_end))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> StageProfile:
        """Read what :meth:`save` wrote, or what was written by hand in that form.

        Raises:
            ScalingError: The file isn't there, or isn't a profile.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ScalingError(f'{path} is no profile: {error}; write one with --measure --save-times') from None
        try:
            return cls.from_dict(data)
        except (KeyError, TypeError) as error:
            raise ScalingError(f'{path} is no profile: {error}; it needs batch, blocks and end_to_end') from None

    @classmethod
    def from_dict(cls, data: dict) -> StageProfile:
        """The inverse of ``dataclasses.asdict``."""
        lists = {name: tuple(BlockCost(**values) for values in data[name]) for name in ('blocks', 'end_to_end')}
        return cls(**{**data, **lists})


def _slower(blocks: Sequence[BlockCost], total: float) -> tuple[BlockCost, ...]:
    """Blocks that take ``total`` seconds together."""
    factor = total / sum(block.seconds for block in blocks)
    times = ('forward', 'head', 'backward', 'update')
    return tuple(replace(block, **{name: getattr(block, name) * factor for name in times}) for block in blocks)
