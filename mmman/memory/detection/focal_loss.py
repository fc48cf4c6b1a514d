"""mmdet's focal loss as one operator that saves only its inputs, on any device.

On a GPU mmdet uses an operator of mmcv. It inspects the labels, which forces a device-to-host sync, so a CUDA graph can't
capture it. On a CPU mmdet uses a chain of operators, which saves several maps of (anchors x classes): far more memory than on a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mmman.errors import ConfigError
from mmman.memory.chunks import replaced

SLICE_SIZE = 1 << 16
GPU_SLICE_SIZE = 1 << 21
"""Number of values computed in one pass: few enough for the cache on a CPU, enough for few kernel launches on a GPU."""

SOFTPLUS_THRESHOLD = 40
"""For x above this threshold log(1 + exp(x)) equals x, in double precision too."""


@contextmanager
def fused_focal_loss(with_kernel: bool = True) -> Iterator[None]:
    """While this context is open, every ``FocalLoss`` of mmdet needs as much memory as with mmcv's kernel, on any device.

    It takes the path that mmdet uses on a GPU: class indices go to the kernel; one-hot targets and probabilities don't. Logits
    in bfloat16 are handled like those in float16, though mmcv 2.1's kernel rejects them.

    Args:
        with_kernel: Whether mmcv's kernel itself runs on a GPU.

    Raises:
        ConfigError: mmdet is not installed.
    """
    try:
        from mmdet.models.losses import focal_loss as library
    except ImportError:
        raise ConfigError('the fused focal loss requires mmdet, which is not installed: measure without it') from None
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


def summed_focal_loss(
    loss: nn.Module, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: float | Tensor | None = None
) -> Tensor:
    """``loss(pred, target, weight, avg_factor=avg_factor)``, where mmdet's focal loss is summed as it is computed.

    No map of losses is allocated then. This applies to class indices and a loss that is averaged by a given number. For another
    loss or other arguments, ``loss`` itself is called.

    Args:
        loss: The class loss of a dense head.
        pred: (N, C) logits.
        target: (N,) int64; values of C and above are background.
        weight: (N,).
        avg_factor: Divisor of the sum.
    """
    by_row = pred.dim() == target.dim() + 1 and (weight is None or weight.shape == target.shape)
    if not _is_stock(loss) or not by_row or avg_factor is None or loss.reduction != 'mean':
        return loss(pred, target, weight, avg_factor=avg_factor)
    total = _sum(pred, target, weight, loss.gamma, loss.alpha)
    return loss.loss_weight * (total / (avg_factor + torch.finfo(torch.float32).eps))


def focal_loss_without_kernel(
    loss: nn.Module, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: float | Tensor | None = None
) -> Tensor:
    """The same without mmcv's kernel, which forces a device-to-host sync, and with a map of losses. Arguments as above."""
    if not _is_stock(loss) or pred.dim() == target.dim():
        return loss(pred, target, weight, avg_factor=avg_factor)
    from mmdet.models.losses.utils import weight_reduce_loss

    value = _loss(pred, target, loss.gamma, loss.alpha)
    weight = weight if weight is None or weight.shape == value.shape else weight.view(-1, 1)
    return loss.loss_weight * weight_reduce_loss(value, weight, loss.reduction, avg_factor)


def _is_stock(loss: nn.Module) -> bool:
    from mmdet.models.losses import FocalLoss

    return type(loss) is FocalLoss and not loss.activated


# Custom operators: their internal allocations are invisible to memory accounting, like a kernel's workspace.


