"""mmdet's focal loss as one operator that keeps its inputs, on any device.

On a GPU mmdet takes an operator of mmcv. It looks at the labels, for which the CPU waits, so no CUDA graph can hold it. On a
CPU mmdet takes a chain of operators, which keeps several maps of (anchors x classes): far more than a GPU would need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmman.errors import MisuseError
from mmman.local.chunks import replaced

SLICE = 1 << 16
SLICE_ON_GPU = 1 << 20
"""Values that are computed at a time: in a cache, and with few kernels."""


@contextmanager
def fused_focal_loss(with_kernel: bool = True) -> Iterator[None]:
    """While this context is open, every ``FocalLoss`` of mmdet has the memory of mmcv's kernel on any device.

    It takes the path that it takes on a GPU: class indices go to the kernel; one-hot targets and probabilities don't. Logits in
    bfloat16 are taken like those in float16, though mmcv 2.1's kernel refuses them.

    Args:
        with_kernel: Whether mmcv's kernel itself is taken on a GPU.

    Raises:
        MisuseError: mmdet is not installed.
    """
    try:
        from mmdet.models.losses import focal_loss as library
    except ImportError:
        raise MisuseError("the fused focal loss is mmdet's, which is not installed: measure without it") from None
    stock, kernel = library.FocalLoss.forward, library._sigmoid_focal_loss

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        if self.activated or pred.dim() == target.dim():
            return stock(self, pred, target, weight, avg_factor, reduction_override)
        reduction = reduction_override or self.reduction
        return self.loss_weight * library.sigmoid_focal_loss(
            pred, target, weight, self.gamma, self.alpha, reduction, avg_factor
        )

    def on_any_device(pred, target, gamma, alpha, weight, reduction):
        if with_kernel and pred.is_cuda:
            return kernel(pred, target, gamma, alpha, weight, reduction)
        return _loss(pred, target, gamma, alpha)

    with replaced(library.FocalLoss, 'forward', forward), replaced(library, '_sigmoid_focal_loss', on_any_device):
        yield


# Operators of their own: what they allocate inside is as little seen, and counted, as a kernel's workspace.


@torch.library.custom_op('mmman::sigmoid_focal_loss', mutates_args=())
def _loss(pred: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """The focal loss, unreduced.

    Args:
        pred: (N, C) logits.
        target: (N,) int64; C and more is background.

    Returns:
        (N, C), of the dtype of ``pred``.
    """
    loss = torch.empty_like(pred)
    for rows in _slices(pred):
        _with_objects(loss[rows], pred[rows], target[rows], alpha, lambda wrong: _focal(wrong, gamma))
    return loss


@torch.library.custom_op('mmman::sigmoid_focal_loss_backward', mutates_args=())
def _gradient(grad: Tensor, pred: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """The gradient of ``pred``, (N, C), from that of the loss."""
    result = torch.empty_like(pred)
    for rows in _slices(pred):
        _with_objects(result[rows], pred[rows], target[rows], alpha, lambda wrong: _slope(wrong, gamma), sign=-1)
        result[rows] *= grad[rows]
    return result


def _slices(pred: Tensor) -> Iterator[slice]:
    count, classes = pred.shape
    size = max(1, (SLICE_ON_GPU if pred.is_cuda else SLICE) // classes)
    return (slice(start, start + size) for start in range(0, count, size))


def _with_objects(
    out: Tensor, pred: Tensor, target: Tensor, alpha: float, function: Callable[[Tensor], Tensor], sign: int = 1
) -> None:
    """Into ``out``, (N, C): ``(1 - alpha) * function(pred)``, and for a row's own class ``sign * alpha * function(-pred)``."""
    wide = pred.float() if pred.dtype in (torch.float16, torch.bfloat16) else pred
    out.copy_(function(wide).mul_(1 - alpha))
    own = target.clamp(max=pred.shape[1] - 1)[:, None]
    of_own = function(-wide.gather(1, own)).mul_(sign * alpha).to(out.dtype)
    out.scatter_(1, own, torch.where(target[:, None] < pred.shape[1], of_own, out.gather(1, own)))


def _focal(wrong: Tensor, gamma: float) -> Tensor:
    """``-q^gamma * log(1 - q)`` of logits of the probability q of being wrong."""
    return logsigmoid(-wrong).mul_(wrong.sigmoid().pow_(gamma)).neg_()


def _slope(wrong: Tensor, gamma: float) -> Tensor:
    """Its derivative: ``q^gamma * (q - gamma * (1 - q) * log(1 - q))``."""
    q = wrong.sigmoid()
    return logsigmoid(-wrong).mul_(1 - q).mul_(-gamma).add_(q).mul_(q.pow_(gamma))


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    pred, target, ctx.gamma, ctx.alpha = inputs
    ctx.save_for_backward(pred, target)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, ctx.gamma, ctx.alpha), None, None, None


_loss.register_autograd(_backward, setup_context=_keep)
