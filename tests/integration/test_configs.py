"""Every shipped config builds, and every kind of model that they can be made into takes a training step."""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmman.errors import MisuseError
from tests.conftest import ROOT

pytest.importorskip('mmdet')

CONFIGS = ROOT / 'configs'
FILES = sorted(CONFIGS.rglob('*.py'))
SHIPPED = [str(path.relative_to(CONFIGS)) for path in FILES if path.parent.name != '_base_']
LOCAL = [name for name in SHIPPED if 'manpp' in name]


@functools.cache
def config(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


@functools.cache
def meta_model(name: str) -> BaseModel:
    init_default_scope(config(name).default_scope)
    with torch.device('meta'):
        return MODELS.build(config(name).model)


def end_to_end_twin(name: str) -> str:
    return re.sub(r'manpp_k\d+', 'e2e', name)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_inherits_by_scope_or_relative_path(path: Path) -> None:
    bases = re.search(r'^_base_ = (.*?)$', path.read_text(), re.M)[1]
    for base in re.findall(r"'(.*?)'", bases):
        assert base.startswith(('mmdet::', 'mmseg::', 'mmpretrain::', './', '../'))


@pytest.mark.parametrize('name', [name for name in SHIPPED if name not in LOCAL])
def test_end_to_end_config(name: str) -> None:
    assert all(parameter.requires_grad for parameter in meta_model(name).backbone.parameters())


@pytest.mark.parametrize('name', LOCAL)
def test_local_config(name: str) -> None:
    model = meta_model(name)
    backbone = model.backbone
    stage_ends = [getattr(backbone, stage)[-1] for stage in backbone.res_layers]

    assert not backbone.local.plan.frozen
    assert [backbone.get_submodule(block[-1].output) for block in backbone.local.plan.blocks] == stage_ends
    assert [head.block for head in backbone.local.values()] == [1, 2, 3]
    assert [head.level_strides for head in backbone.local.values()] == [[8], [16], [32, 64, 128]]
    for head in backbone.local.values():
        head.check_model(model)


@pytest.mark.parametrize('name', LOCAL)
def test_local_config_is_its_twin_and_three_keys(name: str) -> None:
    local, twin = copy.deepcopy(config(name)), copy.deepcopy(config(end_to_end_twin(name)))
    keys = {key for key in meta_model(name).state_dict() if not key.startswith('backbone.local.')}

    assert keys == set(meta_model(end_to_end_twin(name)).state_dict())
    assert local.optim_wrapper.type == 'mmman.LocalLearningOptimWrapper'
    assert [hook.type for hook in local.custom_hooks[len(twin.get('custom_hooks', [])) :]] == ['mmman.EMABiasHook']
    local.model.backbone = local.model.backbone.backbone
    for cfg in (local, twin):
        cfg.merge_from_dict({'optim_wrapper.type': None, 'custom_hooks': None})
    assert local.to_dict() == twin.to_dict()


@pytest.mark.parametrize('name', [name for name in SHIPPED if name.startswith('paper/table4')])
def test_recipe_of_table_4(name: str) -> None:
    cfg = config(name)
    backbone = cfg.model.backbone.get('backbone', cfg.model.backbone)

    assert cfg.optim_wrapper.optimizer == {'type': 'Adam', 'lr': 4e-4}
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 64
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == 100
    assert f'retinanet_r{backbone.depth}_' in name
    if 'scratch' in name:
        assert (backbone.init_cfg, backbone.norm_eval, backbone.norm_cfg.type) == (None, False, 'SyncBN')
    else:
        assert backbone.init_cfg.checkpoint == f'torchvision://resnet{backbone.depth}'


@pytest.mark.parametrize('name', [name for name in SHIPPED if name.startswith('release')])
def test_recipe_of_the_release(name: str) -> None:
    cfg = config(name)
    optimizer = cfg.optim_wrapper.optimizer

    assert (optimizer.type, optimizer.lr, cfg.auto_scale_lr.base_batch_size) == ('SGD', 0.01, 16)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 90000)
    assert cfg.param_scheduler[-1].milestones == [60000, 80000]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert [step.scale for step in loader.dataset.pipeline if step.type == 'Resize'] == [(1000, 600)]


