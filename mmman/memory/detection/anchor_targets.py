"""Anchors and targets of an anchor-based dense head, computed for all images in one pass.

mmdet computes them per image and per object, with about 170 operators per image, dozens of which force a device-to-host sync;
and a step of local learning has a dense head for each block. The tensors computed here are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmman.errors import ConfigError

MAX_OVERLAPS = 2**20
"""Maximum size of a map of overlaps, (images, objects, anchors), computed in one pass; at least one image is."""

Matches = tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, Tensor]
"""The match of each anchor, (B, A), see :func:`_assign`; image and anchor index of the P positive anchors, (P,) each; their
labels, (P,), and box targets, (P, 4); and the number of positive anchors, at least one per image, a scalar."""


def compute_targets(
    head: nn.Module, sizes: list[tuple[int, int]], data_samples: list, device: torch.device | str
) -> tuple[list[list[Tensor]], list[list[Tensor]], float]:
    """Compute the anchors and targets of a dense head with the interface of mmdet's ``AnchorHead``.

    They are computed for all images in one pass if the head computes them as ``AnchorHead`` does, with a ``MaxIoUAssigner``, a
    ``PseudoSampler`` and a ``DeltaXYWHBBoxCoder`` with the options that RetinaNet uses. Otherwise the head itself computes
    them.

    Args:
        head: The dense head.
        sizes: Height and width of its feature maps, by level.
        data_samples: Data samples of the batch.
        device: Device of the targets.

    Returns:
        Anchors by image and level, (A, 4). Labels, (B, A), their weights, (B, A), box targets and their weights, (B, A, 4),
        each by level. The number that losses are divided by.
    """
    from mmdet.models.utils import unpack_gt_instances

    instances, ignored, metas = unpack_gt_instances(data_samples)
    if has_stock_targets(head):
        anchors, flags = _anchors(head, sizes, metas, device)
        *targets, factor = _targets(head, anchors, flags, instances)
    else:
        anchors, flags = head.get_anchors(sizes, metas, device=device)
        *targets, factor = head.get_targets(anchors, flags, instances, metas, batch_gt_instances_ignore=ignored)
    return anchors, targets, factor


def check_stock_targets(head: nn.Module | None, model: nn.Module) -> None:
    """Raise :class:`ConfigError` if the targets of a dense head of ``model`` can't be computed ahead of its losses."""
    if head is None or not has_stock_targets(head):
        raise ConfigError(
            f"cuda_graphs requires a detector whose own and local dense heads have targets like RetinaNet's (MaxIoUAssigner, "
            f'PseudoSampler, DeltaXYWHBBoxCoder), not {type(model).__name__} with '
            f'{"another local head" if head is None else type(head).__name__}: set optim_wrapper.cuda_graphs=False'
        )


def has_stock_targets(head: nn.Module) -> bool:
    """Whether the targets of a dense head are computed for all images in one pass."""
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.task_modules import BboxOverlaps2D, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler

    names = ('loss', 'loss_by_feat', 'get_anchors', 'get_targets', '_get_targets_single')
    if any(getattr(type(head), name, None) is not getattr(AnchorHead, name) for name in names):
        return False
    components = ((head.assigner, MaxIoUAssigner), (head.sampler, PseudoSampler), (head.bbox_coder, DeltaXYWHBBoxCoder))
    if any(type(part) is not kind for part, kind in components) or head.reg_decoded_bbox or head.prior_generator.use_box_type:
        return False
    assigner = head.assigner
    return (
        head.train_cfg['allowed_border'] < 0
        and type(assigner.iou_calculator) is BboxOverlaps2D
        and assigner.iou_calculator.dtype is None
        and isinstance(assigner.neg_iou_thr, float)
        and assigner.min_pos_iou >= 0
        and assigner.gt_max_assign_all
        and assigner.match_low_quality
        and assigner.ignore_iof_thr <= 0
        and assigner.gpu_assign_thr <= 0
        and assigner.perm_repeat_gt_cfg is None
    )


def _anchors(head: nn.Module, sizes: list[tuple[int, int]], metas: list[dict], device: torch.device | str) -> tuple:
    """Follows ``AnchorHead.get_anchors``; images padded to the same shape share their flags."""
    anchors = head.prior_generator.grid_priors(sizes, device=device)
    flags = {tuple(meta['pad_shape']): None for meta in metas}
    flags = {shape: head.prior_generator.valid_flags(sizes, shape, device) for shape in flags}
    return [anchors] * len(metas), [flags[tuple(meta['pad_shape'])] for meta in metas]


def _targets(
    head: nn.Module, anchors: list[list[Tensor]], flags: list[list[Tensor]], instances: list
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], int]:
    """Follows ``AnchorHead.get_targets``."""
    levels = [len(level) for level in anchors[0]]
    priors, valid = _concat_levels(anchors, flags)
    matches = _match_batch(head, priors, valid, instances)
    targets = torch.empty_like(matches[0]), priors.new_empty(valid.shape), *priors.new_empty(2, *valid.shape, 4)
    _write(head, matches, *targets)
    return *([*target.split(levels, dim=1)] for target in targets), int(matches[-1])


