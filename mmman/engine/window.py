"""The windows of MLAAN: a local loss trains the last k blocks, beside a loss of the block's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mmengine.model import BaseModel
from torch import Tensor

from mmman.local.blocks import LocalBlocks
from mmman.local.local_head import LocalHead
from mmman.local.session import Session

INDEPENDENT = 0.001
CASCADE = 0.999
"""Weights of the two losses in MLAAN."""


class WindowSession(Session):
    """A session whose local losses train a window of blocks (the multilaminar modules of Zhang et al., "MLAAN", 2024).

    At the boundary of block j the loss is ``0.001 * independent + 0.999 * cascade``. The independent loss, of a head without
    transfer, trains block j alone. The cascade loss, of the local head, trains blocks j-k+1 to j. The task loss, which both
    streams have in common, trains the last block, neck and head with weight 1, and the k-1 blocks before it with 0.999.

    Both streams have the same features, so every block runs forward once; its graph is kept until the last window that
    contains it, and back-propagated once for each loss that trains it. Gradients are complete after :meth:`end_windows`.

    Args:
        model, local, backward: See :class:`Session`.
        propagate: Called as ``propagate(x, grad, retain_graph)``: back-propagates the gradient of a block's output.
    """

    def __init__(
        self,
        model: BaseModel,
        local: LocalBlocks,
        backward: Callable[[Tensor, int], None],
        propagate: Callable[[Tensor, Tensor, bool], None],
    ) -> None:
        super().__init__(model, local, backward)
        self.propagate = propagate
        self._input: Tensor | None = None  # of the block that runs: the leaf at which its graph begins; None: the images
        self._window: deque[tuple[Tensor | None, Tensor]] = deque()  # inputs and outputs of the last blocks, oldest first

    def train_block(self, head: LocalHead, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Back-propagate both losses of block ``head.block``. Arguments and result as in :meth:`Session.train_block`."""
        own, shared = (x.detach().requires_grad_() for _ in range(2))
        independent, independent_log = self.local_loss(head.independent, own)
        cascade, log = self.local_loss(head, shared)
        loss = INDEPENDENT * independent + CASCADE * cascade
        self.backward(loss * head.loss_weight, head.block)
        self._window.append((self._input, x))
        self._propagate(own.grad, blocks=1, frees=False)
        self._propagate(shared.grad, blocks=self.local.window, frees=True)
        if len(self._window) == self.local.window:
            self._window.popleft()
        self._input = x.detach().requires_grad_()
        log = {**log, **{f'independent_{name}': value for name, value in independent_log.items()}, 'loss': loss}
        return self._input, log

    def end_windows(self) -> None:
        """Propagate the gradient of the task loss, which has been back-propagated, to the blocks before the last."""
        if self._input is not None:
            self._propagate(CASCADE * self._input.grad, blocks=self.local.window - 1, frees=True)
        self._window.clear()
        self._input = None

    def _propagate(self, grad: Tensor, blocks: int, frees: bool) -> None:
        """Propagate the gradient of the newest block's output through the last ``blocks`` blocks, and free the last graph."""
        for depth, (entered, x) in enumerate(list(self._window)[: -blocks - 1 : -1], start=1):
            self.propagate(x, grad, not (frees and depth == blocks))
            if entered is not None:
                grad, entered.grad = entered.grad, None
