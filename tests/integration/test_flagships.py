"""The flagships, the configs at the top of ``configs/``: what they promise, and a training step of each."""

import copy
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')
from mmdet.structures.mask import BitmapMasks
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mmman.engine.config_check import check_config
from tests.alive import without_gradient
from tests.integration.test_configs import (
    CONFIGS,
    DEMO,
    build_for_training,
    build_model,
    config,
    image_batch,
    meta_model,
    smaller_segmentor,
    step,
)
from tests.transfer_effect import assert_transfer_has_effect

FLAGSHIPS = [*sorted(path.name for path in CONFIGS.glob('*.py')), DEMO]
FINETUNED = [name for name in FLAGSHIPS if name.endswith('_finetune.py')]
SEGMENTORS = [name for name in FLAGSHIPS if name.startswith(('deeplab', 'upernet'))]
DETECTORS = [name for name in FLAGSHIPS if 'retinanet' in name or 'rcnn' in name]
pytestmark = pytest.mark.filterwarnings('ignore:.*(build_loss|avg_non_ignore|draw is False):UserWarning')


@pytest.mark.parametrize('name', FLAGSHIPS)
def test_heads_are_light(name: str) -> None:
    model = meta_model(name)
    local = model.backbone.local
    assert len(local) == int(re.search(r'_k(\d+)', name)[1]) - 1
    for head in local.values():
        light = [head.transfer.channel_bias, head.transfer.depthwise_bias]
        assert head.transfer.bias is None and light.count(None) == 1 and head.transfer.delta is not None
        assert not head.uses_images
        head.check_model(model)
    if 'swin' not in name:  # the index of relative positions has no random values to try
        assert_transfer_has_effect(config(name), model)
    assert config(name).optim_wrapper['update'] == 'immediate'


@pytest.mark.parametrize('name', FLAGSHIPS)
def test_a_fine_tuned_backbone_is_frozen_as_the_stock_one_and_no_other(name: str) -> None:
    backbone = meta_model(name).backbone
    trained = {key.split('.')[0] for key, p in backbone.named_parameters() if p.requires_grad}
    frozen = {key.split('.')[0] for key, p in backbone.named_parameters() if not p.requires_grad and '.momentum.' not in key}
    is_frozen = name in FINETUNED and 'swin' not in name  # the stock Swin freezes nothing
    assert not frozen & trained
    assert frozen == ({'conv1', 'bn1', 'layer1'} if is_frozen else set())


@pytest.mark.parametrize('name', [name for name in DETECTORS if 'retinanet' in name and name != DEMO])
def test_retinanets_train_the_batch_that_they_are_planned_for(name: str) -> None:
    assert config(name).train_dataloader.batch_size == 8
    assert 'for 8 images of 416x640' in re.sub(r'\s+#?\s*', ' ', (CONFIGS / name).read_text())


@pytest.mark.parametrize('name', FLAGSHIPS)
def test_no_option_of_a_flagship_contradicts_the_pipeline_runner(name: str) -> None:
    cfg = copy.deepcopy(config(name))
    cfg.merge_from_dict({'runner_type': 'mmman.PipelineRunner'})
    check_config(cfg)
    assert 'runner_type' not in config(name)


PRETRAINED = {
    'model.backbone.backbone.init_cfg.type': 'Pretrained',
    'model.backbone.backbone.init_cfg.prefix': 'backbone.',
}
FROM_MANPP = {
    'retinanet_r101_manpp_k4.py': PRETRAINED,
    'deeplabv3_r101_manpp_k2.py': {**PRETRAINED, 'model.pretrained': None, 'model.backbone.backbone.type': 'ResNet'},
}
"""The options in docs/howto/pretrained_backbones.md that start from a classifier trained by MAN++."""


@pytest.mark.parametrize('name', FROM_MANPP)
def test_backbone_from_a_classifier_trained_locally(name: str, tmp_path) -> None:
    narrow = {'model.backbone.backbone.base_channels': 4, 'model.backbone.backbone.stem_channels': 4}
    source = copy.deepcopy(config('resnet101_manpp_k4_imagenet.py'))
    source.merge_from_dict({**narrow, 'model.head.in_channels': 128})
    classifier = build_model(source)
    torch.save({'state_dict': classifier.state_dict()}, tmp_path / 'epoch_90.pth')
    cfg = copy.deepcopy(config(name))
    cfg.merge_from_dict(
        {**narrow, **FROM_MANPP[name], 'model.backbone.backbone.init_cfg.checkpoint': str(tmp_path / 'epoch_90.pth')}
    )
    init_default_scope(cfg.default_scope)
    ours = MODELS.build(cfg.model.backbone)
    ours.init_weights()

    theirs = {key: value for key, value in classifier.backbone.state_dict().items() if not key.startswith('local.')}
    assert theirs.keys() == {key for key in ours.state_dict() if not key.startswith('local.')}
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.items())


def batch_for(name: str) -> dict:
    if name in DETECTORS:
        batch = image_batch(96, 160)
        if 'mask' in name:
            masks = np.ones((len(batch['data_samples'][0].gt_instances), 96, 160), dtype=np.uint8)
            batch['data_samples'][0].gt_instances.masks = BitmapMasks(masks, 96, 160)
        return {key: 2 * value for key, value in batch.items()} if 'retinanet' in name else batch
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    if name in SEGMENTORS:
        labels = torch.randint(19, (4, 1, 64, 64))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
        return {'inputs': [*images], 'data_samples': samples}
    return {'inputs': images, 'data_samples': [DataSample().set_gt_label(label) for label in (3, 1, 4, 1)]}


def small_config(name: str) -> Config:
    """The config for small images, from random weights."""
    if 'deeplab' in name:
        return smaller_segmentor(name, 64)
    cfg = copy.deepcopy(config(name))
    if 'vit' in name:
        cfg.merge_from_dict({'model.backbone.backbone.img_size': 64})
    if name.endswith('_finetune.py') or name in DETECTORS:
        cfg.merge_from_dict({'model.backbone.backbone.init_cfg': None})
    if 'upernet' in name:
        cfg.merge_from_dict({'model.data_preprocessor.size': (64, 64)})
    if 'cascade' in name:  # no large anchor lies within a small image
        cfg.merge_from_dict({'model.train_cfg.rpn.allowed_border': -1})
    if 'swin' in name:
        cfg.merge_from_dict({'model.backbone.backbone.drop_path_rate': 0.0})
    return cfg


@pytest.mark.parametrize('name', FLAGSHIPS)
def test_step_reaches_every_parameter(name: str) -> None:
    cfg = small_config(name)
    model = build_for_training(cfg)
    for head in model.backbone.local.values():
        for bias in (head.transfer.channel_bias, head.transfer.depthwise_bias):
            if bias is not None:  # as after some steps: s has no effect in front of a norm while B is zero
                torch.nn.init.normal_(bias, std=0.1)
    seen = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, key=key: seen.update({key: p.grad.clone()}))
    step(model, cfg.optim_wrapper, batch_for(name))
    assert seen.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    # UPerNet's 1x1 convolutions with BatchNorm cancel a constant a channel
    cancelled = {'backbone.norm0.bias', 'backbone.norm1.bias'} if 'upernet' in name else set()
    assert set(unreached(model, seen)) <= cancelled


def unreached(model: BaseModel, gradients: dict) -> list[str]:
    """Parameters without a gradient of their own."""
    if not hasattr(model, 'roi_head'):
        return without_gradient(gradients)
    # in single precision a small gradient can't be told from rounding
    return [key for key, gradient in gradients.items() if not (gradient.isfinite().all() and gradient.any())]
