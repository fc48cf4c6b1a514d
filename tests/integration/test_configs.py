"""Every shipped config builds, and every kind of model that they can be made into takes a training step."""

import ast
import copy
import functools
import math
import re
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmman.engine.config_check import check_config
from mmman.errors import ConfigError
from mmman.heads import DGLLocalHead, InfoProLocalHead, LAMLocalHead, LinearLocalHead, SegLocalHead, ViTLocalHead
from tests.alive import without_gradient
from tests.configs import CONFIGS, read_config
from tests.transfer_effect import assert_transfer_has_effect
from tools.benchmarks.training_rows.paper_rows import paper_rows

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')
pytestmark = [
    pytest.mark.filterwarnings('ignore:Unnecessary conv bias:UserWarning'),  # mmpretrain's VGG with BN
    pytest.mark.filterwarnings('ignore:.*(build_loss|avg_non_ignore|draw is False):UserWarning'),  # any segmentor of mmseg
]

FILES = sorted(CONFIGS.rglob('*.py'))
DEMO = 'demo/retinanet_r18_manpp_k2_shapes.py'
# flagships, and the demo, which is one in small, are in test_flagships.py
SHIPPED = [
    name
    for path in FILES
    if path.parent != CONFIGS and path.parent.name != '_base_' and path.name != 'rows.py'
    if (name := str(path.relative_to(CONFIGS))) != DEMO
] + [*paper_rows()]
DETECTORS = [name for name in SHIPPED if 'retinanet' in name]
SEGMENTORS = [name for name in SHIPPED if 'deeplab' in name]
CLASSIFIERS = [name for name in SHIPPED if name not in DETECTORS + SEGMENTORS]
PAPER = [name for name in CLASSIFIERS if name in paper_rows()]
STOCK_RECIPES = [name for name in CLASSIFIERS if name not in paper_rows()]
END_TO_END = [name for name in SHIPPED if '_e2e' in name]


@functools.cache
def config(name: str) -> Config:
    return read_config(name)


def build_model(cfg: Config) -> BaseModel:
    """As the runner does: in mmpretrain's configs the data preprocessor stands beside the model."""
    init_default_scope(cfg.default_scope)
    outside = {key: cfg[key] for key in ('data_preprocessor',) if key in cfg}
    return MODELS.build(copy.deepcopy({**outside, **cfg.model}))  # mmseg's segmentors write into their config


models = {}


def meta_model(name: str) -> BaseModel:
    """The model of a config on the meta device; rows that differ in the data and its normalisation alone share it."""
    cfg = config(name)
    check_config(cfg)
    key = str(cfg.model)
    if key not in models:
        # mmpretrain reads its drop path rates off a tensor
        with torch.device('meta'), patch('torch.linspace', functools.partial(torch.linspace, device='cpu')):
            models[key] = build_model(cfg)
    return models[key]


def end_to_end_twin(name: str) -> str:
    """The config of the same model and recipe, trained end to end."""
    if name in SEGMENTORS:
        network, start = re.search(r'deeplabv3(plus)?_r\d+', name)[0], 'scratch' if 'scratch' in name else 'pretrained'
        return f'table5/{network}_e2e_{start}'
    name = name.replace('mlaan/', 'table1/').replace('table7/cifar10', 'table1/cifar10').replace('table7/imagenet_', 'table2/')
    return re.sub(r'manpp_k\d+', 'e2e', name) if name in DETECTORS else re.sub(r'_k\d+_\w+', '_e2e', name)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_inherits_by_scope_or_relative_path(path: Path) -> None:
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    bases = next((ast.literal_eval(node.value) for node in assigned if node.targets[0].id == '_base_'), [])
    for base in [bases] if isinstance(bases, str) else bases:
        assert base.startswith(('mmdet::', 'mmseg::', 'mmpretrain::', './', '../'))


@pytest.mark.parametrize('name', END_TO_END)
def test_end_to_end_config(name: str) -> None:
    model = meta_model(name)
    assert not hasattr(model.backbone, 'local')
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize('name', [name for name in DETECTORS if name not in END_TO_END])
def test_local_detector(name: str) -> None:
    model = meta_model(name)
    backbone = model.backbone
    stage_ends = [getattr(backbone, stage)[-1] for stage in backbone.res_layers]

    assert not backbone.local.plan.frozen
    assert [backbone.get_submodule(block[-1].output) for block in backbone.local.plan.blocks] == stage_ends
    assert [head.block for head in backbone.local.values()] == [1, 2, 3]
    assert [head.level_strides for head in backbone.local.values()] == [[8], [16], [32, 64, 128]]
    for head in backbone.local.values():
        head.check_model(model)
    assert_transfer_has_effect(config(name), model)


