"""Run a part of the model on a few images at a time, forward and backward, so that only their activations are in memory.

Losses and gradients equal those of the whole batch: they are sums over images once the normaliser is the batch's
(:mod:`mmman.memory.detection.losses`), and no layer in the part mixes images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmman.errors import ConfigError

Losses = dict[str, Tensor]


def run_in_chunks(
    compute: Callable[[list[Tensor], slice], tuple[Tensor, Losses]],
    features: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    chunk_size: int,
    factor: Tensor,
) -> Losses:
    """Compute the losses of a batch for ``chunk_size`` images at a time. All gradients are computed before this returns.

    Back-propagating the sum of the returned losses passes the gradients to ``features`` and to ``parameters``, as if the losses
    had been computed in one pass. It is possible only once.

    Args:
        compute: ``compute(features, span)`` for the images ``span`` of the batch. Returns the total loss, a scalar, and its
            terms by name, normalised over the whole batch.
        features: Inputs of the part, each (B, ...). Those that don't require a gradient get none.
        parameters: All trainable parameters of the part.
        chunk_size: Images per chunk.
        factor: Factor on a loss before it is back-propagated, so that float16 gradients don't underflow; a scalar.

    Returns:
        The losses by name, scalars; the first carries the gradient of their sum.
    """
    count = len(features[0])
    grads = [torch.zeros_like(feature) if feature.requires_grad else None for feature in features]
    total: Losses = {}
    parameter_grads: list[Tensor | None] = [None] * len(parameters)
    with torch.enable_grad():
        for start in range(0, count, chunk_size):
            span = slice(start, min(start + chunk_size, count))
            leaves = [feature.detach()[span].requires_grad_(feature.requires_grad) for feature in features]
            loss, losses = compute(leaves, span)
            with torch.autocast(loss.device.type, enabled=False):
                grad_leaves = [leaf for leaf in leaves if leaf.requires_grad]
                # not .backward(): DDP expects one gradient per parameter and step, which it gets at the end
                chunk_grads = torch.autograd.grad(loss * factor, [*grad_leaves, *parameters], allow_unused=True)
            for total_grad, grad in zip(
                (own for own in grads if own is not None), chunk_grads[: len(grad_leaves)], strict=True
            ):
                if grad is not None:
                    total_grad[span] = grad
            _accumulate_(parameter_grads, chunk_grads[len(grad_leaves) :])
            for name, value in losses.items():
                total[name] = total[name] + value.detach() if name in total else value.detach()
            del loss, losses, leaves, grad_leaves, chunk_grads
    return attach_grads(total, factor, [*grads, *parameter_grads], [*features, *parameters])


def _accumulate_(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add each gradient to its total, in place. A total of None becomes the gradient itself."""
    pairs = [(total, grad) for total, grad in zip(totals, grads, strict=True) if total is not None and grad is not None]
    if pairs:
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
    totals[:] = [grad if total is None else total for total, grad in zip(totals, grads, strict=True)]


def attach_grads(losses: Losses, factor: Tensor, grads: list[Tensor | None], inputs: Sequence[Tensor]) -> Losses:
    """Attach known gradients to losses: back-propagating their sum, possible once, passes ``grads`` to ``inputs``.

    Args:
        losses: By name, scalars.
        factor: The factor on the sum when ``grads`` were computed, a scalar.
        grads: One for each of the inputs, or None.
        inputs: Tensors.

    Returns:
        The losses; the first carries the gradient of their sum.
    """
    first = next(iter(losses))
    return losses | {first: _PrecomputedGrads.apply(losses[first], factor, grads, *inputs)}


class _PrecomputedGrads(torch.autograd.Function):
    """A loss whose gradients were already computed."""

    @staticmethod
    def forward(ctx, value: Tensor, factor: Tensor, grads: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.factor, ctx.grads = factor, grads
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.grads is None:
            raise ConfigError(
                'losses that were computed in chunks can be back-propagated only once: to do it again set images_per_chunk=None'
            )
        grads, ctx.grads = ctx.grads, None
        torch._foreach_mul_([total_grad for total_grad in grads if total_grad is not None], grad / ctx.factor)
        return None, None, None, *grads


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """While this context is open, the instance attribute ``name`` of ``owner`` is ``value``."""
    had, own = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
