"""Anchors and targets of a batch in one pass are those of mmdet, bit by bit."""

import pytest
import torch
from mmengine.structures import InstanceData

from mmman.memory.detection import anchor_targets
from mmman.memory.detection.anchor_targets import compute_targets, has_stock_targets

pytest.importorskip('mmdet')
from mmdet.structures import DetDataSample

STRIDES = (8, 16, 32, 64, 128)


def head_of(**options):
    """RetinaNet's head, or one with other options of its assigner."""
    from mmdet.models.dense_heads import RetinaHead

    pos_weight, border = options.pop('pos_weight', -1), options.pop('allowed_border', -1)
    assigner = {'type': 'MaxIoUAssigner', 'pos_iou_thr': 0.5, 'neg_iou_thr': 0.4, 'min_pos_iou': 0, 'ignore_iof_thr': -1}
    training = {'assigner': assigner | options, 'sampler': {'type': 'PseudoSampler'}}
    training |= {'allowed_border': border, 'pos_weight': pos_weight, 'debug': False}
    return RetinaHead(num_classes=20, in_channels=8, train_cfg=training)


def batch_of(counts, seed, grid=None, height=160, width=224):
    """Objects, two of them alike in an image that has more, and images of unequal padding."""
    generator = torch.Generator().manual_seed(seed)
    instances, metas = [], []
    for count in counts:
        corners = (torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])).sort(dim=1).values
        if grid is not None:  # many overlaps that are the same
            corners = (corners / grid).round() * grid
        if count > 2:
            corners[1] = corners[0]
        labels = torch.randint(20, (count,), generator=generator)
        instances.append(InstanceData(bboxes=corners.flatten(1), labels=labels))
        padded = 32 * int(torch.randint(1, height // 32 + 1, (1,), generator=generator))
        metas.append({'pad_shape': (padded, width), 'img_shape': (padded, width)})
    return [(-(-height // s), -(-width // s)) for s in STRIDES], instances, metas


def targets_of(head, sizes, instances, metas):
    """mmdet's own."""
    anchors, flags = head.get_anchors(sizes, metas, device='cpu')
    *by_level, factor = head.get_targets(anchors, flags, instances, metas, batch_gt_instances_ignore=None)
    return anchors, by_level, factor


def found(head, sizes, instances, metas):
    samples = []
    for own, meta in zip(instances, metas, strict=True):
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = own
        samples.append(sample)
    return compute_targets(head, sizes, samples, 'cpu')


def assert_same(ours, theirs):
    assert ours[2] == theirs[2]
    for mine, stock in zip(ours[:2], theirs[:2], strict=True):
        for own, expected in zip(mine, stock, strict=True):
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize('counts', [(3, 0, 7, 1), (0, 0), (12,), (1, 1, 1)])
@pytest.mark.parametrize('grid', [None, 16])
@pytest.mark.parametrize('elements', [1, 2**20])
@pytest.mark.parametrize('options', [{}, {'pos_weight': 2.0}, {'min_pos_iou': 0.3, 'pos_iou_thr': 0.6}])
def test_they_are_mmdets(monkeypatch, counts, grid, elements, options):
    monkeypatch.setattr(anchor_targets, 'MAX_OVERLAPS', elements)
    head = head_of(**options)
    assert has_stock_targets(head)
    for seed in range(3):
        batch = batch_of(counts, seed, grid)
        assert_same(found(head, *batch), targets_of(head, *batch))


@pytest.mark.parametrize(
    'options',
    [
        {'allowed_border': 0},
        {'ignore_iof_thr': 0.5},
        {'match_low_quality': False},
        {'gt_max_assign_all': False},
        {'neg_iou_thr': (0.1, 0.4)},
        {'gpu_assign_thr': 5},
    ],
)
def test_other_options_are_left_to_mmdet(options):
    head = head_of(**options)
    assert not has_stock_targets(head)
    batch = batch_of((3, 0, 5), seed=0)
    assert_same(found(head, *batch), targets_of(head, *batch))


def test_boxes_of_a_box_type():
    from mmdet.structures.bbox import HorizontalBoxes

    head, (sizes, instances, metas) = head_of(), batch_of((3, 0, 5), seed=0)
    theirs = targets_of(head, sizes, instances, metas)
    for own in instances:
        own.bboxes = HorizontalBoxes(own.bboxes)
    assert_same(found(head, sizes, instances, metas), theirs)
    head.prior_generator.use_box_type = True
    assert not has_stock_targets(head)


def test_overlaps_in_half_precision_are_left_to_mmdet():
    from mmdet.models.task_modules import BboxOverlaps2D

    head = head_of()
    head.assigner.iou_calculator = BboxOverlaps2D(dtype='fp16')
    assert not has_stock_targets(head)


@pytest.mark.parametrize('method', ['loss', 'loss_by_feat', 'get_anchors', 'get_targets'])
def test_a_head_with_a_method_of_its_own_is_left_alone(method):
    head = head_of()
    own = type('Mine', (type(head),), {method: lambda self, *args, **kwargs: None})
    assert has_stock_targets(head)
    head.__class__ = own
    assert not has_stock_targets(head)
