"""The local head of detectors: any single-stage dense head of mmdet on the pyramid levels that match the block."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.det_config import (
    UNSUPPORTED_HEADS,
    anchors_by_level,
    build_temporary,
    downsample_config,
    find_box_classes,
    select_levels,
    unsupported_message,
    without_other_networks,
)
from mmman.heads.dry_run import BATCH_SIZE, DryRunError, detection_samples, parameters_without_grad
from mmman.heads.levels import LevelProjection, assign_levels, gt_size_range
from mmman.local.local_head import INJECTED_ARGS, Boundary, LocalHead, drop_keys
from mmman.local.transfer import MomentumTransfer
from mmman.memory.detection.anchor_targets import has_stock_targets
from mmman.memory.detection.losses import AnchorLoss, dense_head_losses
from mmman.options import Count, checked
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class DetLocalHead(LocalHead):
    """Transfer, projection to the pyramid's width, then a dense head built from the detector's own config (MAN++, detection).

    The head predicts on the levels that :func:`assign_levels` returns. By default an anchor-based head is trained only on
    objects whose size the anchors of its levels can match (:func:`gt_size_range`); a point-based head has ``regress_ranges``
    for that.

    Args:
        bbox_head: Config of a dense head with one feature width, e.g. ``_base_.model.bbox_head``: RetinaHead, FCOSHead,
            ATSSHead, GFLHead.
        train_cfg: Its training config, which mmdet injects at model level: ``_base_.model.train_cfg``.
        num_classes: Replaces ``bbox_head`` and ``train_cfg`` for two-stage detectors: RetinaNet's head with this number of
            classes.
        stacked_convs: Convolutions per tower; the model's own head usually has 4.
        size_filter: Whether an anchor-based head is trained only on the objects that its anchors can match. False: on all
            objects, as the authors' code of MAN++ does.
        projection: ``'linear'``: a 1x1 convolution, as in an FPN. ``'release'``: a 1x1 convolution with ReLU, and initial
            weights from N(0, 0.01), as in the authors' code.
        downsample: Factor by which features are pooled along a side. The dense head then runs on a grid that much coarser, with
            anchors of the same sizes, and its memory and time shrink by the factor squared. Not in the paper.
        boundary, transfer, loss_weight: See :class:`LocalHead`.

    Raises:
        ConfigError: ``bbox_head`` isn't a dense head of that kind (the message names it); or both or neither of ``bbox_head``
            and ``num_classes`` are given.
    """

    task = 'detector'
    uses_images = False

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        bbox_head: dict | None = None,
        train_cfg: dict | None = None,
        num_classes: Count | None = None,
        stacked_convs: Count = 2,
        size_filter: bool = True,
        projection: Literal['linear', 'release'] = 'linear',
        downsample: Count = 1,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(boundary, transfer, loss_weight)
        if (bbox_head is None) == (num_classes is None):
            raise ConfigError(
                'DetLocalHead requires bbox_head=_base_.model.bbox_head or, for a detector without a dense head, num_classes'
            )
        if bbox_head is None:
            bbox_head, train_cfg = {**_RETINANET, 'num_classes': num_classes}, train_cfg or _RETINANET_TRAINING
        config = without_other_networks({**copy.deepcopy(bbox_head), 'train_cfg': train_cfg, 'test_cfg': None})
        full_head = build_temporary(config)
        name = type(full_head).__name__
        prior_generator = getattr(full_head, 'prior_generator', None)
        reason = UNSUPPORTED_HEADS.get(name)
        if prior_generator is None or not isinstance(config.get('in_channels'), int) or not hasattr(full_head, 'stacked_convs'):
            reason = 'it is not a single-stage dense head with one in_channels, stacked_convs and a prior generator'
        if reason:
            raise ConfigError(unsupported_message(name, reason))
        strides = [stride[0] for stride in prior_generator.strides]
        levels = assign_levels(boundary.stride, boundary.strides, strides)
        self.downsample = downsample
        self.level_strides = [strides[i] * downsample for i in levels]
        self.gt_size_range = None
        anchors = anchors_by_level(full_head)
        if anchors is not None and size_filter:
            sizes = [((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])).sqrt() for a in anchors]
            self.gt_size_range = gt_size_range(levels, [(size.min().item(), size.max().item()) for size in sizes])

        self.projection = LevelProjection(
            boundary.channels,
            config['in_channels'],
            boundary.stride * downsample,
            self.level_strides,
            relu=projection == 'release',
        )
        config = {**downsample_config(select_levels(config, full_head, levels), downsample), 'stacked_convs': stacked_convs}
        untrained = self._dry_run(config)
        self.bbox_head = MODELS.build(config)
        for parameter in untrained:
            self.bbox_head.get_parameter(parameter).requires_grad_(False)
        if untrained:
            print_log(
                f'{name} after {self.unit} has parameters that its own loss does not train, which are now frozen: '
                f'{", ".join(untrained)}',
                logger='current',
            )

    def _dry_run(self, config: dict) -> tuple[str, ...]:
        """Parameters of the dense head that its loss doesn't reach. Rejects a head that can't be built, or whose loss fails."""
        scope = DefaultScope.get_current_instance()
        key = repr((config, self.level_strides, scope and scope.scope_name))
        if key not in _UNTRAINED:
            try:
                _UNTRAINED[key] = _find_untrained(config, self.level_strides)
            except DryRunError as error:
                reason = f'it fails on feature maps of strides {self.level_strides} ({error})'
                if config['train_cfg'] is None:
                    reason += ', perhaps because local_head.train_cfg is not set'
                raise ConfigError(unsupported_message(config['type'], reason)) from error
        return _UNTRAINED[key]

    @classmethod
    def derive_options(cls, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        if options.get('num_classes') is not None and 'bbox_head' in model:
            return {}  # replaces the model's own dense head
        if isinstance(model.get('bbox_head'), Mapping):
            return {'bbox_head': model['bbox_head'], 'train_cfg': model.get('train_cfg')}
        found = find_box_classes(model)
        return {'num_classes': found[1]} if found else {}

    @classmethod
    def task_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        if 'bbox_head' not in options:
            return {}
        sizes = ('in_channels', 'feat_channels', 'stacked_convs')
        return {'bbox_head': drop_keys(options['bbox_head'], sizes), 'train_cfg': options.get('train_cfg')}

    def loss(self, y: Tensor, inputs: Tensor, data_samples: list) -> dict[str, Tensor | list[Tensor]]:
        """The dense head's own losses (``loss_cls``, ``loss_bbox``, ...); arguments as in :meth:`LocalHead.loss`."""
        return _compute_losses(self.bbox_head, self.feature_maps(y, inputs), self.filter_gt(data_samples))

    def feature_maps(self, y: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        """The dense head's feature maps, (B, C, H, W) by level, from the transfer's output for the block."""
        y = self.as_map(y, inputs)
        if self.downsample > 1:
            y = F.avg_pool2d(y, self.downsample, ceil_mode=True)
        return self.projection(y)

    @property
    def supports_channel_bias(self) -> bool:
        norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
        return not any(isinstance(module, norms) for module in self.bbox_head.modules())

    @property
    def dense_head(self) -> nn.Module:
        return self.bbox_head

    def filter_gt(self, data_samples: list) -> list:
        """Views of the data samples with only the objects of this head's sizes; the samples themselves are not modified.

        Raises:
            ConfigError: The samples have no boxes.
        """
        if any('bboxes' not in sample.get('gt_instances', ()) for sample in data_samples):
            raise ConfigError(
                'the data samples have no gt_instances.bboxes, from which local heads of detectors learn: set with_bbox=True '
                'of LoadAnnotations (or LoadPanopticAnnotations) in the pipeline of train_dataloader'
            )
        if self.gt_size_range is None:
            return data_samples
        from mmdet.structures.bbox import cat_boxes, get_box_wh

        instances = [sample.gt_instances for sample in data_samples]
        width, height = get_box_wh(cat_boxes([own.bboxes for own in instances]))
        size, (low, high) = (width * height).sqrt(), self.gt_size_range
        is_kept = ((size >= low) & (size <= high)).tolist()  # the only device-to-host sync: the selection below needs no other
        views = []
        for sample, own in zip(data_samples, instances, strict=True):
            flags, is_kept = is_kept[: len(own)], is_kept[len(own) :]
            view = copy.copy(sample)
            view.gt_instances = own if all(flags) else own[torch.tensor(flags).nonzero()[:, 0]]
            views.append(view)
        return views

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`ConfigError` if the model is not a detector, or has another number of classes with boxes."""
        super().check_model(model)
        (_, theirs), ours = find_box_classes(model) or (None, None), self.bbox_head.num_classes
        if theirs not in (None, ours):
            raise ConfigError(
                f'the local head has num_classes={ours}, but the model has {theirs}: '
                f'set num_classes={theirs} in model.backbone.local_head (below bbox_head, if it has one) as well'
            )


_RETINANET = {
    'type': 'mmdet.RetinaHead',
    'in_channels': 256,
    'feat_channels': 256,
    'anchor_generator': {
        'type': 'mmdet.AnchorGenerator',
        'octave_base_scale': 4,
        'scales_per_octave': 3,
        'ratios': [0.5, 1.0, 2.0],
        'strides': [8, 16, 32, 64, 128],
    },
    'bbox_coder': {'type': 'mmdet.DeltaXYWHBBoxCoder'},
    'loss_cls': {'type': 'mmdet.FocalLoss', 'use_sigmoid': True, 'gamma': 2.0, 'alpha': 0.25},
    'loss_bbox': {'type': 'mmdet.L1Loss'},
}
_RETINANET_TRAINING = {
    'assigner': {
        'type': 'mmdet.MaxIoUAssigner',
        'pos_iou_thr': 0.5,
        'neg_iou_thr': 0.4,
        'min_pos_iou': 0,
        'ignore_iof_thr': -1,
    },
    'sampler': {'type': 'mmdet.PseudoSampler'},
    'allowed_border': -1,
    'pos_weight': -1,
    'debug': False,
}

_UNTRAINED: dict[str, tuple[str, ...]] = {}
"""Results of dry runs by dense-head config and strides. They are the same for every model in a process."""


def _find_untrained(config: dict, strides: list[int]) -> tuple[str, ...]:
    """Parameters of a dense head that get no gradient from its loss.

    If the loss fails on small maps (deformable convolutions), larger maps are tried, then larger maps with masks.
    """

    def build() -> nn.Module:
        return MODELS.build(copy.deepcopy(config))

    failures = []
    for cells, masks in ((2, False), (4, False), (4, True)):
        try:
            return parameters_without_grad(build, partial(_dry_run_losses, strides, cells, masks))
        except DryRunError as error:
            failures.append(error)
    raise failures[1]


def _compute_losses(head: nn.Module, feature_maps: tuple[Tensor, ...], data_samples: list) -> dict[str, Tensor | list[Tensor]]:
    """``head.loss(feature_maps, data_samples)``, with targets of all images in one pass if :func:`has_stock_targets`."""
    if not has_stock_targets(head):
        return head.loss(feature_maps, data_samples)
    return dense_head_losses(head, feature_maps, lambda sizes, like: AnchorLoss(head, sizes, data_samples, like))


def _dry_run_losses(strides: list[int], cells: int, masks: bool, head: nn.Module) -> Iterator[dict]:
    """Losses of a dense head on random features, ``cells`` or more along a side: with objects of all sizes, then with none."""
    device = next(head.parameters()).device
    side = max(64, cells * max(strides))
    for objects_per_side in (5, 0):
        feature_maps = tuple(torch.randn(BATCH_SIZE, head.in_channels, side // s, side // s, device=device) for s in strides)
        yield _compute_losses(head, feature_maps, detection_samples(side, head.num_classes, device, objects_per_side, masks))