@pytest.mark.parametrize('name', [name for name in SHIPPED if name not in END_TO_END + STOCK_RECIPES])
def test_local_config_is_its_twin_and_three_keys(name: str) -> None:
    local, twin = copy.deepcopy(config(name)), copy.deepcopy(config(end_to_end_twin(name)))
    keys = {key for key in meta_model(name).state_dict() if not key.startswith('backbone.local.')}

    assert keys == set(meta_model(end_to_end_twin(name)).state_dict())
    assert local.optim_wrapper.type == 'mmman.LocalLearningOptimWrapper'
    assert [hook.type for hook in local.custom_hooks[len(twin.get('custom_hooks', [])) :]] == ['mmman.EMABiasHook']
    local.model.backbone = local.model.backbone.backbone
    for cfg in (local, twin):  # over which parameters one norm clips is a question of blocks
        cfg.merge_from_dict({'optim_wrapper.type': None, 'optim_wrapper.clip_scope': None, 'custom_hooks': None, 'paper': None})
    assert local.to_dict() == twin.to_dict()


# The last units of the first K-1 blocks, by network and K.
CUTS = {
    ('resnet32', 8): ['layer1.0', 'layer1.2', 'layer1.4', 'layer2.1', 'layer2.3', 'layer3.0', 'layer3.2'],
    ('resnet32', 16): ['stem', *(f'layer{i}.{j}' for i in (1, 2, 3) for j in range(5))][:-1],
    ('resnet110', 32): [
        f'layer{stage}.{unit}'
        for stage, units in enumerate(
            (
                (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17),
                (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17),
                (1, 3, 4, 6, 7, 9, 11, 13, 15),
            ),
            start=1,
        )
        for unit in units
    ],
    ('resnet110', 55): ['stem', *(f'layer{i}.{j}' for i in (1, 2, 3) for j in range(18))][:-1],
    ('resnet101', 2): ['layer2.0'],
    ('resnet101', 4): ['layer2.2', 'layer3.8', 'layer3.16'],
    ('resnext101', 2): ['layer2.0'],
    ('resnext101', 4): ['layer2.2', 'layer3.8', 'layer3.16'],
    ('resnet152', 2): ['layer2.5'],
    ('resnet152', 4): ['layer2.6', 'layer3.13', 'layer3.25'],
    ('vgg13', 10): [f'features.{i}' for i in (0, 1, 3, 4, 6, 7, 9, 10, 12)],
    ('vit', 4): ['layers.2', 'layers.5', 'layers.8'],
    ('vit', 6): [f'layers.{i}' for i in (1, 3, 5, 7, 9)],
}
# InfoPro's weight of the reconstruction at every local head of Table I, by K: it falls with the stage of the next block.
LAMBDA_REC = {
    8: [5 * 5 / 6] * 2 + [5 * 4 / 6] * 3 + [2.5] * 2,
    16: [5] + [5 * 13 / 14] * 4 + [5 * 12 / 14] * 5 + [5 * 11 / 14] * 5,
    32: [5 * 29 / 30] * 10 + [5 * 28 / 30] * 11 + [4.5] * 10,
    55: [5] + [5 * 52 / 53] * 17 + [5 * 51 / 53] * 18 + [5 * 50 / 53] * 18,
}
MAN = (True, True, False)
TRANSFERS = {'manpp': (True, True, True), 'man': MAN, 'lam': MAN, 'mlaan': MAN, 'ema': (True, False, False)}


