"""PredSim: a linear classifier with a similarity matching loss."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmman.heads.cls import ClsLocalHead
from mmman.local.local_head import INJECTED_ARGS, Boundary
from mmman.local.transfer import MomentumTransfer
from mmman.options import Count, Range, checked
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class PredSimLocalHead(ClsLocalHead):
    """The ``predsim`` head of Nokland and Eidnes, "Training Neural Networks with Local Error Signals" (2019).

    ``(1 - beta) * cross entropy of a linear classifier + beta * mean (S(conv(y)) - S(labels))^2``. S is the matrix of cosine
    similarities between the batch's images. For conv(y) it compares the spatial standard deviation of each channel, or the
    value itself on a map of one pixel.

    Args:
        beta: Share of the similarity matching, from 0 to 1.
        max_features: Maximum number of inputs of the linear classifier, as far as one for each channel. The map is pooled by
            halving its height and its width in turn, as in the authors' code: 8x16 at 16 channels, 8x8 at 32, 4x8 at 64.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.
    """

    supports_channel_bias = True

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        beta: Annotated[float, Range(0, 1)] = 0.99,
        max_features: Count = 2048,
        loss_weight: float = 1.0,
    ) -> None:
        height, width = _pooled_size(boundary.channels, max_features)
        super().__init__(boundary, transfer, head, boundary.channels * height * width, loss_weight)
        self.pool_size = height, width
        self.beta = beta
        self.similarity = nn.Conv2d(boundary.channels, boundary.channels, 3, padding=1, bias=False)

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.as_map(y, inputs), self.pool_size).flatten(1)

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """``loss_pred`` and ``loss_sim``, weighted; arguments as in :meth:`LocalHead.loss`."""
        prediction = self.head.loss((self.embed(y, inputs),), data_samples)['loss']
        pixels = self.similarity(self.as_map(y, inputs)).flatten(2).float()
        features = pixels.std(dim=2) if pixels.shape[2] > 1 else pixels[:, :, 0]
        matching = F.mse_loss(similarity_matrix(features), similarity_matrix(self._targets(data_samples)))
        return {'loss_pred': (1 - self.beta) * prediction, 'loss_sim': self.beta * matching}

    def _targets(self, data_samples: list) -> Tensor:
        """Class scores, (B, num_classes): one for each label of an image, or the mixed scores of Mixup."""
        if 'gt_score' in data_samples[0]:
            return torch.stack([sample.gt_score for sample in data_samples]).float()
        labels = [sample.gt_label for sample in data_samples]
        if all(len(label) == 1 for label in labels):
            return F.one_hot(torch.cat(labels), self.num_classes).float()
        return torch.stack([F.one_hot(label, self.num_classes).sum(0) for label in labels]).float()


def _pooled_size(channels: int, max_features: int) -> tuple[int, int]:
    """Height and width that halving the height and the width in turn ends at, from any larger power of two."""
    halvings = max(1, max_features // channels).bit_length() - 1
    return 2 ** (halvings // 2), 2 ** (halvings - halvings // 2)


def similarity_matrix(features: Tensor) -> Tensor:
    """Cosine similarities (B, B) between the centred rows of (B, D)."""
    centred = F.normalize(features - features.mean(1, keepdim=True), dim=1, eps=1e-8)
    return centred @ centred.T
