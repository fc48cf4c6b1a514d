"""The local heads of real stock configs: where their number of classes comes from, and which configs get none."""

import pytest

from mmman.errors import ConfigError
from mmman.runtime.recipes import check_source, recipes_for
from mmman.runtime.stock_config import StockConfig

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')


def recipes(stock):
    """The recipes of a stock config, and its model."""
    source = StockConfig.read(stock)
    check_source(source)
    return recipes_for(source.cfg, 'model'), source.cfg.model


@pytest.mark.parametrize(
    ('stock', 'place', 'number'),
    [
        ('detr/detr_r50_8xb2-150e_coco.py', 'bbox_head', 80),
        ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', 'roi_head.bbox_head[0]', 80),
        ('point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py', 'roi_head.bbox_head', 80),
        ('solov2/solov2_r50_fpn_1x_coco.py', 'mask_head', 80),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py', 'panoptic_head', 80),
    ],
)
def test_detectors_without_a_dense_head(stock, place, number):
    """A light RetinaNet head with the classes that have boxes: of panoptic data the things."""
    option = 'num_things_classes' if place == 'panoptic_head' else 'num_classes'
    (*_, last), model = recipes(f'mmdet::{stock}')
    assert f"type='mmman.DetLocalHead', num_classes=model.{place}.{option}, stacked_convs=1" in last.local_head
    assert eval(f'model.{place}.{option}', {'model': model}) == number


@pytest.mark.parametrize(
    'stock',
    [
        'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        'knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py',
        'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
    ],
)
def test_segmentors(stock):
    (first, _), _ = recipes(f'mmseg::{stock}')
    assert first.local_head == "dict(type='mmman.SegLocalHead', decode_head=model.decode_head)"


def test_towers_are_narrowed_where_a_head_has_them():
    (dense, _), _ = recipes('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')
    assert 'bbox_head=dict(model.bbox_head, feat_channels=128)' in dense.local_head
    (dense, _), _ = recipes('mmdet::conditional_detr/conditional-detr_r50_8xb2-50e_coco.py')
    assert 'bbox_head=model.bbox_head' in dense.local_head


@pytest.mark.parametrize(
    ('stock', 'message'),
    [
        ('mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py', 'MoCo trains without labels.* train it without mmman'),
        ('mmpretrain::simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py', 'SimCLR trains without labels'),
        ('mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py', 'MAE trains without labels'),
        ('mmpretrain::arcface/resnet50-arcface_8xb32_inshop.py', 'has no model.backbone, but model.image_encoder: write'),
        ('mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py', 'without the wrapper'),
        ('mmdet::mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py', 'Mask2FormerVideo trains on videos'),
        ('mmdet::reid/reid_r50_8xb32-6e_mot17train80_test-mot17val20.py', 'BaseReID learns identities of crops.* by hand'),
        ('mmdet::rpn/rpn_r50_fpn_1x_coco.py', "RPN, which has no .* e.g. dict.type='mmman.DetLocalHead', num_classes=...."),
    ],
)
def test_configs_without_local_heads(stock, message):
    with pytest.raises(ConfigError, match=message):
        recipes(stock)
