"""Local heads that follow the model's own head."""

import copy

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmman.builder.model import mismatched_options
from mmman.errors import ConfigError

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

LOCALISED = """
model = dict(
    {model}backbone=dict(
        _delete_=True,
        type='mmman.LocalBackbone',
        backbone=_base_.model.backbone,
        num_blocks=2,
        local_head={local_head},
    ),
)
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [dict(type='mmman.EMABiasHook')]
"""
FOLLOW = "type='mmman.LocalModel',\n    model_type=_base_.model.type,\n    "

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
FCN = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
RESNET = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
VGG = 'mmpretrain::vgg/vgg11_8xb32_in1k.py'

# stock config; local head; what a further child changes of the model's head; where the local head then has it
CASES = {
    'detector': (
        RETINANET,
        "dict(type='mmman.DetLocalHead')",
        'bbox_head=dict(num_classes=7, anchor_generator=dict(ratios=[1.0])), train_cfg=dict(allowed_border=5)',
        lambda head: (head.bbox_head.num_classes, head.bbox_head.num_base_priors, head.bbox_head.train_cfg['allowed_border']),
        (7, 3, 5),
    ),
    'two-stage detector': (
        FASTER_RCNN,
        "dict(type='mmman.DetLocalHead')",
        'roi_head=dict(bbox_head=dict(num_classes=7))',
        lambda head: head.bbox_head.num_classes,
        7,
    ),
    'segmentor': (
        FCN,
        "dict(type='mmman.SegLocalHead')",
        'decode_head=dict(num_classes=7, ignore_index=3)',
        lambda head: (head.decode_head.num_classes, head.decode_head.ignore_index),
        (7, 3),
    ),
    'classifier': (
        RESNET,
        "dict(type='mmman.DGLLocalHead')",
        "head=dict(num_classes=7, loss=dict(_delete_=True, type='LabelSmoothLoss', label_smooth_val=0.1))",
        lambda head: (head.num_classes, type(head.head.loss_module).__name__),
        (7, 'LabelSmoothLoss'),
    ),
    'classifier in the backbone': (
        VGG,
        "dict(type='mmman.DGLLocalHead')",
        'backbone=dict(backbone=dict(num_classes=7))',
        lambda head: head.num_classes,
        7,
    ),
}


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def grandchild(folder, stock, local_head, change, model=FOLLOW):
    """A config that changes the head of a localised stock config."""
    write(folder, 'child.py', f'_base_ = {stock!r}\n' + LOCALISED.format(model=model, local_head=local_head))
    return Config.fromfile(write(folder, 'grandchild.py', f"_base_ = './child.py'\nmodel = dict({change})\n"))


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(copy.deepcopy(cfg.model))


@pytest.mark.parametrize('kind', CASES)
def test_a_local_head_follows_the_models_own(kind, tmp_path):
    stock, local_head, change, found, expected = CASES[kind]
    cfg = grandchild(tmp_path, stock, local_head, change)
    model = build(cfg)
    assert type(model).__name__ == Config.fromfile(write(tmp_path, 'stock.py', f'_base_ = {stock!r}\n')).model.type
    (head,) = model.backbone.local.values()
    assert found(head) == expected
    head.check_model(model)
    assert mismatched_options(cfg.model) == []


def test_what_the_local_head_sets_itself_wins(tmp_path):
    own = "dict(type='mmman.DetLocalHead', bbox_head=dict(feat_channels=64, loss_bbox=dict(type='SmoothL1Loss', beta=0.5)))"
    (head,) = build(grandchild(tmp_path, RETINANET, own, 'bbox_head=dict(num_classes=7)')).backbone.local.values()
    assert head.bbox_head.feat_channels == 64 and head.bbox_head.num_classes == 7
    assert head.bbox_head.loss_bbox.beta == 0.5


def test_a_stock_backbone_is_refused():
    init_default_scope('mmdet')
    with pytest.raises(ConfigError, match=r"model\.backbone\.type='ResNet': mmman\.LocalModel requires 'mmman\.LocalBackbone'"):
        MODELS.build({'type': 'mmman.LocalModel', 'model_type': 'RetinaNet', 'backbone': {'type': 'ResNet', 'depth': 18}})


EXPLICIT = {
    'detector': "dict(type='mmman.DetLocalHead', bbox_head=_base_.model.bbox_head, train_cfg=_base_.model.train_cfg)",
    'segmentor': "dict(type='mmman.SegLocalHead', decode_head=_base_.model.decode_head)",
    'classifier': "dict(type='mmman.DGLLocalHead', head=_base_.model.head)",
}
CHANGED = {
    'detector': ['bbox_head.anchor_generator.ratios', 'bbox_head.num_classes', 'train_cfg.allowed_border'],
    'segmentor': ['decode_head.ignore_index', 'decode_head.num_classes'],
    'classifier': ['head.loss.label_smooth_val', 'head.loss.loss_weight', 'head.loss.type', 'head.num_classes'],
}


@pytest.mark.parametrize('kind', EXPLICIT)
def test_what_a_child_changed_is_told(kind, tmp_path):
    stock, _, change, *_ = CASES[kind]
    cfg = grandchild(tmp_path, stock, EXPLICIT[kind], change, model='')
    assert mismatched_options(cfg.model) == CHANGED[kind]
    sizes = {'detector': 'bbox_head=dict(feat_channels=64)', 'segmentor': 'decode_head=dict(channels=64)', 'classifier': ''}
    assert mismatched_options(grandchild(tmp_path, stock, EXPLICIT[kind], sizes[kind], model='').model) == []
