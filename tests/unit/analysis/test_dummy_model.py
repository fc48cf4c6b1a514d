"""Models of configs, built to be measured."""

import pytest

pytest.importorskip('mmdet')

from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmman.analysis.dummy_model import build_dummy_model, image_channels, random_batch
from mmman.analysis.training import StepMeter


def test_a_two_stage_detector_is_measured():
    """Its head reads nested options by attribute, so they have to stay a config's."""
    cfg = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    narrow = {
        'backbone.base_channels': 4,
        'neck': {'in_channels': [16, 32, 64, 128], 'out_channels': 16},
        'rpn_head': {'in_channels': 16, 'feat_channels': 16},
        'roi_head.bbox_roi_extractor.out_channels': 16,
        'roi_head.bbox_head': {'in_channels': 16, 'fc_out_channels': 32},
    }
    cfg.merge_from_dict({f'model.{name}': value for name, value in narrow.items()})
    model, optim_wrapper = build_dummy_model(cfg, 64, 96)
    meter = StepMeter(model, optim_wrapper, random_batch(model, cfg.default_scope, 1, 64, 96))
    memory = meter.memory()
    assert sum(memory.parts.values()) == memory.peak > meter.floor() and memory.flops > 0


def test_images_have_as_many_channels_as_the_preprocessor_has_means():
    """As in change detection, where two images are one of six channels."""
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    model = nn.Module()
    model.decode_head = nn.Module()
    model.decode_head.num_classes = 2
    assert image_channels(model) == 3
    model.data_preprocessor = MODELS.build({'type': 'SegDataPreProcessor', 'mean': [1.0] * 6, 'std': [1.0] * 6})
    assert [image.shape for image in random_batch(model, 'mmseg', 2, 4, 8)['inputs']] == [(6, 4, 8)] * 2
