"""Linear CKA between the features of two networks, accumulated over minibatches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmman.errors import ConfigError

MIN_BATCH = 4
"""Images that a batch needs: the unbiased estimator of HSIC divides by n - 3."""


class MinibatchCKA:
    """Linear CKA between every layer of one network and every layer of another (Nguyen et al. 2021, Eq. 3).

    ``CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) * mean HSIC(L, L))`` with ``K = X X^T`` and ``L = Y Y^T``. X and Y are the
    features of a batch, one row an image, and the means are over batches. HSIC is the unbiased estimator of Song et al. (2012,
    Eq. 5), so the value doesn't depend on the batch size, up to noise. CKA is 1 if X and Y are equal up to a rotation and a
    factor. For unrelated features it is near 0, and may be slightly negative.
    """

    def __init__(self) -> None:
        self._cross: Tensor | float = 0.0
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add a batch.

        Args:
            first: Features of the first network by layer, each (n, ...): the same n images for all, n >= 4.
            second: Features of the second network on the same images, in the same order of images.

        Raises:
            ConfigError: The batch has fewer than four images, or features are of different numbers of images.
        """
        self.update_grams(*([u_centred_gram(x) for x in features] for features in (first, second)))

    def update_grams(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add a batch, as :meth:`update` does, of which :func:`u_centred_gram` was taken already: (n, n) for each layer."""
        sizes = {len(gram) for gram in (*first, *second)}
        if len(sizes) != 1 or min(sizes) < MIN_BATCH:
            raise ConfigError(f'CKA needs the same images for all layers, at least {MIN_BATCH} a batch, not {sorted(sizes)}')
        n = sizes.pop()
        grams, others = (torch.stack([gram.flatten() for gram in own]) for own in (first, second))
        count = n * (n - 3)
        self._cross += grams @ others.T / count
        self._first += grams.square().sum(1) / count
        self._second += others.square().sum(1) / count

    def value(self) -> Tensor:
        """CKA of each pair of layers, (layers of the first, layers of the second), float64. NaN for constant features.

        Raises:
            ConfigError: No batch was added.
        """
        if isinstance(self._cross, float):
            raise ConfigError('CKA needs at least one batch')
        return self._cross / (self._first[:, None] * self._second[None]).sqrt()


def u_centred_gram(features: Tensor) -> Tensor:
    """The U-centred Gram matrix (Székely and Rizzo 2014, Eq. 2.6) of features (n, ...), n >= 3: (n, n) float64 on the CPU.

    The sum of the elementwise product of two such matrices, divided by n (n - 3), is the unbiased HSIC of Song et al. Adding
    a constant vector to all rows doesn't change it. Rows are centred first, which only makes rounding errors smaller.
    """
    x = features.flatten(1)
    x = x - x.mean(0)
    gram = (x @ x.T).cpu().double()
    n = len(gram)
    gram.fill_diagonal_(0)
    rows = gram.sum(1) / (n - 2)
    gram += rows.sum() / (n - 1) - rows[:, None] - rows[None]
    return gram.fill_diagonal_(0)
