"""The local training logic of one step: what happens when the forward pass reaches a boundary.

The optim wrapper opens a :class:`Session` around the model's forward pass. While it is open, each boundary that the forward
pass reaches runs its local head, back-propagates the local loss immediately, and returns a detached feature map. Without a
session a boundary returns its input unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Protocol

from mmengine.model import BaseModel
from torch import Tensor, nn

from mmman.batch_of_one import use_running_stats_for_batch_of_one
from mmman.errors import ConfigError
from mmman.memory.chunks import replaced

if TYPE_CHECKING:
    from mmman.local.blocks import LocalBlocks
    from mmman.local.local_head import LocalHead


class StepStrategy(Protocol):
    """Computes a step's losses in place of the model and the local heads. The results stay the same."""

    def task_losses(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Replaces the model's ``loss``: backbone, neck and head. Takes the same arguments and returns the same result."""

    def local_losses(self, head: LocalHead, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Replaces ``head.loss``. Takes the same arguments and returns the same result."""


class Session:
    """Context manager for one forward pass.

    Args:
        model: The unwrapped model. Its ``parse_losses`` turns local losses into one scalar.
        local: The local heads of the model's backbone.
        backward: Back-propagates the local loss of a block, scaled as the optim wrapper scales the task loss.
        strategy: Computes the losses in place of the model and its local heads. None: they compute their own.

    Attributes:
        batch: The model's inputs and data samples, during its forward pass.
        log: Detached local losses by ``local/<block>/<name>``, scalars.
    """

    def __init__(
        self,
        model: BaseModel,
        local: LocalBlocks,
        backward: Callable[[Tensor, int], None],
        strategy: StepStrategy | None = None,
    ) -> None:
        self.model = model
        self.local = local
        self.backward = backward
        self.strategy = strategy
        self.log: dict[str, Tensor] = {}
        self.batch: tuple | None = None
        self._pending: set[int] = set()

    def __enter__(self) -> Session:
        with ExitStack() as undo:
            undo.callback(setattr, self, 'batch', None)
            hook = self.model.register_forward_pre_hook(self._store_batch, with_kwargs=True)
            undo.callback(hook.remove)
            self._pending = {head.block for head in self.local.trained_heads()}
            undo.callback(self.local.detach_session)
            self.local.attach_session(self)
            if self.strategy is not None:
                undo.enter_context(replaced(self.model, 'loss', self.strategy.task_losses))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self._undo.close()
        if error is None and self._pending:
            raise ConfigError(
                f'the forward pass ended without reaching the boundaries of blocks {sorted(self._pending)}: their local heads '
                "got no gradient. The model's forward must run its backbone with gradients enabled, once, inside optim_context"
            )

    @property
    def is_pending(self) -> bool:
        """Whether the forward pass has not yet reached the last boundary."""
        return bool(self._pending)

    def mark_all_passed(self) -> None:
        """Mark all boundaries as passed. Called when the step ran without the model's forward pass."""
        self._pending.clear()

    def _store_batch(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs, data_samples = (*args, None, None)[:2]
        self.batch = (kwargs.get('inputs', inputs), kwargs.get('data_samples', data_samples))

    def at_boundary(self, head: LocalHead, x: Tensor) -> Tensor:
        """Train block ``head.block`` on its output ``x`` and return the output detached, (B, C, H, W) or (B, L, C)."""
        if self.batch is None:
            raise ConfigError('a local head needs the batch: call the model, not its backbone, inside optim_context')
        if head.block not in self._pending:
            raise ConfigError(
                f'the boundary of block {head.block} was reached twice in one step: local learning does not support a '
                'backbone that runs more than once per step, or activation checkpointing around several blocks'
            )
        self._pending.remove(head.block)
        with use_running_stats_for_batch_of_one(head) if len(x) == 1 else nullcontext():
            x, log = self.train_block(head, x)
        self.log.update({f'local/{head.block}/{name}': value.detach() for name, value in log.items()})
        return x

    def train_block(self, head: LocalHead, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Back-propagate the local loss of block ``head.block``.

        Returns:
            The next block's input, and the losses by name.
        """
        loss, log = self.local_loss(head, x)
        self.backward(loss * head.loss_weight, head.block)
        return x.detach(), log

    def local_loss(self, head: LocalHead, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a local head on a block's output ``x``, a scalar, and its parts by name."""
        y = head.apply_transfer(x, self.batch[0])
        losses = head.loss(y, *self.batch) if self.strategy is None else self.strategy.local_losses(head, y, *self.batch)
        return self.model.parse_losses(losses)
