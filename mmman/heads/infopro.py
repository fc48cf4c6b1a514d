"""InfoPro: a local classifier or a supervised contrastive loss, with a reconstruction of the image."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.cls import ClsLocalHead
from mmman.heads.layers import conv_bn_relu
from mmman.heads.reconstruction import ReconstructionDecoder, ReconstructionTarget, reconstruction_loss
from mmman.local.local_head import INJECTED_ARGS, Boundary
from mmman.local.transfer import MomentumTransfer
from mmman.options import NonNegative, Positive, checked
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class InfoProLocalHead(ClsLocalHead):
    """The local head of information propagation (Wang et al., "Revisiting Locally Supervised Learning", 2021).

    ``lambda_rec * BCE(reconstruction, image) + lambda_task * (cross entropy or supervised contrast)``.

    Args:
        classifier: ``'1c2f'``, for small images: a 3x3 convolution to min(2C, 64) channels, of stride 2 if these are more than
            C, pooling, a linear layer to 128. ``'2c2f'``: the same with a second 3x3 convolution, as MAN++'s code has by
            default. ``'imagenet'``: 1x1 to C/4, 3x3 of stride 2 to 256 and to 512, 1x1 to 2048, pooling. The option also
            selects the decoder.
        lambda_rec: Weight of the reconstruction: a number, or a pair (first, last) for a weight that depends on the stage; see
            :meth:`mmman.local.Boundary.interpolate`.
        lambda_task: Weight of the classification or contrast, in the same format.
        contrast: Whether to use supervised contrast instead of classification. It needs hard labels.
        temperature: Temperature of the contrast.
        pixel_range: The lowest and the highest value of a pixel in the images that the data preprocessor gets; see
            :class:`mmman.heads.reconstruction.ReconstructionTarget`.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.
    """

    uses_images = True

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        classifier: Literal['1c2f', '2c2f', 'imagenet'] = '1c2f',
        lambda_rec: NonNegative | tuple[NonNegative, NonNegative] = 5.0,
        lambda_task: NonNegative | tuple[NonNegative, NonNegative] = 0.75,
        contrast: bool = False,
        temperature: Positive = 0.07,
        pixel_range: tuple[float, float] = (0, 255),
        loss_weight: float = 1.0,
    ) -> None:
        is_small = classifier != 'imagenet'
        super().__init__(boundary, transfer, head, 128 if is_small else 2048, loss_weight)
        channels = boundary.channels
        if is_small:
            width = min(2 * channels, 64)
            self.convs = conv_bn_relu(channels, width, 3, stride=2 if width > channels else 1)
            if classifier == '2c2f':
                self.convs.extend(conv_bn_relu(width, width, 3))
            self.fc = nn.Sequential(nn.Linear(width, 128), nn.ReLU(inplace=True))
        else:
            self.convs = nn.Sequential(
                conv_bn_relu(channels, channels // 4, 1),
                conv_bn_relu(channels // 4, 256, 3, stride=2),
                conv_bn_relu(256, 512, 3, stride=2),
                conv_bn_relu(512, 2048, 1),
            )
            self.fc = nn.Identity()
        self.decoder = ReconstructionDecoder(channels, boundary.stride, not is_small, boundary.image_channels)
        self.target = ReconstructionTarget(pixel_range, boundary.image_channels)
        self.lambda_rec = boundary.interpolate(lambda_rec)
        self.lambda_task = boundary.interpolate(lambda_task)
        if not (self.lambda_rec or self.lambda_task):
            print_log(
                f'lambda_rec and lambda_task are 0 at block {self.block}, so no loss trains it', logger='current', level=30
            )
        self.temperature = temperature
        self.contrast = None
        if contrast:
            self.contrast = nn.Linear(128 if is_small else 2048, 128)
            del self.head

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        return self.fc(self.convs(self.as_map(y, inputs)).mean((2, 3)))

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """``loss_rec`` and ``loss_task``, weighted; arguments as in :meth:`LocalHead.loss`."""
        logits = self.decoder(self.as_map(y, inputs), inputs.shape[-2:])
        images = self.target(inputs, self.session.model.data_preprocessor)
        features = self.embed(y, inputs)
        if self.contrast is None:
            task = self.head.loss((features,), data_samples)['loss']
        else:
            task = supervised_contrast(self.contrast(features), _hard_labels(data_samples), self.temperature)
        return {
            'loss_rec': self.lambda_rec * reconstruction_loss(logits, images, data_samples),
            'loss_task': self.lambda_task * task,
        }

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ConfigError` if the classes differ, or the images can't be restored."""
        super().check_model(model)
        self.target.check_model(model)


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020, L_out) over one view of each image of the batch.

    Args:
        features: (B, D). They are normalised in this function.
        labels: Class indices, (B,).
        temperature: Divides the cosine similarities.

    Returns:
        A scalar: the mean over all images whose class has another image in the batch; 0 if there are none.
    """
    features = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (features @ features.T / temperature).masked_fill(itself, -torch.inf)
    positives = (labels[:, None] == labels) & ~itself
    log_prob = similarity - similarity.logsumexp(1, keepdim=True)
    counts = positives.sum(1)
    per_image = -log_prob.masked_fill(~positives, 0).sum(1) / counts.clamp(min=1)
    return per_image.sum() / (counts > 0).sum().clamp(min=1)


def _hard_labels(data_samples: list) -> Tensor:
    labels = [] if 'gt_score' in data_samples[0] else [sample.gt_label for sample in data_samples]
    if not labels or any(len(label) != 1 for label in labels):
        raise ConfigError(
            'supervised contrast requires one label per image: remove the batch augmentation (Mixup, CutMix), or, if images '
            'have several labels, set contrast=False'
        )
    return torch.cat(labels)