@torch.library.custom_op('mmman::sigmoid_focal_loss', mutates_args=())
def _loss(pred: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """The unreduced focal loss.

    Args:
        pred: (N, C) logits.
        target: (N,) int64; values of C and above are background.

    Returns:
        (N, C), with the dtype of ``pred``.
    """
    loss = torch.empty_like(pred)
    for rows in _slices(pred):
        loss[rows] = _weight_by_class(pred[rows], target[rows], alpha, partial(_focal, gamma))
    return loss


@torch.library.custom_op('mmman::sigmoid_focal_loss_backward', mutates_args=())
def _gradient(grad: Tensor, pred: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """The gradient of ``pred``, (N, C), from the gradient of the loss, (N, C) or (N, 1)."""
    pred, target = pred.contiguous(), target.contiguous()
    result = torch.empty_like(pred)
    if pred.is_cuda and pred.dtype == _accumulation_dtype(pred.dtype):
        from mmcv.ops.focal_loss import ext_module  # unlike the forward kernel, it doesn't inspect the labels

        ext_module.sigmoid_focal_loss_backward(pred, target, pred.new_empty(0), result, gamma=gamma, alpha=alpha)
        return result.mul_(grad)
    for rows in _slices(pred):
        result[rows] = _weight_by_class(pred[rows], target[rows], alpha, partial(_focal_derivative, gamma), sign=-1).mul_(
            grad[rows]
        )
    return result


@torch.library.custom_op('mmman::sigmoid_focal_loss_sum', mutates_args=())
def _sum(pred: Tensor, target: Tensor, weight: Tensor | None, gamma: float, alpha: float) -> Tensor:
    """The sum of the focal loss over all classes and all rows, weighted by ``weight``, (N,). A scalar."""
    dtype = _accumulation_dtype(pred.dtype)
    is_object = target[:, None] < pred.shape[1]
    own_class = target[:, None].clamp(max=pred.shape[1] - 1)
    own = pred.gather(1, own_class)
    wrong = own.masked_fill(is_object, -torch.inf)  # of which the loss is 0
    rows = _focal(gamma, own.masked_fill_(~is_object, torch.inf).neg_().to(dtype)).mul_(alpha).squeeze(1)
    for part in _slices(pred):
        logits = pred[part].scatter(1, own_class[part], wrong[part]).to(dtype)
        rows[part].add_(_focal(gamma, logits).sum(1), alpha=1 - alpha)
    return (rows if weight is None else rows.mul_(weight)).sum()


def sum_on_gpu(pred: Tensor) -> tuple[int, int]:
    """The kernels that :func:`_sum` starts for logits (N, C) on a GPU, and the bytes that they read and write."""
    count = len([*_slices(pred, GPU_SLICE_SIZE)])
    is_half = pred.element_size() == 2
    return 14 + is_half + (8 + is_half) * count, 48 * pred.numel()


def _slices(pred: Tensor, size: int | None = None) -> Iterator[slice]:
    count, classes = pred.shape
    size = max(1, (size or (GPU_SLICE_SIZE if pred.is_cuda else SLICE_SIZE)) // classes)
    return (slice(start, start + size) for start in range(0, count, size))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float if dtype in (torch.float16, torch.bfloat16) else dtype


def _weight_by_class(pred: Tensor, target: Tensor, alpha: float, function: Callable[[Tensor], Tensor], sign: int = 1) -> Tensor:
    """``(1 - alpha) * function(pred)``, and for a row's own class ``sign * alpha * function(-pred)``, (N, C)."""
    pred = pred.to(_accumulation_dtype(pred.dtype))
    values = function(pred).mul_(1 - alpha)
    own_class = target.clamp(max=pred.shape[1] - 1)[:, None]
    own_class_values = function(-pred.gather(1, own_class)).mul_(sign * alpha)
    return values.scatter_(
        1, own_class, torch.where(target[:, None] < pred.shape[1], own_class_values, values.gather(1, own_class))
    )


def _focal(gamma: float, wrong_logit: Tensor) -> Tensor:
    """``-q^gamma * log(1 - q)``, where q = sigmoid(``wrong_logit``) is the probability of being wrong."""
    return softplus(wrong_logit, threshold=SOFTPLUS_THRESHOLD).mul_(wrong_logit.sigmoid().pow_(gamma))


def _focal_derivative(gamma: float, wrong_logit: Tensor) -> Tensor:
    """The derivative of :func:`_focal`: ``q^gamma * (q - gamma * (1 - q) * log(1 - q))``."""
    q = wrong_logit.sigmoid()
    return softplus(wrong_logit, threshold=SOFTPLUS_THRESHOLD).mul_(1 - q).mul_(gamma).add_(q).mul_(q.pow_(gamma))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.gamma, ctx.alpha = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, ctx.gamma, ctx.alpha), None, None, None


def _sum_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    pred, target, weight = ctx.saved_tensors
    row_values = grad.expand(len(pred), 1) if weight is None else grad * weight[:, None].to(grad.dtype)
    return _gradient(row_values, pred, target, ctx.gamma, ctx.alpha), None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup_context)
_sum.register_autograd(_sum_backward, setup_context=_setup_context)
