"""Linear separability of features: the accuracy of a linear classifier on the frozen output of a unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmman.errors import ConfigError
from mmman.partition import Feature

PIXELS = 64
"""Positions that are taken of each image of a segmentor."""


@dataclass(frozen=True)
class Samples:
    """What is to be classified in a batch: images, objects or pixels.

    Attributes:
        labels: Classes, (N,) int64.
        images: Index of each sample's image in the batch, (N,) int64.
        boxes: Where the sample is, (N, 4) as x1, y1, x2, y2 in pixels of the model's input. None: the whole image.
    """

    labels: Tensor
    images: Tensor
    boxes: Tensor | None = None

    def pool(self, x: Tensor, feature: Feature, size: tuple[int, int]) -> Tensor:
        """The mean of a unit's output over each sample, (N, C).

        Args:
            x: The output, (B, C, H, W) or (B, L, C). Of tokens, a whole image is its class token, if there is one.
            feature: Its shape.
            size: Height and width of the model's input, pixels.
        """
        if self.boxes is None:
            return feature.pool(x)[self.images]
        from mmcv.ops import roi_align

        x = feature.as_map(x, size)
        rois = torch.cat([self.images[:, None].to(self.boxes), self.boxes], 1).to(x)
        return roi_align(x, rois, (1, 1), x.shape[-1] / size[1], 0, 'avg', True).flatten(1)


def samples_of(data_samples: Sequence | Tensor, boxes_are_scaled: bool = True, seed: int = 0) -> Samples:
    """The labelled samples of a batch: one an image for a classifier, the objects of a detector, and pixels of a segmentor.

    Args:
        data_samples: Data samples of mmdet, mmseg or mmpretrain, or labels (B,).
        boxes_are_scaled: Whether boxes are in pixels of the model's input. False: in those of the image file, as in pipelines
            that load annotations after resizing.
        seed: Seed of the positions that are drawn in images of a segmentor.

    Raises:
        ConfigError: An image has no such labels.
    """
    if isinstance(data_samples, Tensor):
        return Samples(data_samples, torch.arange(len(data_samples)))
    labels, boxes, images = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for i, sample in enumerate(data_samples):
        if 'gt_instances' in sample:
            own, own_boxes = sample.gt_instances.labels, sample.gt_instances.bboxes
            if not boxes_are_scaled:
                own_boxes = own_boxes * own_boxes.new_tensor(sample.scale_factor * 2)
            boxes.append(own_boxes)
        elif 'gt_sem_seg' in sample:
            own, own_boxes = _pixels(sample, generator)
            boxes.append(own_boxes)
        elif getattr(sample, 'gt_label', None) is not None and sample.gt_label.numel() == 1:
            own = sample.gt_label.reshape(1)
        else:
            raise ConfigError(
                'a linear probe needs a class of each image, object or pixel, which this data has not: give a model whose '
                'val_dataloader loads gt_label (one class), gt_instances or gt_sem_seg'
            )
        labels.append(own)
        images.append(torch.full_like(own, i))
    return Samples(torch.cat(labels), torch.cat(images), torch.cat(boxes) if boxes else None)


def loads_boxes_after_resize(pipeline: Iterable[Mapping]) -> bool:
    """Whether a pipeline's config loads annotations after it resized the image: boxes are then those of the image file."""
    names = [*_transforms(pipeline)]
    resize = next((i for i, name in enumerate(names) if 'Resize' in name), len(names))
    return 'LoadAnnotations' in names[resize:]


def _transforms(pipeline: Iterable[Mapping]) -> Iterable[str]:
    for transform in pipeline:
        kind = transform['type']
        yield kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__
        inner = transform.get('transforms') or ()
        yield from _transforms(one for one in inner if isinstance(one, Mapping))


def _pixels(sample: object, generator: torch.Generator, ignored: int = 255) -> tuple[Tensor, Tensor]:
    """Labels and boxes of at most :data:`PIXELS` labelled pixels of a segmentation. Boxes are in pixels of the input."""
    mask = sample.gt_sem_seg.data[0]
    positions = (mask != ignored).nonzero()
    positions = positions[torch.randperm(len(positions), generator=generator)[:PIXELS].to(positions.device)]
    y, x = positions.T
    scale = [own / given for own, given in zip(sample.img_shape[:2], mask.shape, strict=True)]
    corners = torch.stack([x * scale[1], y * scale[0], (x + 1) * scale[1], (y + 1) * scale[0]], 1)
    return mask[y, x].long(), corners.float()


@dataclass(frozen=True)
class Separability:
    """How well a linear classifier separates samples that it wasn't fitted to.

    Attributes:
        accuracy: Share of samples that get their class, 0 to 1.
        balanced: Mean over the classes of the share of their samples, 0 to 1: with rare classes it tells more.
    """

    accuracy: float
    balanced: float


def separability(features: Tensor, labels: Tensor, images: Tensor, l2: float = 1e-3, seed: int = 0) -> Separability:
    """Fit a linear classifier to the samples of one half of the images, test it on the other half, and the other way round.

    The classifier is multinomial logistic regression on standardised features, fitted by L-BFGS in float64.

    Args:
        features: (N, C).
        labels: Classes, (N,).
        images: The image of each sample, (N,). Samples of one image are in the same half.
        l2: Weight of ``|W|^2 / 2`` beside the mean cross entropy, above 0.
        seed: Seed of the halves.

    Raises:
        ConfigError: There are fewer than two images, or fewer than two classes.
    """
    classes, labels = labels.unique(return_inverse=True)
    groups, group = images.unique(return_inverse=True)
    if len(classes) < 2 or len(groups) < 2:
        raise ConfigError(
            f'a linear probe needs at least 2 classes on 2 images, not {len(classes)} on {len(groups)}: raise --images'
        )
    generator = torch.Generator().manual_seed(seed)
    half = torch.randperm(len(groups), generator=generator)[group.cpu()] % 2 == 0
    x, labels = features.detach().cpu().double(), labels.cpu()
    right = torch.empty(len(labels), dtype=torch.bool)
    for fitted in (half, ~half):
        right[~fitted] = _fit(x[fitted], labels[fitted], len(classes), l2)(x[~fitted]).argmax(1) == labels[~fitted]
    recalls = [right[labels == k].double().mean() for k in range(len(classes))]
    return Separability(float(right.double().mean()), float(torch.stack(recalls).mean()))


def _fit(x: Tensor, labels: Tensor, classes: int, l2: float):
    """A function from features to logits."""
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    standardised = (x - mean) / std
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(standardised, weight, bias), labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return lambda other: F.linear((other - mean) / std, weight.detach(), bias.detach())
