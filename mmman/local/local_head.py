"""What every local head is: a momentum transfer, then a task head with a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmman.errors import MisuseError
from mmman.local.session import Session
from mmman.local.transfer import MomentumTransfer
from mmman.partition import Feature, Unit

GIVEN = ('boundary', 'transfer', 'loss_weight')
"""The arguments of a local head that :func:`mmman.localize_` passes, and no config."""


_TASKS = {'BaseDetector': 'detector', 'BaseSegmentor': 'segmentor', 'BaseClassifier': 'classifier'}
"""The libraries' base classes of models."""


@dataclass(frozen=True)
class Boundary:
    """Where a local head sits; measured on the backbone, never typed into a config.

    Attributes:
        block: The block it trains, 1 to K-1.
        num_blocks: K.
        unit: Name of the block's last unit.
        source: The first unit of the next block.
        output: The shape of the block's output.
        feature: The shape of what the task head sees (the transfer's output).
        takes_grid: Whether units are called with the grid of their input beside it (:class:`mmman.partition.Chain`).
        strides: The strides that the heads of all boundaries see, in order.
        following: The units that come after what the task head sees, first to last: to be copied, never to be held.
        following_features: The shapes of their outputs.
        image_channels: Channels of the images that the model takes.
    """

    block: int
    num_blocks: int
    unit: str
    source: Unit
    output: Feature
    feature: Feature
    takes_grid: bool
    strides: tuple[int, ...]
    following: tuple[nn.Module, ...] = field(default=(), repr=False)
    following_features: tuple[Feature, ...] = field(default=(), repr=False)
    image_channels: int = 3

    @property
    def channels(self) -> int:
        """Channels of what the task head sees."""
        return self.feature.channels

    @property
    def stride(self) -> int:
        """Its stride: input pixels a feature pixel, along a side."""
        return self.feature.stride

    def at_block(self, value: float | tuple[float, float]) -> float:
        """A weight at this block: a number, or one that is linear in the block's index, given for the first and last head."""
        first, last = (value, value) if isinstance(value, (int, float)) else value
        steps = self.num_blocks - 2
        return float(first + (last - first) * (self.block - 1) / steps) if steps else float(first)


class LocalHead(BaseModule):
    """Base of the local heads. A subclass builds its task head from ``boundary`` and implements :meth:`loss`.

    Args:
        boundary: Where it sits. Given by :func:`mmman.localize_`.
        transfer: The momentum transfer on its input. Given by :func:`mmman.localize_`.
        loss_weight: Factor on this head's whole loss. Given by :func:`mmman.localize_`.
        init_cfg: mmengine's initialisation of the task head.
    """

    session: Session | None = None
    task: str | None = None
    """What the head trains, ``'detector'``, ``'segmentor'`` or ``'classifier'``; None: any model."""
    uses_images = True
    """Whether :meth:`loss` looks at the pixels of its ``inputs`` and not at their shape alone: a pipeline sends them along."""
    sees_channel_bias = False
    """Whether a constant a channel of y, and a factor on y, change what :meth:`loss` computes. They don't where the head begins
    with a convolution and BatchNorm, which removes both; then ``transfer.bias='channel'`` is refused."""

    def __init__(
        self, boundary: Boundary, transfer: MomentumTransfer, loss_weight: float = 1.0, init_cfg: dict | list | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.block = boundary.block
        self.unit = boundary.unit
        self.source = boundary.source
        self.output = boundary.output
        self.feature = boundary.feature
        self.takes_grid = boundary.takes_grid
        self.loss_weight = loss_weight
        self.transfer = transfer

    @classmethod
    def follow(cls, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a head of this class takes from the config of the model that it is part of.

        Args:
            model: The model's config.
            options: What the config of the local head sets itself.

        Returns:
            Options by name, as in ``_base_.model``; nothing where the model has no head that this class can be made of.
        """
        return {}

    @classmethod
    def task_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of this head's options those that decide what it learns: without those that only size it."""
        return {}

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor | list[Tensor]]:
        """The local losses of a block.

        Args:
            y: What the transfer makes of the block's output, (B, C, H, W) or (B, L, C), with the block's graph behind it.
            inputs: The model's input batch, (B, 3, H0, W0), normalised.
            data_samples: The batch's data samples, as the model's own head gets them.

        Returns:
            Losses by name, as the task's library returns them; names that contain ``loss`` are summed and back-propagated.
        """
        raise NotImplementedError

    @property
    def unit_copies(self) -> list[nn.Module]:
        """Modules that are built like the backbone's units. They start as the backbone's ``init_weights`` starts its units."""
        return [self.transfer]

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`MisuseError` where this head doesn't fit the model it is part of. Called before the first step."""
        theirs = next((task for cls in type(model).__mro__ if (task := _TASKS.get(cls.__name__))), None)
        if self.task is not None and theirs not in (None, self.task):
            raise MisuseError(
                f'{type(self).__name__} is a local head for a {self.task}, {type(model).__name__} is a {theirs}: choose '
                'another model.backbone.local_head.type'
            )

    def transferred(self, x: Tensor, inputs: Tensor) -> Tensor:
        """What the task head sees of the block's output x, for the model's input batch."""
        return self.transfer(x, *self.grid_of(self.output, inputs))

    def grid_of(self, feature: Feature, inputs: Tensor) -> list[tuple[int, int]]:
        """What a unit is called with beside features of that shape: their grid, or nothing."""
        return [feature.grid(inputs.shape[-2:])] if self.takes_grid else []

    def as_map(self, y: Tensor, inputs: Tensor) -> Tensor:
        """The transfer's output y as a map (B, C, H, W), for task heads that are convolutions; class tokens are left out."""
        return self.feature.as_map(y, inputs.shape[-2:])

    @torch.compiler.disable
    def at_boundary(self, unit: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook of the block's last unit. A bound method, so that deepcopy and pickle take it along."""
        if not torch.is_grad_enabled():
            return None
        if self.session is not None:
            return self.session.at_boundary(self, output)
        if output.requires_grad:
            output.register_hook(self._refuse_backward)
        return None

    def _refuse_backward(self, grad: Tensor) -> None:
        raise MisuseError(
            f'a backward pass crossed the boundary after {self.unit} outside local training. To train locally set '
            "optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', ...) (AMP is its dtype option; the --amp of the "
            'stock tools replaces the wrapper); to train or differentiate end to end call mmman.delocalize_(backbone) or use '
            'num_blocks=1'
        )


def without(config: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """A config without some of its options; empty for None."""
    return {name: value for name, value in (config or {}).items() if name not in names}
