"""Reconstruct the input image from a block's output: the part of InfoPro that preserves information for later blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.layers import conv_bn_relu

CHECKED_PIXELS_PER_SIDE = 64
"""Approximate number of rows and of columns of every image that the pixel check reads."""

MAX_OUTSIDE = 0.25
"""Maximum share of a channel's pixels outside the range: floating-point augmentations may overshoot."""

MIN_SPREAD = 0.02
"""Minimum share of the range that the values of a channel must span."""

ROUNDING = 1e-3
"""How far outside [0, 1] a restored pixel may be due to rounding."""


class ReconstructionDecoder(BaseModule):
    """Computes logits of the image's pixels from a feature map.

    Args:
        in_channels: Channels C of the map.
        stride: Stride of the map in pixels.
        stepwise: False, for small images: bilinear upsampling to the image's size, then 3x3 convolutions to 12 and to the
            image's channels. True: a 1x1 convolution to C/4, at most 128 up to stride 8 and 192 beyond; then for every doubling
            bilinear upsampling and a convolution: 1x1 to 64 or, in the last three steps, 3x3 to 32, 12 and the image's
            channels. At stride 8 this is InfoPro's decoder (ImageNet, Cityscapes), at stride 16 that of MAN++'s code.
        image_channels: Channels of the image.
    """

    def __init__(self, in_channels: int, stride: int, stepwise: bool = False, image_channels: int = 3) -> None:
        super().__init__()
        self.stepwise = stepwise
        doublings = round(math.log2(stride)) if stepwise else 1
        widths = [64] * (doublings - 3) + [32, 12][max(0, 3 - doublings) :] if stepwise else [12]
        width = min(max(1, in_channels // 4), 128 if doublings <= 3 else 192) if stepwise else in_channels
        self.reduce = conv_bn_relu(in_channels, width, 1) if stepwise else nn.Identity()
        convs = []
        for outputs in widths:
            convs.append(conv_bn_relu(width, outputs, 1 if outputs == 64 else 3))
            width = outputs
        self.convs = nn.ModuleList([*convs, nn.Conv2d(width, image_channels, 3, padding=1)])

    def forward(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """From (B, C, H, W) to logits (B, image_channels, *size)."""
        y = self.reduce(y)
        if not self.stepwise:
            y = F.interpolate(y, size=size, mode='bilinear', align_corners=True)
        for i, conv in enumerate(self.convs):
            if self.stepwise:
                is_last = i == len(self.convs) - 1
                step = size if is_last else [2 * side for side in y.shape[-2:]]
                y = F.interpolate(y, size=step, mode='bilinear', align_corners=True)
            y = conv(y)
        return y


class ReconstructionTarget:
    """Computes the target of the reconstruction: the images before the data preprocessor, scaled to [0, 1].

    The first batch that isn't blank is checked: a wrong ``pixel_range`` would make the target a constant. Later batches aren't
    checked, to avoid device-to-host syncs.

    Args:
        pixel_range: The lowest and the highest value of a pixel in the images that the data preprocessor gets: ``(0, 255)`` for
            8 bits, ``(0, 65535)`` for 16, ``(0, 1)`` for fractions.
        channels: Channels of the images.

    Raises:
        ConfigError: The range is empty.
    """

    def __init__(self, pixel_range: tuple[float, float], channels: int) -> None:
        self.low, self.high = pixel_range
        self.channels = channels
        if not self.high > self.low:
            raise ConfigError(
                f'local_head.pixel_range={tuple(pixel_range)}: expected (lowest, highest) with lowest < highest, e.g. (0, 255) '
                'for 8-bit images'
            )
        self.is_checked = False

    def __call__(self, inputs: Tensor, data_preprocessor: nn.Module) -> Tensor:
        """Compute the target for a batch.

        Args:
            inputs: The model's inputs, (B, channels, H0, W0), normalised by ``data_preprocessor`` or not.

        Returns:
            Shaped as ``inputs``, in [0, 1].

        Raises:
            ConfigError: Pixels of the first batch are outside the range, or span almost none of it.
        """
        images = restore_pixels(inputs, data_preprocessor, (self.low, self.high))
        if not self.is_checked:
            self._check_pixel_range(images)
        return images.clamp_(0, 1)

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ConfigError` if the images can't be restored from the model's inputs."""
        preprocessor = getattr(model, 'data_preprocessor', None)
        name = type(preprocessor).__name__
        if not hasattr(preprocessor, '_enable_normalize'):
            raise ConfigError(
                f'{name} does not expose how it normalises images (mean, std), so a local head cannot reconstruct them: use '
                'the data preprocessor of mmdet, mmseg or mmpretrain, or a head without reconstruction'
            )
        if not preprocessor._enable_normalize:
            return
        counts = preprocessor.mean.numel(), preprocessor.std.numel()
        if not {*counts} <= {1, self.channels}:
            raise ConfigError(
                f'data_preprocessor.mean has {counts[0]} values and std {counts[1]}, but the backbone takes images of '
                f'{self.channels} channels: set one value per channel, or one for all'
            )
        if not preprocessor.std.is_meta and not preprocessor.std.all():
            raise ConfigError('data_preprocessor.std contains a zero, so images cannot be divided by it: set positive values')

    def _check_pixel_range(self, images: Tensor) -> None:
        """Check a sample of the pixels of every image, by channel. A channel with a single value is skipped."""
        rows, columns = (max(1, side // CHECKED_PIXELS_PER_SIDE) for side in images.shape[-2:])
        samples = images.detach()[..., ::rows, ::columns].transpose(0, 1).flatten(1)  # (channels, pixels)
        is_blank = samples.amin(1) == samples.amax(1)
        outside = ((samples < -ROUNDING) | (samples > 1 + ROUNDING)).float().mean(1)
        inside = samples.clamp(0, 1)
        is_wrong = ~is_blank & ((outside > MAX_OUTSIDE) | (inside.amax(1) - inside.amin(1) < MIN_SPREAD))
        if (~is_wrong).all():
            self.is_checked = bool((~is_blank).any())
            return
        bad = int(is_wrong.nonzero()[0, 0])
        span = self.high - self.low
        low, high = (float(value) * span + self.low for value in (samples[bad].min(), samples[bad].max()))
        raise ConfigError(
            f'local_head.pixel_range=({self.low:g}, {self.high:g}) does not fit the images: channel {bad} of the first batch '
            f'has values from {low:.4g} to {high:.4g}, so the reconstruction target is almost constant. Set it to the lowest '
            'and the highest value in the images that the data preprocessor receives, e.g. (0, 255) for 8 bits, (0, 65535) for '
            '16 bits, (0, 1) for fractions, and scale channels of different ranges to one range in the data pipeline'
        )


def restore_pixels(inputs: Tensor, data_preprocessor: nn.Module, pixel_range: tuple[float, float] = (0, 255)) -> Tensor:
    """Restore the images before the data preprocessor, with ``pixel_range`` mapped to [0, 1] and no clamping.

    Args:
        inputs: (B, C, H0, W0).

    Returns:
        Shaped as ``inputs``, in newly allocated memory.
    """
    low, high = pixel_range
    if not data_preprocessor._enable_normalize:
        return (inputs - low) / (high - low) if low else inputs / (high - low)
    images = (inputs * data_preprocessor.std).add_(data_preprocessor.mean)
    return (images.sub_(low) if low else images).div_(high - low)


def reconstruction_loss(logits: Tensor, images: Tensor, data_samples: list) -> Tensor:
    """Binary cross entropy of reconstructed pixels, averaged over the images without the padding that collating added.

    Args:
        logits: (B, C, H0, W0).
        images: (B, C, H0, W0), in [0, 1].
        data_samples: Their data samples; ``img_shape`` is the size without padding, at the top left.

    Returns:
        A scalar.
    """
    whole = tuple(images.shape[-2:])
    sizes = [tuple(sample.metainfo.get('img_shape', whole))[:2] for sample in data_samples]
    if all(size == whole for size in sizes):
        return F.binary_cross_entropy_with_logits(logits.float(), images)
    rows, columns = (
        torch.arange(size, device=images.device) < torch.tensor(valid, device=images.device)[:, None]
        for size, valid in zip(whole, zip(*sizes, strict=True), strict=True)
    )
    mask = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.dtype)
    total = F.binary_cross_entropy_with_logits(logits.float(), images, mask, reduction='sum')
    return total / (images.shape[1] * mask.sum())
