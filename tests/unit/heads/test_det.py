import copy
import math

import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmman import localize_
from mmman.errors import ConfigError
from mmman.heads.dry_run import BATCH_SIZE, detection_samples, total_loss

pytest.importorskip('mmdet')
from mmdet.models import ResNet, RetinaHead
from mmdet.registry import MODELS

STRIDES = [8, 16, 32, 64, 128]
ANCHORS = {'type': 'AnchorGenerator', 'ratios': [0.5, 1.0, 2.0], 'strides': STRIDES}
HEADS = {
    'RetinaHead': {'anchor_generator': {**ANCHORS, 'octave_base_scale': 4, 'scales_per_octave': 3}},
    'ATSSHead': {
        'anchor_generator': {**ANCHORS, 'ratios': [1.0], 'octave_base_scale': 8, 'scales_per_octave': 1},
        'loss_cls': {'type': 'FocalLoss', 'use_sigmoid': True},
        'loss_bbox': {'type': 'GIoULoss'},
    },
    'FCOSHead': {'strides': STRIDES},
}
IOU = {'type': 'MaxIoUAssigner', 'pos_iou_thr': 0.5, 'neg_iou_thr': 0.4, 'min_pos_iou': 0, 'ignore_iof_thr': -1}
ATSS = {'type': 'ATSSAssigner', 'topk': 9}
OF_TRAINING = {'allowed_border': -1, 'pos_weight': -1, 'debug': False}
ASSIGNERS = {'RetinaHead': IOU, 'RetinaSepBNHead': IOU, 'IdleHead': IOU, 'ATSSHead': ATSS}


def training(head):
    return {'assigner': ASSIGNERS[head], 'sampler': {'type': 'PseudoSampler'}, **OF_TRAINING} if head in ASSIGNERS else None


def backbone_with(head, num_blocks=4, transfer=None, downsample=1, **options):
    bbox_head = {'type': head, 'num_classes': 3, 'in_channels': 32, 'feat_channels': 32, **HEADS.get(head, {}), **options}
    options = {'bbox_head': bbox_head, 'train_cfg': training(head), 'downsample': downsample}
    return localized(options, num_blocks, transfer)


def localized(options, num_blocks=4, transfer=None, partition='stage'):
    init_default_scope('mmdet')
    return localize_(ResNet(18), num_blocks, {'type': 'mmman.DetLocalHead', **options}, partition, transfer)


def levels(backbone):
    return [head.level_strides for head in backbone.local.values()]


def test_levels_of_stage_cuts():
    assert levels(backbone_with('RetinaHead')) == [[8], [16], [32, 64, 128]]
    plain = backbone_with('RetinaHead', transfer={'ema': False, 'bias': False, 'scale': False})
    assert levels(plain) == [[8], [8], [16, 32, 64, 128]]


@pytest.mark.parametrize('head', HEADS)
def test_the_head_is_built_for_its_levels_alone(head):
    for local in backbone_with(head).local.values():
        dense = local.bbox_head
        count = len(local.level_strides)
        assert [stride[0] for stride in dense.prior_generator.strides] == local.level_strides
        assert dense.stacked_convs == 2 and len(dense.cls_convs) == 2
        if head == 'FCOSHead':
            assert len(dense.regress_ranges) == len(dense.scales) == count
            assert local.gt_size_range is None
        else:
            assert dense.prior_generator.num_levels == count
            assert local.gt_size_range is not None
    if head == 'FCOSHead':
        assert [local.bbox_head.regress_ranges[0] for local in backbone_with(head).local.values()] == [
            (-1, 64),
            (64, 128),
            (128, 256),
        ]


def test_a_head_sees_the_objects_of_its_sizes_and_leaves_the_samples_whole():
    from mmdet.structures import DetDataSample

    samples = []
    for sides in ([10.0, 60, 100, 400], [], [20.0], [500.0, 20]):
        sides = torch.tensor(sides)
        boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
        samples.append(DetDataSample(metainfo={'img_shape': (512, 512)}))
        samples[-1].gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(len(sides)))
    before = copy.deepcopy(samples)
    heads = backbone_with('RetinaHead').local.values()
    seen = [[view.gt_instances.labels.tolist() for view in head.filter_gt(samples)] for head in heads]
    assert seen == [[[0, 1], [], [0], [1]], [[1, 2], [], [], []], [[2, 3], [], [], [0]]]
    for sample, old in zip(samples, before, strict=True):
        assert torch.equal(sample.gt_instances.bboxes, old.gt_instances.bboxes)
    ranges = [head.gt_size_range for head in backbone_with('RetinaHead').local.values()]
    assert ranges[0][0] == 0 and ranges[-1][1] == math.inf


def test_all_objects_and_the_projection_of_the_release_are_options():
    bbox_head = {'type': 'RetinaHead', 'num_classes': 3, 'in_channels': 32, 'feat_channels': 32, **HEADS['RetinaHead']}
    options = {'bbox_head': bbox_head, 'train_cfg': training('RetinaHead')}
    assert [head.projection.relu for head in localized(options).local.values()] == [False] * 3
    samples = detection_samples(256, 3)
    for head in localized({**options, 'size_filter': False, 'projection': 'release'}).local.values():
        assert head.filter_gt(samples) is samples
        assert head.gt_size_range is None
        assert head.projection.relu


