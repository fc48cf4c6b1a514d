"""Run a stem of convolution, BatchNorm, ReLU and pooling on a few images at a time, forward and backward.

The stem's feature maps are the largest of a backbone. BatchNorm mixes images only through the mean and variance of each
channel. With one more pass over the images in each direction, everything is computed for one chunk of the batch at a time, and
only the pooled map exists for the whole batch. Results equal those of the stem in one pass, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmman.errors import ConfigError
from mmman.partition import Unit

Post = Callable[[Tensor], Tensor]

NUM_CHUNKS = 8
"""Number of parts of a batch. More save little memory, and cost a GPU more kernel launches."""


class StemInChunks:
    """Replaces the ``forward`` of a backbone's first convolution and runs the whole stem; its other modules return the result.

    The backbone's own forward calls convolution, norm, ReLU and pooling in turn. This object looks the modules up in every
    call, because conversions (SyncBN) replace them. In eval mode, and with gradients disabled, it runs the convolution only.

    Args:
        backbone: The backbone.
        paths: Paths of its convolution, its norm, and the modules up to the stem's output.

    Attributes:
        output: The stem's output, from the end of this call until the stem's last module has returned it.
    """

    def __init__(self, backbone: nn.Module, paths: tuple[str, ...]) -> None:
        self.backbone, self.paths = backbone, paths
        self.output: Tensor | None = None

    def install_(self) -> None:
        """Set this object as the forward of the convolution, and :class:`StemTail` as that of the stem's other modules."""
        conv, *others = (self.backbone.get_submodule(path) for path in self.paths)
        conv.forward = self
        for module in others:
            if not isinstance(vars(module).get('forward'), StemTail):
                module.forward = StemTail(self, module)

    def __getstate__(self) -> dict:
        return {**vars(self), 'output': None}

    def __call__(self, x: Tensor) -> Tensor:
        self.output = None
        conv, norm, *rest = (self.backbone.get_submodule(path) for path in self.paths)
        if not (self.backbone.training and torch.is_grad_enabled()):
            return type(conv).forward(conv, x)
        if isinstance(norm, nn.SyncBatchNorm) and norm.training and get_world_size() > 1:
            raise ConfigError("a stem with SyncBN cannot run in chunks in several processes: remove 'stem' from recompute")
        self.install_()  # a conversion may have replaced modules
        self.output = run_stem(x, conv, norm, partial(_without_hooks, rest))
        return self.output


