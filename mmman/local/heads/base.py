"""What every local head is: a momentum transfer, then a task head with a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmman.errors import MisuseError
from mmman.local.session import Session
from mmman.local.transfer import MomentumTransfer


@dataclass(frozen=True)
class Boundary:
    """Where a local head sits; measured on the backbone, never typed into a config.

    Attributes:
        block: The block it trains, 1 to K-1.
        unit: Name of the block's last unit.
        source: Path below the backbone of the first unit of the next block.
        channels: Channels of what the task head sees (the transfer's output).
        stride: Its stride: input pixels a feature pixel, along a side.
        strides: The strides that the heads of all boundaries see, in order.
    """

    block: int
    unit: str
    source: str
    channels: int
    stride: int
    strides: tuple[int, ...]


class LocalHead(BaseModule):
    """Base of the local heads. A subclass builds its task head from ``boundary`` and implements :meth:`loss`.

    Args:
        boundary: Where it sits. Given by :func:`mmman.localize_`.
        transfer: The momentum transfer on its input. Given by :func:`mmman.localize_`.
        loss_weight: Factor on this head's whole loss. Given by :func:`mmman.localize_`.
        init_cfg: mmengine's initialisation of the task head.
    """

    session: Session | None = None

    def __init__(
        self, boundary: Boundary, transfer: MomentumTransfer, loss_weight: float = 1.0, init_cfg: dict | list | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.block = boundary.block
        self.unit = boundary.unit
        self.source = boundary.source
        self.loss_weight = loss_weight
        self.transfer = transfer

    def loss(self, x: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor | list[Tensor]]:
        """The local losses of a block.

        Args:
            x: The block's output, (B, C, H, W), with the block's graph behind it.
            inputs: The model's input batch, (B, 3, H0, W0), normalised.
            data_samples: The batch's data samples, as the model's own head gets them.

        Returns:
            Losses by name, as the task's library returns them; names that contain ``loss`` are summed and back-propagated.
        """
        raise NotImplementedError

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`MisuseError` where this head doesn't fit the model it is part of. Called before the first step."""

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