def _concat_levels(anchors: list[list[Tensor]], flags: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate levels: the anchors, (A, 4), and which of them are valid, (B, A)."""
    return torch.cat(anchors[0]), torch.stack([torch.cat(levels) for levels in flags])


class AnchorTargets:
    """Computes targets of a dense head that :func:`check_stock_targets` accepts, for feature maps of given sizes.

    Args:
        head: The dense head.
        sizes: Height and width of its feature maps, by level.
        gt_size_range: Objects to use: lower and upper bound of the square root of a box's area, in pixels. None: all.
        device: Device of the targets.
    """

    def __init__(
        self,
        head: nn.Module,
        sizes: list[tuple[int, int]],
        gt_size_range: tuple[float, float] | None,
        device: torch.device | str,
    ) -> None:
        self.head, self.sizes, self.gt_size_range, self.device = head, sizes, gt_size_range, device
        self._shapes: list[tuple[int, ...]] = []

    def match(self, data_samples: list) -> Matches:
        """Match the anchors of a batch. Forces a device-to-host sync."""
        metas = [sample.metainfo for sample in data_samples]
        shapes = [(*meta['pad_shape'],) for meta in metas]
        if shapes != self._shapes:
            self._priors, self._valid = _concat_levels(*_anchors(self.head, self.sizes, metas, self.device))
            self._shapes = shapes
        instances = [sample.gt_instances for sample in data_samples]
        return _match_batch(self.head, self._priors, self._valid, instances, self.gt_size_range)

    def write(self, matches: Matches, buffers: Sequence[Tensor]) -> None:
        """Write targets to the given memory, without a device-to-host sync.

        Args:
            matches: The result of :meth:`match`.
            buffers: Destination tensors: labels, (B, A) for A anchors on all levels, int64; their weights, (B, A); box targets
                and their weights, (B, A, 4); and the number of positive anchors, at least one per image, a scalar, int64.
        """
        *targets, factor = buffers
        _write(self.head, matches, *targets)
        factor.copy_(matches[-1])


def _match_batch(
    head: nn.Module, priors: Tensor, valid: Tensor, instances: list, gt_size_range: tuple[float, float] | None = None
) -> Matches:
    from mmdet.structures.bbox import get_box_tensor

    boxes = pad_sequence([get_box_tensor(instance.bboxes) for instance in instances], batch_first=True)
    labels = pad_sequence([instance.labels for instance in instances], batch_first=True)
    counts = torch.tensor([len(instance.bboxes) for instance in instances], device=priors.device)

    count, max_objects = boxes.shape[:2]
    is_used = torch.arange(max_objects, device=priors.device) < counts[:, None]
    if gt_size_range is not None:
        size = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt()
        is_used &= (size >= gt_size_range[0]) & (size <= gt_size_range[1])
    size = max(1, MAX_OVERLAPS // max(1, max_objects * len(priors)))
    spans = [slice(start, start + size) for start in range(0, count, size)]
    matched = torch.cat([_assign(head.assigner, boxes[s], is_used[s], priors, valid[s]) for s in spans])

    image, anchor = (matched > 0).nonzero(as_tuple=True)
    obj = matched[image, anchor] - 1
    deltas = head.bbox_coder.encode(priors[anchor], boxes[image, obj]) if len(image) else priors.new_empty(0, 4)
    factor = image.bincount(minlength=count).clamp(min=1).sum()
    return matched, (image, anchor), labels[image, obj], deltas, factor


def _write(
    head: nn.Module, matches: Matches, label: Tensor, label_weight: Tensor, box_target: Tensor, box_weight: Tensor
) -> None:
    matched, where, labels, deltas, _ = matches
    is_positive, weight = matched > 0, head.train_cfg['pos_weight']
    label.fill_(head.num_classes).index_put_(where, labels)
    label_weight.copy_(matched == 0).masked_fill_(is_positive, 1.0 if weight <= 0 else weight)
    box_target.zero_().index_put_(where, deltas)
    box_weight.copy_(is_positive[..., None].expand_as(box_weight))


def _assign(assigner: object, boxes: Tensor, is_used: Tensor, priors: Tensor, valid: Tensor) -> Tensor:
    """Match each anchor, (B, A): to an object, numbered from 1, to background, 0, or to nothing, -1.

    Args:
        assigner: A ``MaxIoUAssigner``.
        boxes: (B, G, 4).
        is_used: Whether an object takes part, (B, G).
        priors: (A, 4).
        valid: Whether an anchor takes part, (B, A).
    """
    max_objects = boxes.shape[1]
    if max_objects == 0:
        return valid.long() - 1
    number = torch.arange(1, max_objects + 1, device=boxes.device, dtype=torch.int32)
    is_used = is_used[..., None] & valid[:, None]
    overlaps = _overlaps(boxes, priors).masked_fill_(~is_used, -1)
    max_of_anchor, best_object = overlaps.max(dim=1)
    max_of_object = overlaps.amax(dim=2, keepdim=True)

    matched = torch.where(max_of_anchor < assigner.neg_iou_thr, 0, -1)
    matched = torch.where(max_of_anchor >= assigner.pos_iou_thr, best_object + 1, matched)
    best = (overlaps == max_of_object).logical_and_(max_of_object >= assigner.min_pos_iou).logical_and_(is_used)
    del overlaps
    forced_match = (best * number[:, None]).amax(dim=1)  # the last of several objects wins, as in mmdet's loop
    matched = torch.where(forced_match > 0, forced_match, matched)
    return matched.masked_fill_(~valid, -1)


def _overlaps(boxes: Tensor, priors: Tensor) -> Tensor:
    """The IoU of objects, (B, G, 4), and anchors, (A, 4): bitwise ``BboxOverlaps2D``, in a third of its memory. (B, G, A)."""

    def overlap(low: int) -> Tensor:
        """Overlap along a side, whose ends are the coordinates ``low`` and ``low + 2``."""
        start, end = (one(boxes[..., i, None], priors[:, i]) for one, i in ((torch.maximum, low), (torch.minimum, low + 2)))
        return end.sub_(start).clamp_(min=0)

    area, prior_area = ((own[..., 2] - own[..., 0]) * (own[..., 3] - own[..., 1]) for own in (boxes, priors))
    shared = overlap(0).mul_(overlap(1))
    union = (area[..., None] + prior_area).sub_(shared).clamp_(min=1e-6)
    return shared.div_(union)
