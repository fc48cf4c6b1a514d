"""A part of the model run on a few images at a time: forward and backward at once, so that only their activations are alive.

What it computes is the whole batch's: losses and gradients are sums over images as soon as their normaliser is the batch's
(:mod:`mmman.memory.detection.losses`), and no layer inside mixes images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmman.errors import MisuseError

Losses = dict[str, Tensor]


def run_in_chunks(
    compute: Callable[[list[Tensor], slice], tuple[Tensor, Losses]],
    features: Sequence[Tensor],
    modules: Sequence[nn.Module],
    size: int,
    factor: Tensor,
) -> Losses:
    """Losses of a batch, computed for ``size`` images at a time, whose gradients are there when this returns.

    Back-propagating the returned losses, summed, hands the gradients to ``features`` and to the parameters of ``modules``, as
    if the losses had been computed at once. It is possible once.

    Args:
        compute: From the features of some images, and which images they are, to the scalar to back-propagate and the losses by
            name that it is the sum of. Normalised by the whole batch.
        features: What the part reads, each (B, ...). Those that require no gradient get none.
        modules: All modules that it runs.
        size: Images a chunk.
        factor: What a loss is multiplied by before it is back-propagated, so that float16 gradients don't underflow; a scalar.

    Returns:
        The losses by name, scalars; the first carries the gradient of their sum.
    """
    count = len(features[0])
    gradients = [torch.zeros_like(feature) if feature.requires_grad else None for feature in features]
    total: Losses = {}
    parameters = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    with torch.enable_grad():
        for start in range(0, count, size):
            span = slice(start, min(start + size, count))
            leaves = [feature.detach()[span].requires_grad_(feature.requires_grad) for feature in features]
            loss, losses = compute(leaves, span)
            with torch.autocast(loss.device.type, enabled=False):
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                # not .backward(): DDP counts on one gradient a parameter and step, which it gets at the end
                found = torch.autograd.grad(loss * factor, [*wanted, *parameters], allow_unused=True)
            for gradient, part in zip((own for own in gradients if own is not None), found[: len(wanted)], strict=True):
                if part is not None:
                    gradient[span] = part
            for i, part in enumerate(found[len(wanted) :]):
                if part is not None:
                    of_parameters[i] = part if of_parameters[i] is None else of_parameters[i].add_(part)
            for name, value in losses.items():
                total[name] = total[name] + value.detach() if name in total else value.detach()
            del loss, losses, leaves, wanted, found
    return with_gradients(total, factor, [*gradients, *of_parameters], [*features, *parameters])


def with_gradients(losses: Losses, factor: Tensor, gradients: list[Tensor | None], inputs: Sequence[Tensor]) -> Losses:
    """Losses whose gradients are known: back-propagating their sum hands ``gradients`` to ``inputs``. It is possible once.

    Args:
        losses: By name, scalars.
        factor: What the sum was multiplied by when ``gradients`` were computed, a scalar.
        gradients: One for each of the inputs, or None.
        inputs: Tensors.

    Returns:
        The losses; the first carries the gradient of their sum.
    """
    first = next(iter(losses))
    return losses | {first: _Computed.apply(losses[first], factor, gradients, *inputs)}


class _Computed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx, value: Tensor, factor: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.factor, ctx.gradients = factor, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.gradients is None:
            raise MisuseError('losses that were computed in chunks can be back-propagated once: set images_per_chunk=None')
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], grad / ctx.factor)
        return None, None, None, *gradients


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """While this context is open, ``owner`` has ``value`` as its own attribute ``name``."""
    had, own = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
