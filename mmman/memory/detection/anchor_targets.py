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

ELEMENTS = 2**20
"""Maximum size of a map of overlaps, (images, objects, anchors), computed in one pass; at least one image is."""

Found = tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, Tensor]
"""The match of each anchor, (B, A), see :func:`_matched`; image and anchor index of the P positive anchors, (P,) each; their
labels, (P,), and box targets, (P, 4); and the number of positive anchors, at least one per image, a scalar."""


def find_targets(
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
    if is_known(head):
        anchors, flags = _anchors(head, sizes, metas, device)
        *targets, factor = _targets(head, anchors, flags, instances)
    else:
        anchors, flags = head.get_anchors(sizes, metas, device=device)
        *targets, factor = head.get_targets(anchors, flags, instances, metas, batch_gt_instances_ignore=ignored)
    return anchors, targets, factor


def check_known(head: nn.Module | None, model: nn.Module) -> None:
    """Raise :class:`ConfigError` if the targets of a dense head of ``model`` can't be computed ahead of its losses."""
    if head is None or not is_known(head):
        raise ConfigError(
            f"cuda_graphs is for detectors that have dense heads with targets like RetinaNet's (MaxIoUAssigner, PseudoSampler, "
            f'DeltaXYWHBBoxCoder), and local heads alike, not for {type(model).__name__} with '
            f'{"another local head" if head is None else type(head).__name__}: set optim_wrapper.cuda_graphs=False'
        )


def is_known(head: nn.Module) -> bool:
    """Whether the targets of a dense head are computed for all images in one pass."""
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.task_modules import BboxOverlaps2D, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler

    names = ('loss', 'loss_by_feat', 'get_anchors', 'get_targets', '_get_targets_single')
    if any(getattr(type(head), name, None) is not getattr(AnchorHead, name) for name in names):
        return False
    parts = ((head.assigner, MaxIoUAssigner), (head.sampler, PseudoSampler), (head.bbox_coder, DeltaXYWHBBoxCoder))
    if any(type(part) is not kind for part, kind in parts) or head.reg_decoded_bbox or head.prior_generator.use_box_type:
        return False
    assigner = head.assigner
    return (
        head.train_cfg['allowed_border'] < 0
        and type(assigner.iou_calculator) is BboxOverlaps2D
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
    priors, valid = _on_all_levels(anchors, flags)
    found = _find(head, priors, valid, instances)
    targets = torch.empty_like(found[0]), priors.new_empty(valid.shape), *priors.new_empty(2, *valid.shape, 4)
    _write(head, found, *targets)
    return *([*target.split(levels, dim=1)] for target in targets), int(found[-1])


def _on_all_levels(anchors: list[list[Tensor]], flags: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate levels: the anchors, (A, 4), and which of them are valid, (B, A)."""
    return torch.cat(anchors[0]), torch.stack([torch.cat(own) for own in flags])


class AnchorTargets:
    """Computes targets of a dense head that :func:`check_known` accepts, for feature maps of given sizes.

    Args:
        head: The dense head.
        sizes: Height and width of its feature maps, by level.
        size_range: Objects to use: lower and upper bound of the square root of a box's area, in pixels. None: all.
        device: Device of the targets.
    """

    def __init__(
        self,
        head: nn.Module,
        sizes: list[tuple[int, int]],
        size_range: tuple[float, float] | None,
        device: torch.device | str,
    ) -> None:
        self.head, self.sizes, self.size_range, self.device = head, sizes, size_range, device
        self._shapes: list[tuple[int, ...]] = []

    def find(self, data_samples: list) -> Found:
        """Match the anchors of a batch. Forces a device-to-host sync."""
        metas = [sample.metainfo for sample in data_samples]
        shapes = [(*meta['pad_shape'],) for meta in metas]
        if shapes != self._shapes:
            self._priors, self._valid = _on_all_levels(*_anchors(self.head, self.sizes, metas, self.device))
            self._shapes = shapes
        instances = [sample.gt_instances for sample in data_samples]
        return _find(self.head, self._priors, self._valid, instances, self.size_range)

    def write(self, found: Found, places: Sequence[Tensor]) -> None:
        """Write targets to the given memory, without a device-to-host sync.

        Args:
            found: The result of :meth:`find`.
            places: Destination tensors: labels, (B, A) for A anchors on all levels, int64; their weights, (B, A); box targets
                and their weights, (B, A, 4); and the number of positive anchors, at least one per image, a scalar, int64.
        """
        *targets, factor = places
        _write(self.head, found, *targets)
        factor.copy_(found[-1])


def _find(
    head: nn.Module, priors: Tensor, valid: Tensor, instances: list, size_range: tuple[float, float] | None = None
) -> Found:
    from mmdet.structures.bbox import get_box_tensor

    boxes = pad_sequence([get_box_tensor(own.bboxes) for own in instances], batch_first=True)
    labels = pad_sequence([own.labels for own in instances], batch_first=True)
    counts = torch.tensor([len(own.bboxes) for own in instances], device=priors.device)

    count, most = boxes.shape[:2]
    taken = torch.arange(most, device=priors.device) < counts[:, None]
    if size_range is not None:
        size = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt()
        taken &= (size >= size_range[0]) & (size <= size_range[1])
    size = max(1, ELEMENTS // max(1, most * len(priors)))
    spans = [slice(start, start + size) for start in range(0, count, size)]
    matched = torch.cat([_matched(head.assigner, boxes[s], taken[s], priors, valid[s]) for s in spans])

    image, anchor = (matched > 0).nonzero(as_tuple=True)
    obj = matched[image, anchor] - 1
    deltas = head.bbox_coder.encode(priors[anchor], boxes[image, obj]) if len(image) else priors.new_empty(0, 4)
    factor = image.bincount(minlength=count).clamp(min=1).sum()
    return matched, (image, anchor), labels[image, obj], deltas, factor


def _write(head: nn.Module, found: Found, label: Tensor, label_weight: Tensor, box_target: Tensor, box_weight: Tensor) -> None:
    matched, where, labels, deltas, _ = found
    is_positive, weight = matched > 0, head.train_cfg['pos_weight']
    label.fill_(head.num_classes).index_put_(where, labels)
    label_weight.copy_(matched == 0).masked_fill_(is_positive, 1.0 if weight <= 0 else weight)
    box_target.zero_().index_put_(where, deltas)
    box_weight.copy_(is_positive[..., None].expand_as(box_weight))


def _matched(assigner: object, boxes: Tensor, taken: Tensor, priors: Tensor, valid: Tensor) -> Tensor:
    """Match each anchor, (B, A): to an object, numbered from 1, to background, 0, or to nothing, -1.

    Args:
        assigner: A ``MaxIoUAssigner``.
        boxes: (B, G, 4).
        taken: Whether an object takes part, (B, G).
        priors: (A, 4).
        valid: Whether an anchor takes part, (B, A).
    """
    count, most = boxes.shape[:2]
    if most == 0:
        return valid.long() - 1
    number = torch.arange(1, most + 1, device=boxes.device)
    taken = taken[..., None] & valid[:, None]
    overlaps = assigner.iou_calculator(boxes, priors.expand(count, -1, -1)).masked_fill_(~taken, -1)
    most_of_anchor, which = overlaps.max(dim=1)
    most_of_object = overlaps.amax(dim=2, keepdim=True)

    matched = torch.where(most_of_anchor < assigner.neg_iou_thr, 0, -1)
    matched = torch.where(most_of_anchor >= assigner.pos_iou_thr, which + 1, matched)
    best = (overlaps == most_of_object) & (most_of_object >= assigner.min_pos_iou) & taken
    of_object = (best * number[:, None]).amax(dim=1)  # the last of several objects wins, as in mmdet's loop
    matched = torch.where(of_object > 0, of_object, matched)
    return matched.masked_fill_(~valid, -1)
