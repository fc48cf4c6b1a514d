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
    'ATSSHead': {'anchor_generator': {**ANCHORS, 'ratios': [1.0], 'octave_base_scale': 8, 'scales_per_octave': 1}},
    'FCOSHead': {'strides': STRIDES},
}


def backbone_with(head, num_blocks=4, transfer=None, **options):
    from mmdet.models import ResNet

    init_default_scope('mmdet')
    bbox_head = {'type': head, 'num_classes': 3, 'in_channels': 32, 'feat_channels': 32, **HEADS.get(head, {}), **options}
    return localize_(ResNet(18), num_blocks, {'type': 'mmman.DetLocalHead', 'bbox_head': bbox_head}, transfer=transfer)


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

    sample = DetDataSample(metainfo={'img_shape': (512, 512)})
    sides = torch.tensor([10.0, 60, 100, 400])
    boxes = torch.stack([torch.zeros(4), torch.zeros(4), sides, sides], 1)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(4))
    before = copy.deepcopy(sample)
    seen = [head._in_range(sample).gt_instances.labels.tolist() for head in backbone_with('RetinaHead').local.values()]
    assert seen == [[0, 1], [1, 2], [2, 3]]
    assert torch.equal(sample.gt_instances.bboxes, before.gt_instances.bboxes) and len(sample.gt_instances) == 4
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