LIVE = {'frozen_stages': -1}
R18 = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
R50 = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
X101 = 'mmdet::retinanet/retinanet_x101-32x4d_fpn_1x_coco.py'
FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
ATSS = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
GFL = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'
# Stock config, changes of its backbone, options of LocalBackbone, and the level strides of every local head, by its cut.
STEPS = {
    'r18, K=1': (R18, LIVE, {'num_blocks': 1}, {}),
    'r18, K=2': (R18, LIVE, {'num_blocks': 2}, {'layer2_1': [8, 16, 32, 64, 128]}),
    'r18, K=3': (R18, LIVE, {'num_blocks': 3}, {'layer1_1': [8], 'layer2_1': [16, 32, 64, 128]}),
    'r18, K=4': (R18, LIVE, {'num_blocks': 4}, {'layer1_1': [8], 'layer2_1': [16], 'layer3_1': [32, 64, 128]}),
    'r18, uniform': (
        R18,
        LIVE,
        {'num_blocks': 3, 'partition': 'uniform'},
        {'layer1_1': [8], 'layer3_0': [16, 32, 64, 128]},
    ),
    'r18, cuts inside stages, the first at stride 4': (
        R18,
        LIVE,
        {'partition': ['layer1.0', 'layer2.0', 'layer4.0']},
        {'layer1_0': [8], 'layer2_0': [8, 16], 'layer4_0': [32, 64, 128]},
    ),
    'r50, K=4': (R50, LIVE, {'num_blocks': 4}, {'layer1_2': [8], 'layer2_3': [16], 'layer3_5': [32, 64, 128]}),
    'r50, first stage frozen': (R50, {}, {'num_blocks': 3}, {'layer2_3': [8, 16], 'layer3_5': [32, 64, 128]}),
    'x50-32x4d': (
        X101,
        {'depth': 50, **LIVE},
        {'num_blocks': 4},
        {'layer1_2': [8], 'layer2_3': [16], 'layer3_5': [32, 64, 128]},
    ),
    'fcos': (FCOS, {}, {'num_blocks': 3}, {'layer2_3': [8, 16], 'layer3_5': [32, 64, 128]}),
    'atss': (ATSS, LIVE, {'num_blocks': 4}, {'layer1_2': [8], 'layer2_3': [16], 'layer3_5': [32, 64, 128]}),
    'gfl': (GFL, {}, {'num_blocks': 2}, {'layer2_3': [8, 16, 32, 64, 128]}),
    'faster_rcnn': (FASTER_RCNN, LIVE, {'num_blocks': 4}, {'layer1_2': [4, 8], 'layer2_3': [16], 'layer3_5': [32, 64]}),
}


def localise(base: str, backbone: dict, **options) -> Config:
    """A stock config with the three keys, as a user adds them; a two-stage detector has to name its local heads' dense head."""
    cfg = get_config(base)
    dense = copy.deepcopy(cfg.model)
    if 'bbox_head' not in dense:
        dense = get_config(R50).model
        dense.bbox_head.anchor_generator.strides = cfg.model.rpn_head.anchor_generator.strides
    cfg.model.backbone = {
        'type': 'mmman.LocalBackbone',
        'backbone': {**cfg.model.backbone, 'init_cfg': None, **backbone},
        'local_head': {
            'type': 'mmman.DetLocalHead',
            'bbox_head': dense.bbox_head,
            'train_cfg': dense.get('train_cfg'),
        },
        **options,
    }
    cfg.optim_wrapper.type = 'mmman.LocalLearningOptimWrapper'
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), {'type': 'mmman.EMABiasHook', 'momentum': 0.995}]
    return cfg


def build_for_training(cfg: Config) -> BaseModel:
    """A model in which no gradient is zero by construction: no norm starts at zero, no bias equals its momentum copy."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.uniform_(module.weight, 0.2, 0.4)
    for head in model.backbone.local.values():
        head.transfer.sync_(head.source.of(model.backbone))
        for parameter in head.transfer.bias.parameters():
            parameter.data *= 0.9
    return model.train()


def image_batch(height: int, width: int) -> dict:
    """One image with objects of 30, 70 and 124 pixels, and one as large as the image, which is at least 96x160."""
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo={'img_shape': (height, width), 'ori_shape': (height, width), 'scale_factor': (1, 1)})
    boxes = torch.tensor([[8.0, 8, 40, 36], [60, 10, 130, 80], [0, 0, 160, 96], [0, 0, width, height]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3, 0, 70, 17]))
    return {'inputs': [torch.randint(0, 256, (3, height, width), dtype=torch.uint8)], 'data_samples': [sample]}


def step(model: BaseModel, optim_wrapper_cfg: dict, batch: dict) -> dict[str, Tensor]:
    """Take one training step and return the gradients that the optimizer saw, by parameter."""
    optim_wrapper = build_optim_wrapper(model, optim_wrapper_cfg)
    gradients = {}
    optim_wrapper.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    model.train_step(batch, optim_wrapper)
    return gradients


@pytest.mark.parametrize('name', STEPS)
def test_step_reaches_every_parameter(name: str) -> None:
    base, backbone, options, levels = STEPS[name]
    cfg = localise(base, backbone, **options)
    model = build_for_training(cfg)
    hub = MessageHub.get_instance(name)
    # the anchors of the third head in ATSS are for objects from 181 pixels
    gradients = step(model, cfg.optim_wrapper, image_batch(160, 256) if name == 'atss' else image_batch(96, 160))

    assert {key: head.level_strides for key, head in model.backbone.local.items()} == levels
    assert gradients.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any('.momentum.' in key for key in gradients)
    # the scale of one level's boxes: no object of a test image fits the coarsest levels
    reached = {key for key, gradient in gradients.items() if gradient.isfinite().all() and gradient.any()}
    assert [key for key in gradients.keys() - reached if '.scales.' not in key] == []
    assert {f'train/local/{j}/loss' for j in range(1, len(levels) + 1)} <= hub.log_scalars.keys()


@pytest.mark.parametrize(('base', 'own_head'), [(R18, 'bbox_head'), (FASTER_RCNN, 'roi_head.bbox_head')])
def test_another_number_of_classes_is_refused(base: str, own_head: str) -> None:
    cfg = localise(base, LIVE, num_blocks=2)
    cfg.merge_from_dict({f'model.{own_head}.num_classes': 20})
    model = build_for_training(cfg)

    with pytest.raises(MisuseError, match=r'num_classes=80, the model 20: set model\.backbone\.local_head'):
        step(model, cfg.optim_wrapper, image_batch(96, 160))
