"""Losses of mmdet's dense heads for some images of a batch, normalised by the whole batch.

There is one adapter for each way of computing losses (``loss_by_feat``), written for mmdet 3.3. The normalisers don't depend on
predictions, so they are known before the head runs: targets are computed once for the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.memory.detection.anchor_targets import compute_targets
from mmman.memory.detection.focal_loss import summed_focal_loss
from mmman.memory.detection.packed_head import PackedHead, can_pack

Sizes = list[tuple[int, int]]
Outputs = tuple[list[Tensor], ...]
"""Outputs of a dense head: scores, boxes, and for some heads centerness, each a list of maps (B, C, H, W) by level."""

ALL_IMAGES = slice(None)
MMDET_VERSION = '3.3'


class BatchLoss:
    """The losses of a dense head for images of one batch.

    Args:
        head: The dense head.
        sizes: Height and width of its feature maps, by level.
        data_samples: All data samples of the batch.
        like: A tensor with the device and dtype of the head's outputs.
    """

    def __init__(self, head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> None:
        raise NotImplementedError

    def __call__(self, outputs: Outputs, images: slice = ALL_IMAGES) -> dict[str, Tensor | list[Tensor]]:
        """Compute the losses by name.

        Args:
            outputs: The head's outputs for these images.
            images: Which images of the batch they are.
        """
        raise NotImplementedError


class AnchorLoss(BatchLoss):
    """Follows ``AnchorHead.loss_by_feat``: RetinaNet's head and those derived from it."""

    def __init__(self, head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> None:
        self.head = head
        self.anchors, self.targets, self.avg_factor = compute_targets(head, sizes, data_samples, like.device)

    def __call__(self, outputs: Outputs, images: slice = ALL_IMAGES) -> dict[str, Tensor | list[Tensor]]:
        targets = zip(*self.targets, strict=True)
        levels = zip(*outputs, targets, strict=True)
        losses = [
            self.level_losses(i, scores, boxes, images, [target[images] for target in own])
            for i, (scores, boxes, own) in enumerate(levels)
        ]
        return {name: list(values) for name, values in zip(('loss_cls', 'loss_bbox'), zip(*losses, strict=True), strict=True)}

    def level_losses(
        self, level: int, scores: Tensor, boxes: Tensor, images: slice, targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Class and box loss of one level, computed as in ``AnchorHead.loss_by_feat_single``."""
        anchors = torch.stack([own[level] for own in self.anchors[images]])
        return self.head.loss_by_feat_single(scores, boxes, anchors, *targets, avg_factor=self.avg_factor)


class SummedAnchorLoss(AnchorLoss):
    """An :class:`AnchorLoss` whose focal loss is summed as it is computed, so that no map of losses is kept."""

    def pack_(self, packed: PackedHead) -> None:
        """Compute the losses of the outputs of a packed head from now on. The head must be one of :func:`packed_head`."""
        labels, *others = self.targets
        self.targets = [
            packed.pack_targets(labels, self.head.num_classes),
            *(packed.pack_targets(target, 0) for target in others),
        ]

    def level_losses(
        self, level: int, scores: Tensor, boxes: Tensor, images: slice, targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        head = self.head
        if not _reads_no_anchors(head):
            return super().level_losses(level, scores, boxes, images, targets)
        labels, label_weights, box_targets, box_weights = targets
        scores = scores.permute(0, 2, 3, 1).reshape(-1, head.cls_out_channels)
        class_loss = self.class_loss(scores, labels.reshape(-1), label_weights.reshape(-1))
        width = box_targets.shape[-1]
        box_targets, box_weights = box_targets.reshape(-1, width), box_weights.reshape(-1, width)
        boxes = boxes.permute(0, 2, 3, 1).reshape(-1, head.bbox_coder.encode_size)
        return class_loss, self.box_loss(boxes, box_targets, box_weights)

    def class_loss(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return summed_focal_loss(self.head.loss_cls, scores, labels, weights, avg_factor=self.avg_factor)

    def box_loss(self, boxes: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return self.head.loss_bbox(boxes, targets, weights, avg_factor=self.avg_factor)


class ATSSLoss(BatchLoss):
    """Follows ``ATSSHead.loss_by_feat``, with a focal loss that is summed as it is computed."""

    def __init__(self, head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> None:
        from mmdet.models.utils import unpack_gt_instances
        from mmdet.utils import reduce_mean

        self.head = head
        instances, ignored, metas = unpack_gt_instances(data_samples)
        anchors, flags = head.get_anchors(sizes, metas, device=like.device)
        *targets, count = head.get_targets(anchors, flags, instances, metas, batch_gt_instances_ignore=ignored)
        self.anchors, self.labels, self.label_weights, self.boxes = targets[:4]
        self.avg_factor = reduce_mean(torch.tensor(count, dtype=torch.float, device=like.device)).item()
        levels = zip(self.anchors, self.labels, self.boxes, strict=True)
        total = sum(self._centerness(*(part.flatten(0, 1) for part in level))[1].sum() for level in levels)
        self.box_factor = reduce_mean(total).clamp_(min=1).item()

    def _centerness(self, anchors: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the positive anchors among (A, 4), and their target centerness."""
        positive = ((labels >= 0) & (labels < self.head.num_classes)).nonzero().squeeze(1)
        if len(positive) == 0:
            return positive, boxes.new_tensor(0.0)
        return positive, self.head.centerness_target(anchors[positive], boxes[positive])

    def __call__(self, outputs: Outputs, images: slice = ALL_IMAGES) -> dict[str, Tensor | list[Tensor]]:
        targets = zip(self.anchors, self.labels, self.label_weights, self.boxes, strict=True)
        losses = [
            self._level(*feature_maps, *(part[images].flatten(0, 1) for part in own))
            for feature_maps, own in zip(zip(*outputs, strict=True), targets, strict=True)
        ]
        classes, boxes, centerness = (list(values) for values in zip(*losses, strict=True))
        boxes = [loss / self.box_factor for loss in boxes]
        return {'loss_cls': classes, 'loss_bbox': boxes, 'loss_centerness': centerness}

    def _level(
        self,
        scores: Tensor,
        boxes: Tensor,
        centerness: Tensor,
        anchors: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        box_targets: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of one level, the box loss not yet divided, computed as in ``ATSSHead.loss_by_feat_single``."""
        head = self.head
        scores = scores.permute(0, 2, 3, 1).reshape(-1, head.cls_out_channels).contiguous()
        boxes = boxes.permute(0, 2, 3, 1).reshape(-1, 4)
        centerness = centerness.permute(0, 2, 3, 1).reshape(-1)
        class_loss = summed_focal_loss(head.loss_cls, scores, labels, label_weights, avg_factor=self.avg_factor)
        positive, target = self._centerness(anchors, labels, box_targets)
        if len(positive) == 0:
            return class_loss, boxes.sum() * 0, centerness.sum() * 0
        decoded = head.bbox_coder.decode(anchors[positive], boxes[positive])
        box_loss = head.loss_bbox(decoded, box_targets[positive], weight=target, avg_factor=1.0)
        return class_loss, box_loss, head.loss_centerness(centerness[positive], target, avg_factor=self.avg_factor)


class FCOSLoss(BatchLoss):
    """Follows ``FCOSHead.loss_by_feat``, with a focal loss that is summed as it is computed."""

    def __init__(self, head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> None:
        from mmdet.models.utils import unpack_gt_instances
        from mmdet.utils import reduce_mean

        self.head = head
        instances, _, _ = unpack_gt_instances(data_samples)
        boxes = like.new_empty(0).float()  # the head's boxes are float32, also under autocast
        self.points = head.prior_generator.grid_priors(sizes, dtype=boxes.dtype, device=like.device)
        labels, boxes = head.get_targets(self.points, instances)
        count = len(data_samples)
        self.labels = [own.view(count, -1) for own in labels]
        self.boxes = [own.view(count, -1, 4) for own in boxes]
        labels, boxes = torch.cat(labels), torch.cat(boxes)
        positive = self._positive(labels)
        self.num_positive = max(reduce_mean(torch.tensor(len(positive), dtype=torch.float, device=like.device)), 1.0)
        self.box_factor = max(reduce_mean(head.centerness_target(boxes[positive]).sum()), 1e-6)

    def _positive(self, labels: Tensor) -> Tensor:
        return ((labels >= 0) & (labels < self.head.num_classes)).nonzero().reshape(-1)

    def __call__(self, outputs: Outputs, images: slice = ALL_IMAGES) -> dict[str, Tensor | list[Tensor]]:
        head, (scores, boxes, centerness) = self.head, outputs
        count = len(scores[0])
        scores = torch.cat([own.permute(0, 2, 3, 1).reshape(-1, head.cls_out_channels) for own in scores])
        boxes = torch.cat([own.permute(0, 2, 3, 1).reshape(-1, 4) for own in boxes])
        centerness = torch.cat([own.permute(0, 2, 3, 1).reshape(-1) for own in centerness])
        labels = torch.cat([own[images].reshape(-1) for own in self.labels])
        targets = torch.cat([own[images].reshape(-1, 4) for own in self.boxes])
        points = torch.cat([own.repeat(count, 1) for own in self.points])
        losses = {'loss_cls': summed_focal_loss(head.loss_cls, scores, labels, avg_factor=self.num_positive)}
        if getattr(head.loss_cls, 'custom_accuracy', False):
            losses |= head.loss_cls.get_accuracy(scores, labels)
        positive = self._positive(labels)
        boxes, centerness, targets = boxes[positive], centerness[positive], targets[positive]
        if len(positive) == 0:
            return losses | {'loss_bbox': boxes.sum(), 'loss_centerness': centerness.sum()}
        target = head.centerness_target(targets)
        decoded, goal = (head.bbox_coder.decode(points[positive], own) for own in (boxes, targets))
        return losses | {
            'loss_bbox': head.loss_bbox(decoded, goal, weight=target, avg_factor=self.box_factor),
            'loss_centerness': head.loss_centerness(centerness, target, avg_factor=self.num_positive),
        }


_ADAPTERS: dict[str, type[BatchLoss]] = {'AnchorHead': SummedAnchorLoss, 'ATSSHead': ATSSLoss, 'FCOSHead': FCOSLoss}
"""Adapters by the name of the mmdet class that defines ``loss_by_feat``."""


def batch_loss(head: nn.Module, sizes: Sizes, data_samples: list, like: Tensor) -> BatchLoss:
    """Make the losses of a dense head that :func:`has_adapter` accepts. Takes the arguments of :class:`BatchLoss`."""
    return _adapter_class(type(head))(head, sizes, data_samples, like)


def has_adapter(head: nn.Module) -> bool:
    """Whether the losses of a dense head can be computed for a few images at a time as those of the whole batch.

    Raises:
        ConfigError: They could, but the installed mmdet isn't the version that the adapters are written for.
    """
    return _adapter_class(type(head)) is not None


def packed_head(head: nn.Module, sizes: Sizes, device: torch.device) -> PackedHead | None:
    """Pack the levels of a dense head that :func:`has_adapter` accepts; None if that isn't possible, or brings nothing.

    Args:
        head: The dense head.
        sizes: Height and width of its feature maps, by level.
        device: Device of the feature maps.
    """
    fits = len(sizes) > 2 and _adapter_class(type(head)) is SummedAnchorLoss and _reads_no_anchors(head) and can_pack(head)
    return PackedHead(head, sizes, device) if fits else None


def _reads_no_anchors(head: nn.Module) -> bool:
    """Whether the losses of an anchor-based head are computed from its outputs and targets alone."""
    return not head.reg_decoded_bbox and _is_stock(type(head), 'loss_by_feat_single', 'AnchorHead')


def check_norms(name: str, modules: Sequence[nn.Module]) -> None:
    """Raise :class:`ConfigError` if a layer mixes the images of a batch.

    Args:
        name: What to call the modules.
        modules: All modules that would run on a few images at a time.
    """
    for module in modules:
        for path, part in module.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                raise ConfigError(
                    f'{name} has BatchNorm in training mode behind the backbone ({type(module).__name__}'
                    f'{path and "."}{path}), which mixes the images of a batch: set optim_wrapper.images_per_chunk=None, or '
                    'use GroupNorm'
                )


def dense_head_losses(
    head: nn.Module | PackedHead, feature_maps: Sequence[Tensor], make_loss: Callable[[Sizes, Tensor], BatchLoss]
) -> dict[str, Tensor | list[Tensor]]:
    """The losses of a whole batch in one pass. Targets are computed after the head has run, as in mmdet."""
    outputs = head(feature_maps)
    return make_loss(map_sizes(feature_maps), outputs[0][0])(outputs)


def map_sizes(feature_maps: Sequence[Tensor]) -> Sizes:
    """Height and width of each feature map."""
    return [(*level.shape[-2:],) for level in feature_maps]


@cache
def _adapter_class(head_class: type[nn.Module]) -> type[BatchLoss] | None:
    owner = next((cls for cls in head_class.__mro__ if 'loss_by_feat' in vars(cls)), head_class)
    if not owner.__module__.startswith('mmdet.models.dense_heads.') or owner.__name__ not in _ADAPTERS:
        return None
    import mmdet

    if not mmdet.__version__.startswith(f'{MMDET_VERSION}.'):
        raise ConfigError(
            f'images_per_chunk requires mmdet {MMDET_VERSION}, but mmdet {mmdet.__version__} is installed: install '
            f'{MMDET_VERSION}, or set optim_wrapper.images_per_chunk=None'
        )
    # SummedAnchorLoss calls the head's own loss_by_feat_single if the head has one; the other adapters don't.
    methods = ('loss',) if owner.__name__ == 'AnchorHead' else ('loss', 'loss_by_feat_single')
    if not all(_is_stock(head_class, name, owner.__name__) for name in methods):
        return None
    return _ADAPTERS[owner.__name__]


@cache
def _is_stock(head_class: type[nn.Module], name: str, owner: str) -> bool:
    """Whether a head inherits a method from the mmdet class ``owner``, or from a base class of ``owner``."""
    stock = next(cls for cls in head_class.__mro__ if cls.__name__ == owner)
    return getattr(head_class, name, None) is getattr(stock, name, None)
