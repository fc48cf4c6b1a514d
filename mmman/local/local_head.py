"""The base class of local heads: a momentum transfer, then a task head with a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.local.session import Session
from mmman.local.transfer import MomentumTransfer
from mmman.partition import STEM, Feature, Unit

INJECTED_ARGS = ('boundary', 'transfer', 'loss_weight')
"""Arguments of a local head that :func:`mmman.localize_` passes. A config must not set them."""


SELF_SUPERVISED = 'BaseSelfSupervisor'
"""Base class of mmpretrain's models that train without labels."""
TRACKER = 'BaseMOTModel'
"""Base class of mmdet's models that train on videos."""
_TASKS = {
    'BaseDetector': 'detector',
    'BaseSegmentor': 'segmentor',
    'BaseClassifier': 'classifier',
    SELF_SUPERVISED: 'self-supervised model',
    TRACKER: 'tracker',
}
"""Base classes of models in the OpenMMLab libraries, and their tasks."""


@dataclass(frozen=True)
class Boundary:
    """Where a local head sits. The values are measured on the backbone, never set in a config.

    Attributes:
        block: The block that the head trains, 1 to K-1.
        num_blocks: K.
        unit: Name of the block's last unit.
        source: The unit that the transfer copies: the first unit of the next block, or another that
            ``transfer.source_unit`` names.
        output: The shape of the block's output.
        feature: The shape of the task head's input (the transfer's output).
        needs_hw_shape: Whether units also take the grid of their input as an argument (:class:`mmman.partition.Chain`).
        strides: The strides of the task heads' inputs at all boundaries, in order.
        following_units: The units after the task head's input, first to last. A head may copy them, but must not hold them.
        following_features: The shapes of their outputs.
        image_channels: Channels of the model's input images.
        position: Index, in the backbone's chain, of the unit whose output the task head's input is like: the block's last unit,
            or with a transfer the one that it copies.
        next_stage: Index, from 0, of the stage in which the next block begins.
        all_units: All units of the backbone, in order.
    """

    block: int
    num_blocks: int
    unit: str
    source: Unit
    output: Feature
    feature: Feature
    needs_hw_shape: bool
    strides: tuple[int, ...]
    following_units: tuple[nn.Module, ...] = field(default=(), repr=False)
    following_features: tuple[Feature, ...] = field(default=(), repr=False)
    image_channels: int = 3
    position: int = 0
    next_stage: int = 0
    all_units: tuple[Unit, ...] = field(default=(), repr=False)

    @property
    def channels(self) -> int:
        """Channels of the task head's input."""
        return self.feature.channels

    @property
    def stride(self) -> int:
        """Stride of the task head's input: image pixels per feature pixel, along a side."""
        return self.feature.stride

    def interpolate(self, value: float | tuple[float, float]) -> float:
        """A weight at this block: a constant or, of a pair (first, last), a value by stage, as in the authors' code of MAN++.

        The value is ``first + (last - first) * min(1, s / (K - 2))``. s is the number, from 1, of the stage in which the next
        block begins, or 0 at the end of the stem. With K=2 the value is ``first``.
        """
        first, last = (value, value) if isinstance(value, (int, float)) else value
        if self.num_blocks == 2 or self.unit == STEM:
            return float(first)
        return float(first + (last - first) * min(1.0, (self.next_stage + 1) / (self.num_blocks - 2)))


