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
# stock config, changes of its backbone, options of LocalBackbone, and for each local head its cut and its levels' strides
STEPS = {
    'r18, K=2': (R18, LIVE, {'num_blocks': 2}, {'layer3_1': [8, 16, 32, 64, 128]}),
    'r18, K=3': (R18, LIVE, {'num_blocks': 3}, {'layer2_1': [8], 'layer3_1': [16, 32, 64, 128]}),
    'r18, K=4': (R18, LIVE, {'num_blocks': 4}, {'layer1_1': [8], 'layer2_1': [16], 'layer3_1': [32, 64, 128]}),
    'r18, K=3 uniform': (R18, LIVE, {'num_blocks': 3, 'partition': 'uniform'}, {}),
    'r18, inside stages': (R18, LIVE, {'partition': ['layer1.0', 'layer2.0', 'layer4.0']}, {}),
    'r50, K=4': (R50, LIVE, {'num_blocks': 4}, {'layer1_2': [8], 'layer2_3': [16], 'layer3_5': [32, 64, 128]}),
    'r50, first stage frozen': (R50, {}, {'num_blocks': 3}, {'layer2_3': [8, 16], 'layer3_5': [32, 64, 128]}),
    'x50-32x4d, K=4': (X101, {'depth': 50, **LIVE}, {'num_blocks': 4}, {}),
    'fcos': (FCOS, {}, {'num_blocks': 3}, {}),
    'atss': (ATSS, LIVE, {'num_blocks': 4}, {}),
    'gfl': (GFL, {}, {'num_blocks': 2}, {}),
    'faster_rcnn': (FASTER_RCNN, LIVE, {'num_blocks': 4}, {}),
}


def localise(cfg: Config, bbox_head: dict | None = None, train_cfg: dict | None = None, **options) -> Config:
    """The three keys, as a user adds them to a stock config."""
    head = {
        'type': 'mmman.DetLocalHead',
        'bbox_head': bbox_head or cfg.model.bbox_head,
        'train_cfg': train_cfg or cfg.model.get('train_cfg'),
    }
    cfg.model.backbone = {'type': 'mmman.LocalBackbone', 'backbone': cfg.model.backbone, 'local_head': head, **options}
    cfg.optim_wrapper.type = 'mmman.LocalLearningOptimWrapper'
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), {'type': 'mmman.EMABiasHook', 'momentum': 0.995}]
    return cfg


def batch() -> dict:
    """One image with objects for every level: small, medium, and as large as the image."""
    from mmdet.structures import DetDataSample

    boxes = torch.tensor([[8.0, 8, 40, 36], [60, 10, 130, 80], [0, 0, 160, 96]])
    sample = DetDataSample(metainfo={'img_shape': (96, 160), 'ori_shape': (96, 160), 'scale_factor': (1, 1)})
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3, 0, 70]))
    return {'inputs': [torch.randint(0, 256, (3, 96, 160), dtype=torch.uint8)], 'data_samples': [sample]}


def build_for_training(cfg: Config) -> BaseModel:
    """A model in which no gradient is zero by construction: no zero-initialised norm, no bias equal to its momentum copy."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.any():
            nn.init.uniform_(module.weight, 0.2, 0.4)
    for head in model.backbone.local.values():
        head.transfer.sync_(model.backbone.get_submodule(head.source))
        for parameter in head.transfer.bias.parameters():
            parameter.data *= 0.9
    return model.train()


def step(model: BaseModel, optim_wrapper_cfg: dict) -> dict[str, Tensor]:
    """Take one training step and return the gradients that the optimizer saw."""
    optim_wrapper = build_optim_wrapper(model, optim_wrapper_cfg)
    gradients = {}
    optim_wrapper.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    model.train_step(batch(), optim_wrapper)
    return gradients


@pytest.mark.parametrize('name', STEPS)
def test_step(name: str) -> None:
    import time
    base, changes, options, levels = STEPS[name]
    t=time.time()
    cfg = get_config(base)
    cfg.model.backbone.update(init_cfg=None, **changes)
    explicit = {}
    if 'bbox_head' not in cfg.model:
        stock = get_config(R50).model
        explicit = {'bbox_head': stock.bbox_head, 'train_cfg': stock.train_cfg}
        explicit['bbox_head'].anchor_generator.strides = cfg.model.rpn_head.anchor_generator.strides
    cfg = localise(cfg, **explicit, **options)
    t1=time.time()
    model = build_for_training(cfg)
    t2=time.time()

    before = {k: v.clone() for k, v in model.named_parameters()}
    gradients = step(model, cfg.optim_wrapper)
    t3=time.time()
    print(name, 'cfg', t1-t, 'build', t2-t1, 'step', t3-t2)
    print({k:h.level_strides for k,h in model.backbone.local.items()}, str(model.backbone.local.plan))
    for k,p in model.named_parameters():
        if not p.requires_grad:
            assert k not in gradients
            assert torch.equal(p, before[k])
        elif k not in gradients:
            print('NO GRAD', k)
        elif not gradients[k].isfinite().all():
            print('NONFINITE', k)
        elif not gradients[k].any():
            print('ZERO', k)
    print({k: v.current() for k, v in MessageHub.get_current_instance().log_scalars.items()})
    MisuseError
