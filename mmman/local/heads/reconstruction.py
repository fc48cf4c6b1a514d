"""Reconstruction of the input image from a block's output: the half of InfoPro that keeps information for later blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmman.errors import MisuseError
from mmman.local.heads.layers import conv_bn_relu


class ReconstructionDecoder(BaseModule):
    """Logits of the image's pixels from a feature map.

    Args:
        in_channels: Channels C of the map.
        stride: Its stride in pixels.
        stepwise: False, for small images: bilinear upsampling to the image's size, then 3x3 convolutions to 12 and to 3
            channels. True: a 1x1 convolution to C/4, then for every doubling bilinear upsampling and a 3x3 convolution; the
            last four have 64, 32, 12 and 3 channels (InfoPro on ImageNet).
    """

    def __init__(self, in_channels: int, stride: int, stepwise: bool = False) -> None:
        super().__init__()
        self.stepwise = stepwise
        doublings = round(math.log2(stride)) if stepwise else 1
        widths = [64] * (doublings - 4) + [64, 32, 12][max(0, 4 - doublings) :] if stepwise else [12]
        width = max(1, in_channels // 4) if stepwise else in_channels
        self.reduce = conv_bn_relu(in_channels, width, 1) if stepwise else nn.Identity()
        convs = []
        for outputs in widths:
            convs.append(conv_bn_relu(width, outputs, 3))
            width = outputs
        self.convs = nn.ModuleList([*convs, nn.Conv2d(width, 3, 3, padding=1)])

    def forward(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """From (B, C, H, W) to logits (B, 3, *size)."""
        y = self.reduce(y)
        if not self.stepwise:
            y = F.interpolate(y, size=size, mode='bilinear', align_corners=False)
        for i, conv in enumerate(self.convs):
            if self.stepwise:
                is_last = i == len(self.convs) - 1
                step = size if is_last else [2 * side for side in y.shape[-2:]]
                y = F.interpolate(y, size=step, mode='bilinear', align_corners=False)
            y = conv(y)
        return y


def pixels(inputs: Tensor, data_preprocessor: nn.Module) -> Tensor:
    """The images in [0, 1] that a data preprocessor made ``inputs`` from, (B, 3, H0, W0)."""
    if data_preprocessor._enable_normalize:
        return (inputs * data_preprocessor.std).add_(data_preprocessor.mean).div_(255).clamp_(0, 1)
    return (inputs / 255).clamp_(0, 1)


def check_preprocessor(model: nn.Module) -> None:
    """Raise :class:`MisuseError` where the images can't be restored from the model's inputs."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    if not hasattr(preprocessor, '_enable_normalize'):
        raise MisuseError(
            f'{type(preprocessor).__name__} does not tell how it normalises images (mean, std), so a local head cannot '
            'reconstruct them: use the data preprocessor of mmdet, mmseg or mmpretrain, or a head without reconstruction'
        )


def reconstruction_loss(logits: Tensor, images: Tensor, data_samples: list) -> Tensor:
    """Binary cross entropy of reconstructed pixels, averaged over the images without the padding that collating added.

    Args:
        logits: (B, 3, H0, W0).
        images: (B, 3, H0, W0), in [0, 1].
        data_samples: Their data samples; ``img_shape`` is the size without padding, at the top left.

    Returns:
        A scalar.
    """
    whole = tuple(images.shape[-2:])
    sizes = [tuple(sample.metainfo.get('img_shape', whole))[:2] for sample in data_samples]
    if all(size == whole for size in sizes):
        return F.binary_cross_entropy_with_logits(logits.float(), images)
    rows, columns = (
        torch.arange(most, device=images.device) < torch.tensor(valid, device=images.device)[:, None]
        for most, valid in zip(whole, zip(*sizes, strict=True), strict=True)
    )
    mask = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.dtype)
    total = F.binary_cross_entropy_with_logits(logits.float(), images, mask, reduction='sum')
    return total / (3 * mask.sum())