@pytest.mark.parametrize('name', [name for name in CLASSIFIERS if name not in END_TO_END])
def test_local_classifier_is_what_its_name_says(name: str) -> None:
    words = re.split(r'[_/.-]', name.removeprefix('mlaan/'))
    net = next(word for word in words if word.startswith(('resn', 'vgg', 'vit')))
    num_blocks = int(re.search(r'_k(\d+)', name)[1])
    model = meta_model(name)
    local = model.backbone.local
    heads = [*local.values()]
    cuts = [block[-1].name for block in local.plan.blocks[:-1]]

    assert [head.block for head in heads] == [*range(1, num_blocks)]
    assert cuts == CUTS[net, num_blocks]
    expected = next((TRANSFERS[word] for word in words if word in TRANSFERS), (False, False, False))
    for head in heads:
        transfer = head.transfer
        assert tuple(part is not None for part in (transfer.momentum, transfer.bias, transfer.delta)) == expected
        assert transfer.channel_bias is None and transfer.rho is None
        head.check_model(model)
    assert_transfer_has_effect(config(name), model)

    is_infopro = 'infopro' in words or (net == 'resnet101' and num_blocks == 4)
    is_leap = 'lam' in words or 'mlaan' in words
    kind = InfoProLocalHead if is_infopro else ViTLocalHead if net == 'vit' else LAMLocalHead if is_leap else DGLLocalHead
    assert {type(head) for head in heads} == {kind}
    assert local.window == (2 if 'mlaan' in words else 1)
    assert {type(head.independent) for head in heads} == {LinearLocalHead if 'mlaan' in words else type(None)}
    if is_leap:
        stages = [(head.source.stage, head.source.stage - local.plan.blocks[head.block - 1][-1].stage) for head in heads]
        assert {*stages} == {(1, 1), (2, 1), (2, 0)}
    if is_infopro:
        weights = [(head.lambda_rec, head.lambda_task) for head in heads]
        if net in ('resnet32', 'resnet110'):
            assert weights == [pytest.approx((rec, rec / 10)) for rec in LAMBDA_REC[num_blocks]]
        else:
            assert weights == [(5, 1.0 if net == 'resnet152' else 0.75)] * (num_blocks - 1)
    if net == 'vgg13':
        assert all(head.fcs[0][0].in_features == 4 * head.feature.channels for head in heads)


SGD = {'type': 'SGD', 'momentum': 0.9, 'nesterov': True, 'weight_decay': 1e-4}
# Optimizer, batch, GPUs and epochs, by the first word of a row that is in them.
RECIPES = {
    'cifar10': (SGD | {'lr': 0.8}, 1024, 1, 400),
    'svhn': (SGD | {'lr': 0.8}, 1024, 1, 400),
    'stl10': (SGD | {'lr': 0.1}, 128, 1, 400),
    'vit': ({'type': 'Adam', 'lr': 1e-3}, 1024, 8, 100),
    'vgg13': (SGD | {'lr': 0.2}, 512, 8, 90),
    'resnext101': (SGD | {'lr': 0.2}, 512, 8, 90),
    'resnet101': (SGD | {'lr': 0.4}, 1024, 8, 90),
    'resnet152': (SGD | {'lr': 0.4}, 1024, 8, 90),
}


@pytest.mark.parametrize('name', [name for name in CLASSIFIERS if name in END_TO_END or name in STOCK_RECIPES])
def test_recipe_of_the_classifiers(name: str) -> None:
    cfg = config(name)
    optimizer, batch, gpus, epochs = next(recipe for word, recipe in RECIPES.items() if word in name)
    schedule = [cfg.param_scheduler] if isinstance(cfg.param_scheduler, dict) else cfg.param_scheduler

    assert {key: cfg.optim_wrapper.optimizer.get(key) for key in optimizer} == optimizer
    assert bool(cfg.optim_wrapper.optimizer.get('weight_decay')) == ('weight_decay' in optimizer)
    assert cfg.train_dataloader.batch_size * gpus == cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.train_cfg.max_epochs == schedule[-1].get('end', epochs) == epochs
    assert schedule[-1].type == 'CosineAnnealingLR'
    if name in STOCK_RECIPES:
        return  # the rest is the stock config's
    warm_up = 10 if 'table1' in name else 5 if 'vit' in name else 0
    assert [step.type for step in schedule] == ['LinearLR', 'CosineAnnealingLR'][not warm_up :]
    assert schedule[0].get('convert_to_iter_based', False) == bool(warm_up)
    if warm_up:
        assert (schedule[0].begin, schedule[0].end) == (0, warm_up)
    if 'table1' in name:
        assert schedule[0].start_factor * optimizer['lr'] == pytest.approx(0.01)
        assert schedule[1].begin == 0
    assert schedule[-1].T_max == schedule[-1].end - schedule[-1].begin
    assert 'eta_min' not in schedule[-1]
    assert epochs % cfg.train_cfg.val_interval == 0


