import copy
import math

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmman import localize_
from mmman.errors import MisuseError

pytest.importorskip('mmdet')

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
ASSIGNERS = {'RetinaHead': IOU, 'ATSSHead': ATSS}


def training(head):
    return {'assigner': ASSIGNERS[head], 'sampler': {'type': 'PseudoSampler'}, **OF_TRAINING} if head in ASSIGNERS else None


def backbone_with(head, num_blocks=4, transfer=None, downsample=1, **options):
    from mmdet.models import ResNet

    init_default_scope('mmdet')
    bbox_head = {'type': head, 'num_classes': 3, 'in_channels': 32, 'feat_channels': 32, **HEADS.get(head, {}), **options}
    return localize_(
        ResNet(18),
        num_blocks,
        {'type': 'mmman.DetLocalHead', 'bbox_head': bbox_head, 'train_cfg': training(head), 'downsample': downsample},
        transfer=transfer,
    )


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
            assert local.size_range is None
        else:
            assert dense.prior_generator.num_levels == count
            assert local.size_range is not None
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
    seen = [[view.gt_instances.labels.tolist() for view in head.shown(samples)] for head in heads]
    assert seen == [[[0, 1], [], [0], [1]], [[1, 2], [], [], []], [[2, 3], [], [], [0]]]
    for sample, old in zip(samples, before, strict=True):
        assert torch.equal(sample.gt_instances.bboxes, old.gt_instances.bboxes)
    ranges = [head.size_range for head in backbone_with('RetinaHead').local.values()]
    assert ranges[0][0] == 0 and ranges[-1][1] == math.inf


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
    with pytest.raises(MisuseError, match=f'^{head} cannot be a local detection head.*RetinaHead, FCOSHead'):
        backbone_with(head, num_blocks=2, **options)


@pytest.mark.parametrize('head', HEADS)
def test_a_coarser_grid_keeps_the_sizes(head):
    from mmdet.structures import DetDataSample

    plain, coarse = (backbone_with(head, downsample=factor).local.values() for factor in (1, 2))
    for theirs, ours in zip(plain, coarse, strict=True):
        assert ours.level_strides == [2 * stride for stride in theirs.level_strides]
        assert [stride[0] for stride in ours.bbox_head.prior_generator.strides] == ours.level_strides
        assert ours.size_range == theirs.size_range
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


def test_downsample_is_refused_below_one():
    with pytest.raises(MisuseError, match='downsample=0: choose 1 or more'):
        backbone_with('RetinaHead', downsample=0)