class LocalHead(BaseModule):
    """Base class of local heads. A subclass builds its task head from ``boundary`` and implements :meth:`loss`.

    Args:
        boundary: Where the head sits. Passed by :func:`mmman.localize_`.
        transfer: The momentum transfer on the head's input. Passed by :func:`mmman.localize_`.
        loss_weight: Factor on this head's whole loss. Passed by :func:`mmman.localize_`.
        init_cfg: mmengine's initialisation of the task head.
    """

    session: Session | None = None
    task: str | None = None
    """The model's task, ``'detector'``, ``'segmentor'`` or ``'classifier'``; None: the head fits any model."""
    uses_images = True
    """Whether :meth:`loss` reads the pixels of ``inputs``, not only their shape. If so, a pipeline sends the images along."""
    supports_channel_bias = False
    """Whether a per-channel constant added to y, and a factor on y, change the value of :meth:`loss`. They don't where the head
    begins with a convolution and BatchNorm, which removes both; ``transfer.bias='channel'`` is then rejected."""

    def __init__(
        self, boundary: Boundary, transfer: MomentumTransfer, loss_weight: float = 1.0, init_cfg: dict | list | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.block = boundary.block
        self.unit = boundary.unit
        self.source = boundary.source
        self.output = boundary.output
        self.feature = boundary.feature
        self.needs_hw_shape = boundary.needs_hw_shape
        self.loss_weight = loss_weight
        self.transfer = transfer
        self.independent: LocalHead | None = None  # the head of the independent loss, in windows of several blocks

    @classmethod
    def derive_options(cls, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Derive options of this head from the config of the model that it is part of.

        Args:
            model: The model's config.
            options: The options that the local head's config sets explicitly.

        Returns:
            Options by name, as in ``_base_.model``; empty where this class cannot derive any from the model.
        """
        return {}

    @classmethod
    def task_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The subset of ``options`` that decides what the head learns, without those that only set its size."""
        return {}

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor | list[Tensor]]:
        """Compute the local losses of a block.

        Args:
            y: The transfer's output for the block's output, (B, C, H, W) or (B, L, C), attached to the block's autograd graph.
            inputs: The model's input batch, (B, 3, H0, W0), normalised.
            data_samples: The batch's data samples, as the model's own head gets them.

        Returns:
            Losses by name, as the task's library returns them; names that contain ``loss`` are summed and back-propagated.
        """
        raise NotImplementedError

    @property
    def unit_copies(self) -> list[nn.Module]:
        """Modules built like the backbone's units. Their initial values come from the backbone's ``init_weights``."""
        return [self.transfer]

    def attach_session(self, session: Session | None) -> None:
        """Attach a session to this head, and to the head of its independent loss; None: detach it."""
        self.session = session
        if self.independent is not None:
            self.independent.attach_session(session)

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ConfigError` if this head doesn't fit the model it is part of. Called before the first step."""
        theirs = next((task for cls in type(model).__mro__ if (task := _TASKS.get(cls.__name__))), None)
        if self.task is not None and theirs not in (None, self.task):
            advice = ': set another model.backbone.local_head.type'
            if theirs == _TASKS[SELF_SUPERVISED]:
                advice = ', without labels to learn from; remove mmman.LocalBackbone, or set a local_head of your own'
            raise ConfigError(
                f'{type(self).__name__} is a local head for a {self.task}, but {type(model).__name__} is a {theirs}{advice}'
            )

    def apply_transfer(self, x: Tensor, inputs: Tensor) -> Tensor:
        """The task head's input: the transfer applied to the block's output x, for the model's input batch ``inputs``."""
        return self.transfer(x, *self.hw_shape_args(x, self.output, inputs))

    def hw_shape_args(self, x: Tensor, feature: Feature, inputs: Tensor) -> list[tuple[int, int]]:
        """Extra arguments for a unit that runs on x, of the shape ``feature``: its grid (height, width), or none."""
        return [feature.hw_shape(x, inputs.shape[-2:])] if self.needs_hw_shape else []

    def as_map(self, y: Tensor, inputs: Tensor) -> Tensor:
        """Convert the transfer's output y to a map (B, C, H, W), without class tokens, for convolutional task heads."""
        return self.feature.as_map(y, inputs.shape[-2:])

    @torch.compiler.disable
    def at_boundary(self, unit: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook of the block's last unit. It is a bound method, so deepcopy and pickle preserve it."""
        if not torch.is_grad_enabled():
            return None
        if self.session is not None:
            return self.session.at_boundary(self, output)
        if output.requires_grad:
            output.register_hook(self._refuse_backward)
        return None

    def _refuse_backward(self, grad: Tensor) -> None:
        raise ConfigError(
            f'a backward pass crossed the boundary after {self.unit} outside local training. To train locally set '
            "optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', ...) (for AMP set its dtype option; --amp of the "
            'stock tools replaces the wrapper); to train or differentiate end to end call mmman.delocalize_(backbone) or use '
            'num_blocks=1'
        )


def drop_keys(config: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """Return a config without the given options; empty for None."""
    return {name: value for name, value in (config or {}).items() if name not in names}