def test_learning_rates_of_cifar_are_those_of_the_authors() -> None:
    """Their warm-up multiplies the cosine, from 0.01, and steps by epochs; ours by iterations, here two an epoch."""
    schedule = copy.deepcopy(config('table1/cifar10_resnet32_e2e').param_scheduler)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.8)
    schedulers = [
        PARAM_SCHEDULERS.build({**step, 'optimizer': optimizer}, default_args={'epoch_length': 2}) for step in schedule
    ]
    rates = []
    for iteration in range(800):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % 2:
                scheduler.step()

    def authors(epoch: int) -> float:
        cosine = 0.4 * (1 + math.cos(math.pi * epoch / 400))
        return cosine * epoch / 10 + 0.01 * (10 - epoch) / 10 if epoch < 10 else cosine

    assert rates[::2] == pytest.approx([authors(epoch) for epoch in range(400)], rel=0.06)
    assert rates[20::2] == pytest.approx([authors(epoch) for epoch in range(10, 400)], rel=1e-6)


# Side, padding, flips and class of the images; mean and standard deviation of their pixels.
IMAGES = {
    'cifar10': (32, 4, True, 'CIFAR10', [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    'svhn': (32, 2, False, 'SVHN', [127.5] * 3, [127.5] * 3),
    'stl10': (96, 4, True, 'STL10', [127.5] * 3, [127.5] * 3),
}


@pytest.mark.parametrize('name', [name for name in END_TO_END if 'table1' in name])
def test_images_of_table_1(name: str) -> None:
    size, padding, flips, kind, mean, std = next(images for word, images in IMAGES.items() if word in name)
    cfg = config(name)
    init_default_scope(cfg.default_scope)
    for split in ('train', 'val', 'test'):
        dataset = DATASETS.build({**cfg[f'{split}_dataloader'].dataset, 'lazy_init': True})
        image = np.zeros((size, size, 3), dtype=np.uint8)
        assert dataset.pipeline({'img': image, 'gt_label': 3})['inputs'].shape == (3, size, size)
        assert dataset.split == ('train' if split == 'train' else 'test')
        assert kind in (type(dataset).__name__, cfg[f'{split}_dataloader'].dataset.get('dataset'))
        assert cfg[f'{split}_dataloader'].batch_size == cfg.train_dataloader.batch_size
    crop, *rest = cfg.train_dataloader.dataset.pipeline
    assert (crop.crop_size, crop.padding) == (size, padding)
    assert crop.get('padding_mode', 'constant') == ('reflect' if kind == 'CIFAR10' else 'constant')
    assert (cfg.data_preprocessor.mean, cfg.data_preprocessor.std) == (mean, std)
    assert [step.type for step in rest] == ['RandomFlip', 'PackInputs'][not flips :]
    assert not cfg.data_preprocessor.get('to_rgb')


@pytest.mark.parametrize('name', [name for name in END_TO_END if name in CLASSIFIERS])
def test_classifier_runs_at_its_image_size(name: str) -> None:
    size = next((images[0] for word, images in IMAGES.items() if word in name), 224)
    classes = 1000 if 'table2' in name else 10
    model = meta_model(name)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size, device='meta')).shape == (2, classes)
    assert config(name).data_preprocessor.num_classes == classes


def test_rows_of_the_paper() -> None:
    tables = {'table1': ('I', 78), 'table2': ('II', 34), 'table7': ('VII', 8)}
    for folder, (table, count) in tables.items():
        rows = {name: config(name).paper for name in paper_rows() if name.startswith(f'{folder}/')}
        assert len(rows) == count
        for name, paper in rows.items():
            on_imagenet = 'table2' in name or 'imagenet' in name
            assert paper.keys() == {'table', 'error', *(['error_top5'] if on_imagenet else [])}
            assert paper.table == (table if table != 'VII' else f'VII {"b" if on_imagenet else "a"}')
        for name in [name for name in rows if '_manpp' in name and 'vit' not in name]:
            others = [name.replace('_manpp', other) for other in ('_manpp', '_man', '_ema', '', '_dgl', '_infopro')]
            errors = [rows[other] for other in others if other in rows]
            assert len(errors) == (4 if table == 'VII' else 3)
            for less, more in pairwise(errors):
                assert all(less[key] < more[key] for key in more if key != 'table'), name


