"""Random crops and flips of a whole batch in one operation, on the device of the model."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS as ALL_MODELS
from torch import Tensor

from mmman.registry import MODELS


@MODELS.register_module()
class BatchCropFlip(BaseDataPreprocessor):
    """A data preprocessor that crops and flips every training image at random, and then runs another data preprocessor.

    It equals the transforms ``RandomCrop`` (with zero padding, to the size of the image) and ``RandomFlip`` of mmpretrain, but
    takes one operation a batch instead of several an image. Random numbers come from the generator of the model's device,
    which mmman's train loops seed for every iteration, so a resumed run draws what an uninterrupted one draws.

    Args:
        preprocessor: Config of the data preprocessor that normalises the batch, of any library.
        padding: Width of the border of zeros, pixels.
        flip_prob: Probability of a horizontal flip.
        **options: Options that a model adds to its data preprocessor, passed on to ``preprocessor``. Its own take precedence.

    All other attributes, such as ``mean`` and ``std``, are read from the wrapped preprocessor.
    """

    def __init__(self, preprocessor: dict, padding: int = 4, flip_prob: float = 0.5, **options) -> None:
        super().__init__()
        self.preprocessor = ALL_MODELS.build({**options, **preprocessor})
        self.padding, self.flip_prob = padding, flip_prob

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('preprocessor'), name)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Augment a batch if ``training``, and preprocess it.

        Args:
            data: A batch whose ``inputs`` are (B, C, H, W), uint8.
            training: Whether to augment.

        Raises:
            ValueError: ``inputs`` are a list of images.
        """
        data = self.cast_data(data)
        if training:
            if not isinstance(data['inputs'], Tensor):
                raise ValueError("BatchCropFlip needs images in one tensor: set collate_fn=dict(type='default_collate')")
            images = data['inputs']
            count, device = len(images), images.device
            top, left = torch.randint(2 * self.padding + 1, (2, count), device=device)
            flip = torch.rand(count, device=device) < self.flip_prob
            data = {**data, 'inputs': crop_and_flip(images, top, left, flip, self.padding)}
        return self.preprocessor(data, training)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pad images by zeros, crop each to its former size, and flip some crops horizontally.

    Args:
        images: (B, C, H, W), any dtype.
        top, left: Corner of each crop in the padded image, (B,), int64, from 0 to ``2 * padding``.
        flip: Which crops to flip, (B,), bool.
        padding: Width of the border, pixels.

    Returns:
        The crops, (B, C, H, W), contiguous.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(1), columns)
    batch = torch.arange(count, device=images.device)
    crops = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()