def _without_hooks(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = type(module).forward(module, x)
    return x


class StemTail:
    """Replaces the ``forward`` of a stem's norm, ReLU or pooling. Returns the stem's output unchanged.

    On any other input it runs the module. An error between the convolution and this module therefore doesn't affect a later
    forward pass.

    Args:
        stem: The object that runs the stem.
        module: The module.
    """

    def __init__(self, stem: StemInChunks, module: nn.Module) -> None:
        self.stem, self.module = stem, module

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.stem.output:
            return type(self.module).forward(self.module, x)
        if self.module is self.stem.backbone.get_submodule(self.stem.paths[-1]):
            self.stem.output = None
        return x


def stem_paths(backbone: nn.Module, stem: Unit) -> tuple[str, ...] | None:
    """Paths of a stem's convolution, norm, ReLU and, if it has one, pooling; None if the stem is built differently."""
    if stem.modules[0] != 'conv1' or len(stem.modules) != 3:
        return None
    conv, norm = (backbone.get_submodule(path) for path in stem.modules[:2])
    fits = isinstance(conv, nn.Conv2d) and conv.bias is None and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return tuple(dict.fromkeys((*stem.modules[:2], 'relu', stem.output))) if fits else None


def run_stem(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, post: Post) -> Tensor:
    """``post(norm(conv(x)))``, computed for an eighth of the batch at a time. Only x is saved for the backward pass.

    Args:
        x: (B, C, H, W).
        conv: A convolution without bias.
        norm: Affine BatchNorm in either mode; in training mode its running statistics are updated once.
        post: The rest of the stem, without parameters, e.g. ReLU and max pooling. It must process every image independently.

    Returns:
        The output of ``post`` for the batch.
    """
    return _Stem.apply(x, conv.weight, norm.weight, norm.bias, conv, norm, post)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, gamma, beta, conv, norm, post) -> Tensor:
        ctx.conv, ctx.eps, ctx.post, ctx.precision = conv, norm.eps, post, precision_of(x)
        ctx.uses_batch_stats = norm.training or norm.running_mean is None
        chunks = _chunk_slices(x)
        if ctx.uses_batch_stats:
            moments = (_moments(_conv(conv, x[chunk], kernel)) for chunk in chunks)
            var, mean = map(torch.stack, zip(*moments, strict=True))
            share = mean.new_full((len(chunks), 1), len(x[chunks[0]]) / len(x))
            share[-1:].fill_(len(x[chunks[-1]]) / len(x))
            means, mean = mean, (share * mean).sum(0)
            var = (share * (var + (means - mean).square())).sum(0)
        else:
            mean, var = norm.running_mean.clone(), norm.running_var.clone()
        scale, shift = _affine(mean, var, gamma, beta, norm.eps)
        out = None
        for chunk in chunks:
            z = _conv(conv, x[chunk], kernel)
            y = post(_normalised(z, scale, shift))
            out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
            out[chunk] = y
        ctx.count = len(x) * z[0, 0].numel()
        if norm.training and norm.track_running_stats:
            _update_running_stats(norm, mean, var * (ctx.count / max(ctx.count - 1, 1)))
        ctx.save_for_backward(x, kernel, gamma, beta, mean, var)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, kernel, gamma, beta, *moments = ctx.saved_tensors
        mean, var, gamma, beta = leaves = [t.detach().requires_grad_() for t in (*moments, gamma, beta)]
        with torch.enable_grad(), ctx.precision():
            affine = _affine(mean, var, gamma, beta, ctx.eps)
            scale, shift = (t.detach().requires_grad_() for t in affine)
            sums = [torch.zeros_like(scale), torch.zeros_like(shift)]
            for chunk in _chunk_slices(x):
                with torch.no_grad():
                    z = _conv(ctx.conv, x[chunk], kernel)
                y = ctx.post(_normalised(z, scale, shift))
                for total, part in zip(sums, torch.autograd.grad(y, (scale, shift), grad[chunk]), strict=True):
                    total += part
            del y, z
            grad_mean, grad_var, grad_gamma, grad_beta = torch.autograd.grad(affine, leaves, sums)
            scale, shift = scale.detach(), shift.detach()
            grad_kernel = torch.zeros_like(kernel)
            grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            kernel = kernel.detach().requires_grad_()
            for chunk in _chunk_slices(x):
                images = x[chunk].detach().requires_grad_(grad_x is not None)
                z = _conv(ctx.conv, images, kernel)
                detached = z.detach().requires_grad_()
                (g,) = torch.autograd.grad(ctx.post(_normalised(detached, scale, shift)), detached, grad[chunk])
                if ctx.uses_batch_stats:
                    with torch.no_grad():
                        stats_grad = (grad_mean + 2 * grad_var * (_upcast(z).movedim(1, -1) - mean)) / ctx.count
                        g = g + stats_grad.movedim(-1, 1).to(g.dtype)
                inputs = (kernel,) if grad_x is None else (kernel, images)
                parts = torch.autograd.grad(z, inputs, g)
                grad_kernel += parts[0]
                if grad_x is not None:
                    grad_x[chunk] = parts[1]
        return grad_x, grad_kernel, grad_gamma, grad_beta, None, None, None


def _chunk_slices(x: Tensor) -> list[slice]:
    size = -(-len(x) // NUM_CHUNKS)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _conv(conv: nn.Conv2d, images: Tensor, kernel: Tensor) -> Tensor:
    return conv._conv_forward(images, kernel, None)


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(_upcast(z), (0, 2, 3), correction=0)


def _affine(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = gamma * (var + eps).rsqrt()
    return scale, beta - mean * scale


def _normalised(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (z * scale[:, None, None] + shift[:, None, None]).to(z.dtype)


def _upcast(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _update_running_stats(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    norm.num_batches_tracked += 1
    momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)


def precision_of(x: Tensor) -> Callable[[], AbstractContextManager]:
    """Capture the current autocast state, to restore it in the backward pass, where autocast is off."""
    kind = x.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