@pytest.mark.parametrize('name', [name for name in SEGMENTORS if name not in END_TO_END])
def test_local_segmentor_is_what_its_name_says(name: str) -> None:
    words = re.split(r'[_/.]', name)
    model, cfg = meta_model(name), config(name)
    (head,) = model.backbone.local.values()
    own, theirs = model.decode_head, head.decode_head

    assert type(own).__name__ == ('DepthwiseSeparableASPPHead' if 'deeplabv3plus' in words else 'ASPPHead')
    assert len(model.backbone.layer3) == (23 if 'r101' in words else 6)
    assert head.unit == ('layer3.12' if 'r101' in words else 'layer3.2')
    assert (head.block, head.feature.channels, head.feature.stride) == (1, 1024, 8)
    assert model.auxiliary_head.in_index == 2  # what the last block makes: layer3 to its end

    transfer = head.transfer
    expected = next((TRANSFERS[word] for word in words if word in TRANSFERS), (False, False, False))
    assert tuple(part is not None for part in (transfer.momentum, transfer.bias, transfer.delta)) == expected
    assert transfer.channel_bias is None and transfer.rho is None
    assert_transfer_has_effect(cfg, model)

    assert type(head) is SegLocalHead
    assert cfg.model.backbone.local_head.decode_head == cfg.model.decode_head
    for shared in ('num_classes', 'out_channels', 'ignore_index', 'align_corners', 'norm_cfg', 'sampler', 'threshold'):
        assert getattr(theirs, shared) == getattr(own, shared)
    assert (own.num_classes, own.ignore_index) == (19, 255)
    assert repr(theirs.loss_decode) == repr(own.loss_decode)
    assert (head.lambda_rec, head.lambda_task) == (1.5, 1.0)
    assert head.decoder is not None
    head.check_model(model)


@pytest.mark.parametrize('name', [name for name in SEGMENTORS if name in END_TO_END or name not in paper_rows()])
def test_recipe_of_the_segmentors(name: str) -> None:
    cfg = config(name)
    (schedule,) = cfg.param_scheduler
    crops = [step.crop_size for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomCrop']

    assert cfg.optim_wrapper.optimizer == {'type': 'SGD', 'lr': 0.8, 'momentum': 0.9, 'weight_decay': 1e-4}
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 128
    assert cfg.train_cfg.max_iters == schedule.end == 4000
    assert (schedule.type, schedule.power, schedule.begin, schedule.by_epoch) == ('PolyLR', 0.9, 0, False)
    assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    assert [cfg.model.data_preprocessor.size] == crops == [(768, 768)]
    depth = 101 if 'r101' in name else 50
    assert cfg.model.pretrained == (None if 'scratch' in name else f'open-mmlab://resnet{depth}_v1c')


def test_rows_of_table_5() -> None:
    rows = {name: config(name).paper for name in SEGMENTORS if name.startswith('table5/')}
    assert len(rows) == 32
    accuracies = {'mean_iou', 'mean_acc', 'overall_acc'}
    for name in [name for name in rows if '_manpp' in name]:
        paper, man, infopro = (rows[name.replace('_manpp', other)] for other in ('_manpp', '_man', ''))
        e2e = rows[end_to_end_twin(name)]
        assert paper.keys() == {'table', *accuracies}
        assert e2e.keys() == infopro.keys() == {'table', *accuracies, 'memory_gb'}
        assert man.keys() == {'table', 'memory_gb'}
        assert (paper.table, e2e.table, infopro.table, man.table) == ('V', 'V', 'V', 'VI')
        assert all(infopro[key] < e2e[key] < paper[key] for key in accuracies), name
        assert infopro.memory_gb < man.memory_gb < e2e.memory_gb


@pytest.mark.parametrize('name', [name for name in SHIPPED if name.startswith('table4')])
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
    (schedule,) = cfg.param_scheduler  # without a warm-up
    assert (schedule.type, schedule.milestones, schedule.gamma) == ('MultiStepLR', [60000, 80000], 0.1)
    assert cfg.optim_wrapper.clip_grad == {'max_norm': 1.0}
    assert cfg.optim_wrapper.get('clip_scope', 'global') == 'global'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert [step.scale for step in loader.dataset.pipeline if step.type == 'Resize'] == [(1000, 600)]


@pytest.mark.parametrize('name', [name for name in SHIPPED if name.startswith('release')])
def test_networks_and_losses_of_the_release(name: str) -> None:
    model, heads = meta_model(name), []
    norms = [module for module in model.train().modules() if isinstance(module, _BatchNorm)]
    assert {(type(module), module.training) for module in norms} == {(nn.BatchNorm2d, True)}
    if name not in END_TO_END:
        heads = [*model.backbone.local.values()]
        assert [type(head.transfer.rho) for head in heads] == [nn.Parameter] * 3
    for head in heads:
        assert head.gt_size_range is None
        assert head.projection.relu
        assert head.bbox_head.stacked_convs == 2
    for dense in (model.bbox_head, *(head.bbox_head for head in heads)):
        assert type(dense).__name__ == 'ReleaseRetinaHead'
        assert (type(dense.loss_bbox).__name__, dense.loss_bbox.beta) == ('SmoothL1Loss', 1.0)
        assert dense.prior_generator.center_offset == 0.5
        assert not dense.assigner.match_low_quality
        assert (dense.assigner.pos_iou_thr, dense.assigner.neg_iou_thr) == (0.5, 0.4)


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
    """A model in which no gradient is zero by construction; in double precision, unless mmcv's NMS takes proposals of it.

    No layer starts at zero, no bias of a transfer equals its momentum copy.
    """
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.Linear)) and not module.weight.any():
            nn.init.uniform_(module.weight, 0.2, 0.4)
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
        for copied in head.transfer.copies[1:]:
            for parameter in copied.parameters():
                parameter.data *= 0.9
    return model.train() if hasattr(model, 'roi_head') else model.train().double()


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
    if hasattr(model, 'roi_head'):  # in single precision a small gradient can't be told from rounding
        reached = {key for key, gradient in gradients.items() if gradient.isfinite().all() and gradient.any()}
        assert [key for key in gradients.keys() - reached if '.scales.' not in key] == []
    else:
        assert [key for key in without_gradient(gradients) if '.scales.' not in key] == []
    assert {f'train/local/{j}/loss' for j in range(1, len(levels) + 1)} <= hub.log_scalars.keys()


