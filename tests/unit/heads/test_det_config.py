"""Configs of mmdet's dense heads, cut to a local head's levels; heads that need another network or say what else to take."""

import pytest
from torch import nn

from mmman.errors import ConfigError
from mmman.heads import DetLocalHead
from mmman.heads.det_config import downsample_config, find_box_classes, select_levels, unsupported_message
from tests.unit.heads.test_det import HEADS, STRIDES, backbone_with, localized, stock, trained

pytest.importorskip('mmdet')
from mmdet.models import RetinaHead


def test_a_default_generator_is_cut_to_the_levels():
    """VFNet's anchors are in no config, and its points are not what it assigns objects to."""
    vfnet = 'vfnet/vfnet_r50_fpn_1x_coco.py'
    heads = trained(stock(vfnet, partition=['layer2.1', 'layer3.1']))
    for one in heads:
        assert [stride[0] for stride in one.bbox_head.atss_prior_generator.strides] == one.level_strides
    assert heads[0].gt_size_range == (0, pytest.approx(128 * 2**0.5))
    with pytest.raises(ConfigError, match=r'^VFNetHead cannot be a local detection head: it fails .* of strides \[8\]'):
        stock(vfnet, 4)


@pytest.mark.parametrize('downsample', [1, 2])
def test_points_have_no_sizes(downsample):
    for one in trained(stock('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 4, downsample=downsample)):
        assert [stride[0] for stride in one.bbox_head.prior_generator.strides] == one.level_strides
        assert one.gt_size_range is None


@pytest.mark.parametrize(
    'path, alone',
    [
        ('ld/ld_r18-gflv1-r101_fpn_1x_coco.py', 'GFLHead'),
        ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', 'FCOSHead'),
        ('boxinst/boxinst_r50_fpn_ms-90k_coco.py', 'FCOSHead'),
    ],
)
def test_a_head_that_works_with_another_network_stands_alone(path, alone):
    """Its loss takes what a teacher predicts, or it predicts what a mask head takes."""
    for one in trained(stock(path)):
        assert type(one.bbox_head).__name__ == alone


def test_a_norm_a_level_is_there_for_the_levels_alone():
    options = {**HEADS['RetinaHead'], 'num_ins': 5, 'norm_cfg': {'type': 'BN'}}
    for one in trained(backbone_with('RetinaSepBNHead', 4, **options)):
        assert len(one.bbox_head.cls_convs) == len(one.level_strides)
        assert all(p.requires_grad for p in one.bbox_head.parameters())


def test_advice_does_not_name_the_head_that_is_refused():
    with pytest.raises(ConfigError) as refused:
        localized({'bbox_head': {'type': 'FCOSHead', 'num_classes': 3, 'in_channels': 32, 'loss_bbox': {'type': 'NoLoss'}}})
    reason, advice = str(refused.value).split('; ')
    assert 'FCOSHead cannot be' in reason and 'NoLoss' in reason
    assert 'FCOSHead' not in advice and 'RetinaHead' in advice


def test_a_kind_is_named_as_a_config_names_it():
    for kind in ('mmdet.RetinaHead', 'RetinaHead', RetinaHead):
        message = unsupported_message(kind, 'it is too old')
        assert message.startswith('RetinaHead cannot be a local detection head: it is too old; set local_head.bbox_head to')
        assert message.count('RetinaHead') == 1


def test_options_of_every_level_are_cut_and_others_stay():
    config = {'num_classes': 3, 'in_channels': 8, 'feat_channels': 8, 'stacked_convs': 1, **HEADS['RetinaHead']}
    given = {'type': 'RetinaHead', **config}
    cut = select_levels(given, RetinaHead(**config), [1, 2])
    assert cut['anchor_generator'] == {**config['anchor_generator'], 'strides': [16, 32]}
    assert cut['num_classes'] == 3 and given['anchor_generator']['strides'] == STRIDES  # the model's own config stays
    assert 'strides' in select_levels({'type': 'RetinaHead'}, RetinaHead(**config), [4])['anchor_generator']  # a default


def test_a_coarser_grid_has_the_anchors_of_the_finer():
    fine = {'type': 'RetinaHead', 'anchor_generator': {'type': 'AnchorGenerator', 'strides': [8, (16, 12)]}, 'strides': [8]}
    coarse = downsample_config({**fine, 'anchor_generator': dict(fine['anchor_generator'])}, 2)
    assert coarse['anchor_generator'] == {'type': 'AnchorGenerator', 'strides': [16, (32, 24)], 'base_sizes': [8, 12]}
    assert coarse['strides'] == [16]
    own_sizes = {'anchor_generator': {'type': 'AnchorGenerator', 'strides': [8], 'base_sizes': [5]}}
    assert downsample_config(own_sizes, 2)['anchor_generator']['base_sizes'] == [5]
    assert downsample_config(fine, 1) is fine


@pytest.mark.parametrize(
    ('model', 'found'),
    [
        ({'bbox_head': {'num_classes': 3}, 'mask_head': {'num_classes': 4}}, ('bbox_head.num_classes', 3)),
        ({'roi_head': {'bbox_head': [{'num_classes': 3}, {'num_classes': 3}]}}, ('roi_head.bbox_head[0].num_classes', 3)),
        ({'mask_head': {'num_classes': 3}}, ('mask_head.num_classes', 3)),
        ({'panoptic_head': {'num_things_classes': 3, 'num_stuff_classes': 5}}, ('panoptic_head.num_things_classes', 3)),
        ({'panoptic_head': {'num_things_classes': 0, 'num_stuff_classes': 5}}, None),
        ({'rpn_head': {'num_classes': 1}}, None),
        ({'roi_head': {'bbox_head': {'num_classes': 9, 'contrastive_cfg': {'max_text_len': 9}}}}, None),
    ],
)
def test_classes_with_boxes(model, found):
    assert find_box_classes(model) == found
    options = {} if found is None or 'bbox_head' in model else {'num_classes': found[1]}
    assert DetLocalHead.derive_options(model, {'num_classes': 9} if 'bbox_head' in model else {}) == options


def test_classes_of_a_built_model():
    roi_head, bbox_head = nn.Module(), nn.Module()
    bbox_head.num_classes = 4
    roi_head.bbox_head = nn.ModuleList([bbox_head])
    model = nn.Module()
    model.roi_head = roi_head
    assert find_box_classes(model) == ('roi_head.bbox_head[0].num_classes', 4)
    head = next(iter(backbone_with('RetinaHead', 2).local.values()))
    with pytest.raises(ConfigError, match='num_classes=3, but the model has 4: set num_classes=4'):
        head.check_model(model)
    panoptic = nn.Module()
    panoptic.panoptic_head = nn.Module()
    panoptic.panoptic_head.num_things_classes = 3
    head.check_model(panoptic)
    bbox_head.contrastive_cfg = {'max_text_len': 4}  # words of a text
    head.check_model(model)