SSD = {
    'in_channels': (512, 1024, 512, 256, 256, 256),
    'anchor_generator': {
        'type': 'SSDAnchorGenerator',
        'scale_major': False,
        'input_size': 300,
        'basesize_ratio_range': (0.15, 0.9),
        'strides': [8, 16, 32, 64, 100, 300],
        'ratios': [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
    },
}
RPN = {'num_classes': 1, **HEADS['RetinaHead']}


@pytest.mark.parametrize(('head', 'options'), [('SSDHead', SSD), ('RPNHead', RPN)])
def test_heads_of_another_kind_are_refused_by_name(head, options):
    with pytest.raises(ConfigError, match=f'^{head} cannot be a local detection head.*RetinaHead, FCOSHead'):
        backbone_with(head, num_blocks=2, **options)


@pytest.mark.parametrize('head', HEADS)
def test_a_coarser_grid_keeps_the_sizes(head):
    from mmdet.structures import DetDataSample

    plain, coarse = (backbone_with(head, downsample=factor).local.values() for factor in (1, 2))
    for theirs, ours in zip(plain, coarse, strict=True):
        assert ours.level_strides == [2 * stride for stride in theirs.level_strides]
        assert [stride[0] for stride in ours.bbox_head.prior_generator.strides] == ours.level_strides
        assert ours.gt_size_range == theirs.gt_size_range
        if head == 'FCOSHead':
            assert ours.bbox_head.regress_ranges == theirs.bbox_head.regress_ranges
        else:
            pairs = zip(ours.bbox_head.prior_generator.base_anchors, theirs.bbox_head.prior_generator.base_anchors, strict=True)
            assert all(torch.equal(mine, other) for mine, other in pairs)
    sample = DetDataSample(metainfo={'img_shape': (96, 128), 'pad_shape': (96, 128)})
    boxes = torch.tensor([[8.0, 8.0, 40.0, 60.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1]))
    local = next(iter(coarse))
    y = torch.rand(1, local.projection.lateral.in_channels, 13, 17, requires_grad=True)
    maps = local.projection(torch.nn.functional.avg_pool2d(y, 2, ceil_mode=True))
    assert maps[0].shape[-2:] == (7, 9)
    if head == 'FCOSHead':
        sum(loss.sum() for loss in local.loss(y, torch.zeros(1, 3, 96, 128), [sample]).values()).backward()
        assert y.grad.abs().sum() > 0


def stock(path, num_blocks=3, partition='stage', **options):
    """A ResNet-18 with local heads after a detector of mmdet, with narrow towers."""
    model = get_config(f'mmdet::{path}').model
    bbox_head = {**model.bbox_head, 'num_classes': 3, 'in_channels': 32, 'feat_channels': 32}
    return localized({'bbox_head': bbox_head, 'train_cfg': model.get('train_cfg'), **options}, num_blocks, partition=partition)


def trained(backbone):
    """Its local heads, after a step of each on images with and without objects."""
    local = [*backbone.local.values()]
    for along in (5, 0):
        for one in local:
            y = torch.randn(BATCH_SIZE, one.feature.channels, 256 // one.feature.stride, 256 // one.feature.stride)
            total_loss(
                one.loss(y, torch.zeros(BATCH_SIZE, 3, 256, 256), detection_samples(256, 3, objects_per_side=along))
            ).backward()
    for one in local:
        params = [(name, p) for name, p in one.named_parameters() if not name.startswith('transfer.')]
        assert not [name for name, p in params if p.requires_grad and p.grad is None]
    return local


@MODELS.register_module()
class IdleHead(RetinaHead):
    """A dense head with a layer that its loss does not see."""

    def _init_layers(self):
        super()._init_layers()
        self.idle = torch.nn.Conv2d(self.feat_channels, 2, 1)


def test_what_the_loss_does_not_reach_is_frozen():
    """DistributedDataParallel waits for the gradient of every parameter that requires one."""
    for one in trained(backbone_with('IdleHead', **HEADS['RetinaHead'])):
        frozen = [name for name, p in one.bbox_head.named_parameters() if not p.requires_grad]
        assert frozen == ['idle.weight', 'idle.bias']


def test_a_head_without_its_training_config_is_refused():
    bbox_head = {'type': 'RetinaHead', 'num_classes': 3, 'in_channels': 32, **HEADS['RetinaHead']}
    with pytest.raises(ConfigError, match='perhaps because local_head.train_cfg is not set'):
        localized({'bbox_head': bbox_head})


def test_downsample_is_refused_below_one():
    with pytest.raises(ConfigError, match='downsample=0: expected an integer >= 1'):
        backbone_with('RetinaHead', downsample=0)


def test_images_without_boxes_are_refused():
    head = next(iter(backbone_with('RetinaHead', num_blocks=2).local.values()))
    samples = detection_samples(64, 3)
    del samples[1].gt_instances.bboxes
    with pytest.raises(ConfigError, match='no gt_instances.bboxes.* set with_bbox=True of LoadAnnotations'):
        head.loss(torch.zeros(2, 256, 4, 4), torch.zeros(2, 3, 64, 64), samples)
    del samples[0].gt_instances
    with pytest.raises(ConfigError, match='no gt_instances.bboxes'):
        head.loss(torch.zeros(2, 256, 4, 4), torch.zeros(2, 3, 64, 64), samples)