def exact_options(in_channels: list[int]) -> dict:
    """The options of docs/howto/fit_memory.md that train the same in less memory."""
    return {
        'model.backbone.recompute': ['stem', 'layer1', 'layer2', 'layer3', 'layer4'],
        'model.backbone.backbone.out_indices': (1, 2, 3),
        'model.neck.in_channels': in_channels,
        'model.neck.start_level': 0,
        'optim_wrapper.images_per_chunk': 1,
        'optim_wrapper.update': 'immediate',
    }


@pytest.mark.parametrize(('network', 'in_channels'), [('r18', [128, 256, 512]), ('r50', [512, 1024, 2048])])
def test_the_options_that_save_memory_train_the_same(network: str, in_channels: list[int]) -> None:
    batch = {key: 2 * value for key, value in image_batch(96, 160).items()}
    states = []
    for options in (exact_options(in_channels), {}):
        cfg = copy.deepcopy(config(f'paper/retinanet_{network}_manpp_k4.py'))
        cfg.merge_from_dict({'model.backbone.backbone.init_cfg': None, **options})
        model = build_for_training(cfg)
        model.train_step(copy.deepcopy(batch), build_optim_wrapper(model, cfg.optim_wrapper))
        states.append(model.state_dict())
    for (key, ours), theirs in zip(states[0].items(), states[1].values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f'{key}: {text}')


# Smaller models and images of the same kind, and how many local heads they have.
CLASSIFIER_STEPS = {
    'paper/resnet32_manpp_k16_cifar10.py': ({}, 32, 15),
    'paper/resnet101_manpp_k4_imagenet.py': ({}, 64, 3),
    'mlaan/cifar10_resnet32_k16_mlaan': ({}, 32, 15),
    'mlaan/cifar10_resnet110_k32_mlaan': ({}, 32, 31),
}


