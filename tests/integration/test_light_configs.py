"""The light configs: what they change of the paper's rows, and a training step of each."""

import copy
import re

import pytest
import torch
from mmengine.structures import PixelData

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from tests.alive import without_gradient
from tests.integration.test_configs import (
    CONFIGS,
    build_for_training,
    config,
    image_batch,
    meta_model,
    smaller_segmentor,
    step,
)
from tests.transfer_effect import assert_transfer_has_effect

LIGHT = sorted(str(path.relative_to(CONFIGS)) for path in (CONFIGS / 'light').glob('*.py'))
pytestmark = pytest.mark.filterwarnings('ignore:.*(build_loss|avg_non_ignore|draw is False):UserWarning')


@pytest.mark.parametrize('name', LIGHT)
def test_heads_are_light(name):
    model = meta_model(name)
    local = model.backbone.local
    assert len(local) == int(re.search(r'_k(\d+)', name)[1]) - 1
    for head in local.values():
        light = [head.transfer.channel_bias, head.transfer.depthwise_bias]
        assert head.transfer.bias is None and light.count(None) == 1 and head.transfer.delta is not None
        assert not head.uses_images
        head.check_model(model)
    assert_transfer_has_effect(config(name), model)
    assert config(name).optim_wrapper['update'] == 'immediate'
    assert 'error' not in config(name).get('paper', {})


def batch_for(name):
    if 'retinanet' in name:
        return {key: 2 * value for key, value in image_batch(96, 160).items()}
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    if 'deeplab' in name:
        labels = torch.randint(19, (4, 1, 64, 64))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
        return {'inputs': [*images], 'data_samples': samples}
    return {'inputs': images, 'data_samples': [DataSample().set_gt_label(label) for label in (3, 1, 4, 1)]}


@pytest.mark.parametrize('name', LIGHT)
def test_step_reaches_every_parameter(name):
    cfg = smaller_segmentor(name, 64) if 'deeplab' in name else copy.deepcopy(config(name))
    if 'vit' in name:
        cfg.merge_from_dict({'model.backbone.backbone.img_size': 64})
    if 'retinanet' in name:
        cfg.merge_from_dict({'model.backbone.backbone.init_cfg': None})
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
    assert without_gradient(seen) == []
