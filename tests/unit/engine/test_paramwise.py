"""To an optim wrapper's constructor, settings of the backbone do not apply to local heads."""

import copy
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmman.engine.paramwise import build_local_optim_wrapper
from tests.configs import read_config

pytest.importorskip('mmpretrain')

SGD = {'type': 'SGD', 'lr': 0.8, 'momentum': 0.9, 'weight_decay': 1e-4}
ROW = 'table1/cifar10_resnet32_k8_dgl_manpp'


@pytest.fixture(scope='module')
def cfg():
    return read_config(ROW)


def options_of(model, cfg, build=build_local_optim_wrapper):
    """Learning rate and weight decay of every parameter, by name."""
    groups = build(model, {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': SGD, **cfg}).optimizer.param_groups
    found = {p: (round(group['lr'], 6), group['weight_decay']) for group in groups for p in group['params']}
    return {name: found[p] for name, p in model.named_parameters() if p in found}


@pytest.fixture(scope='module')
def model(cfg):
    init_default_scope('mmpretrain')
    return MODELS.build(copy.deepcopy(cfg.model))


def by_part(options):
    """The values of the backbone, of the local heads and of the model's own head."""
    parts = {'local': set(), 'backbone': set(), 'head': set()}
    for name, value in options.items():
        part = 'local' if '.local.' in name else name.partition('.')[0]
        parts[part].add(value)
    return parts


def test_a_factor_for_the_backbone_is_not_one_for_local_heads(model):
    slow = {'paramwise_cfg': {'custom_keys': {'backbone': {'lr_mult': 0.1, 'decay_mult': 0.5}}}}
    stock = by_part(options_of(model, slow, build_optim_wrapper))
    assert stock['local'] == stock['backbone']  # what the constructor makes of the names
    ours = by_part(options_of(model, slow))
    assert {rate for rate, _ in ours['backbone']} == {0.08}
    assert ours['local'] == ours['head'] == {(0.8, 1e-4)}


def test_local_heads_have_a_key_of_their_own(model):
    keys = {'backbone': {'lr_mult': 0.1}, 'backbone.local': {'lr_mult': 0.1}, 'transfer.delta': {'decay_mult': 0.0}}
    options = options_of(model, {'paramwise_cfg': {'custom_keys': keys}})
    assert {rate for rate, _ in by_part(options)['local']} == {0.08, 0.8}
    scales = {value for name, value in options.items() if name.endswith('transfer.delta')}
    assert scales == {(0.8, 0.0)}


def test_what_holds_for_all_layers_holds_for_local_heads(model):
    ours = by_part(options_of(model, {'paramwise_cfg': {'norm_decay_mult': 0.0, 'bias_lr_mult': 2.0}}))
    assert {0.0, 1e-4} <= {decay for _, decay in ours['local']}
    assert {0.8, 1.6} == {rate for rate, _ in ours['local']}


def test_the_order_of_groups_and_the_model_stay(model):
    names = [name for name, _ in model.named_parameters()]
    keys = {'backbone': {'lr_mult': 0.1}}
    wrapper = build_local_optim_wrapper(
        model,
        {
            'type': 'mmman.LocalLearningOptimWrapper',
            'optimizer': SGD,
            'paramwise_cfg': {'custom_keys': keys},
        },
    )
    assert [name for name, _ in model.named_parameters()] == names
    position = {p: i for i, p in enumerate(model.parameters())}
    first = [position[group['params'][0]] for group in wrapper.optimizer.param_groups]
    assert first == sorted(first)


@pytest.mark.parametrize('key', ['backbone', 'backbone.local'])
def test_a_run_has_these_rates_and_says_so(cfg, key, tmp_path, caplog):
    cfg = copy.deepcopy(cfg)
    images = {'type': 'FakeData', 'dataset': 'FakeData', 'size': 8, 'image_size': (3, 32, 32), 'num_classes': 10}
    images = {'type': 'mmman.TorchvisionDataset', **{k: v for k, v in images.items() if k != 'type'}}
    loader = {'batch_size': 4, 'num_workers': 0, 'dataset': {**images, 'pipeline': [{'type': 'PackInputs'}]}}
    cfg.merge_from_dict(
        {
            'work_dir': str(tmp_path),
            'experiment_name': f'{tmp_path.name}_{key}',
            'train_cfg': {'max_epochs': 1},
            'optim_wrapper.paramwise_cfg': {'custom_keys': {key: {'lr_mult': 0.1}}},
        }
    )
    cfg.train_dataloader = {**loader, 'sampler': {'type': 'DefaultSampler'}, 'collate_fn': {'type': 'default_collate'}}
    cfg.param_scheduler = [{'type': 'LinearLR', 'start_factor': 0.5, 'by_epoch': False, 'begin': 0, 'end': 1}]
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    runner = Runner.from_cfg(cfg)
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    MMLogger.get_current_instance().addHandler(handler)
    runner.train()

    groups = runner.optim_wrapper.optimizer.param_groups
    rates = {p: group['initial_lr'] for group in groups for p in group['params']}
    by_name = {name: rates[p] for name, p in runner.model.named_parameters() if p in rates}
    base = by_name['head.fc.weight']
    local = {round(rate / base, 6) for name, rate in by_name.items() if '.local.' in name}
    assert local == {1.0 if key == 'backbone' else 0.1}
    assert any('settings of the backbone do not apply to local heads' in line for line in log) == (key == 'backbone')
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    scheduler = runner.param_schedulers[0]
    assert scheduler.optimizer is runner.optim_wrapper.optimizer or scheduler.optimizer is runner.optim_wrapper