@pytest.mark.parametrize('name', CLASSIFIER_STEPS)
def test_step_of_a_classifier_reaches_every_parameter(name: str) -> None:
    from mmpretrain.structures import DataSample

    smaller, size, heads = CLASSIFIER_STEPS[name]
    cfg = copy.deepcopy(config(name))
    cfg.merge_from_dict(smaller)
    model = build_for_training(cfg)
    batch = {
        'inputs': torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8),
        'data_samples': [DataSample().set_gt_label(label) for label in (3, 1, 4, 1)],
    }
    hub = MessageHub.get_instance(name)
    gradients = step(model, cfg.optim_wrapper, batch)

    assert gradients.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any('.momentum.' in key for key in gradients)
    assert without_gradient(gradients) == []
    assert {f'train/local/{j}/loss' for j in range(1, heads + 1)} <= hub.log_scalars.keys()


def smaller_segmentor(name: str, size: int) -> Config:
    """The config of a segmentor at an eighth of its width, from random weights, for crops of ``size`` pixels."""
    cfg = copy.deepcopy(config(name))
    network = {'type': 'FCNHead', 'channels': 16, 'num_convs': 1, 'concat_input': False}
    cfg.merge_from_dict(
        {
            'model.pretrained': None,
            'model.data_preprocessor.size': (size, size),
            'model.backbone.backbone.base_channels': 8,
            'model.backbone.local_head.network': network,
            'model.decode_head': {'in_channels': 256, 'channels': 16},
            'model.auxiliary_head': {'in_channels': 128, 'channels': 16},
        }
    )
    if 'c1_in_channels' in cfg.model.decode_head:
        cfg.model.decode_head.update(c1_in_channels=32, c1_channels=8)
    return cfg


@pytest.mark.parametrize('name', [name for name in SEGMENTORS if name not in paper_rows()])
def test_step_of_a_segmentor_reaches_every_parameter(name: str) -> None:
    from mmseg.structures import SegDataSample

    cfg = smaller_segmentor(name, 64)
    model = build_for_training(cfg)
    labels = torch.randint(19, (2, 1, 64, 48))  # narrower than the batch, which pads it
    labels[:, :, :4] = 255
    batch = {
        'inputs': [*torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)],
        'data_samples': [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels],
    }
    hub = MessageHub.get_instance(name)
    gradients = step(model, cfg.optim_wrapper, batch)

    assert gradients.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any('.momentum.' in key for key in gradients)
    assert without_gradient(gradients) == []
    assert {f'train/local/1/{key}' for key in ('loss', 'loss_ce', 'loss_rec', 'acc_seg')} <= hub.log_scalars.keys()


def test_segmentor_trains_on_images_laid_out_as_cityscapes(test_data: Path, tmp_path: Path) -> None:
    cfg = smaller_segmentor('paper/deeplabv3_r50_manpp_k2.py', 96)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.merge({'num_workers': 0, 'persistent_workers': False})
        loader.dataset.merge({'data_root': str(test_data / 'camvid'), 'indices': 4})
    cfg.merge_from_dict(
        {
            'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.pipeline.2.scale': (240, 180),
            'train_dataloader.dataset.pipeline.3.crop_size': (96, 96),
            'val_dataloader.dataset.pipeline.1.scale': (120, 90),
            'train_cfg': {'max_iters': 2, 'val_interval': 2},
            'auto_scale_lr.enable': True,
            'work_dir': str(tmp_path),
            'experiment_name': tmp_path.name,
        }
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    logged = {key for key in runner.message_hub.log_scalars if key.startswith(('train/local/', 'val/'))}

    assert {'val/mIoU', 'val/mAcc', 'val/aAcc', 'train/local/1/loss_ce', 'train/local/1/loss_rec', 'train/local/1/s'} <= logged
    assert runner.optim_wrapper.optimizer.param_groups[0]['initial_lr'] == pytest.approx(0.8 * 2 / 128)


@pytest.mark.parametrize(('base', 'own_head'), [(R18, 'bbox_head'), (FASTER_RCNN, 'roi_head.bbox_head')])
def test_another_number_of_classes_is_refused(base: str, own_head: str) -> None:
    cfg = localise(base, LIVE, num_blocks=2)
    cfg.merge_from_dict({f'model.{own_head}.num_classes': 20})
    model = build_for_training(cfg)

    with pytest.raises(
        ConfigError, match=r'num_classes=80, but the model has 20: set num_classes=20 in model\.backbone\.local_head'
    ):
        step(model, cfg.optim_wrapper, image_batch(96, 160))
