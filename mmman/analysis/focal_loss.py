"""mmdet's focal loss on a CPU with the memory that it has on a GPU.

On a GPU it is one operator of mmcv, which keeps its inputs. On a CPU it is a chain of operators, which keeps several maps of
(anchors x classes). This is for measuring on a CPU what a GPU would need; nothing is trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmman.errors import MisuseError
from mmman.local.chunks import replaced

SLICE = 1 << 16
"""Values that are computed at a time."""


@contextmanager
def fused_focal_loss() -> Iterator[None]:
    """While this context is open, every ``FocalLoss`` of mmdet has the memory of mmcv's kernel on any device.

    It takes the path that it takes on a GPU: class indices go to the kernel; one-hot targets and probabilities don't. Logits in
    bfloat16 are taken like those in float16, though mmcv 2.1's kernel refuses them.

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
        return kernel(pred, target, gamma, alpha, weight, reduction) if pred.is_cuda else _loss(pred, target, gamma, alpha)

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
        _, weight, q, cross_entropy = _terms(pred[rows], target[rows], alpha)
        loss[rows] = weight * q**gamma * cross_entropy
    return loss


@torch.library.custom_op('mmman::sigmoid_focal_loss_backward', mutates_args=())
def _gradient(grad: Tensor, pred: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """The gradient of ``pred``, (N, C), from that of the loss."""
    result = torch.empty_like(pred)
    for rows in _slices(pred):
        sign, weight, q, cross_entropy = _terms(pred[rows], target[rows], alpha)
        result[rows] = grad[rows] * sign * weight * q**gamma * (gamma * (1 - q) * cross_entropy + q)
    return result


def _slices(pred: Tensor) -> Iterator[slice]:
    count, classes = pred.shape
    size = max(1, SLICE // classes)
    return (slice(start, start + size) for start in range(0, count, size))


def _terms(pred: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every logit: -1 if its class is the target's, else 1; its weight; the probability q of being wrong; -log(1 - q)."""
    positive = target[:, None] == torch.arange(pred.shape[1], device=pred.device)
    sign = torch.ones_like(pred).masked_fill_(positive, -1)
    weight = torch.full_like(pred, 1 - alpha).masked_fill_(positive, alpha)
    wrong = sign * pred
    return sign, weight, wrong.sigmoid(), -logsigmoid(-wrong)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    pred, target, ctx.gamma, ctx.alpha = inputs
    ctx.save_for_backward(pred, target)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, ctx.gamma, ctx.alpha), None, None, None


_loss.register_autograd(_backward, setup_context=_keep)
