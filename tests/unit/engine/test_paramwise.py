"""To an optim wrapper's constructor, settings of the backbone do not apply to local heads."""

import copy
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmman import localize_
from mmman.engine.paramwise import build_local_optim_wrapper
from mmman.runtime.stock_config import StockConfig
from tests import toy  # noqa: F401
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


SWIN = {'embed_dims': 4, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1), 'mlp_ratio': 1}
CONVNEXT = {'arch': {'depths': [1, 1, 1, 1], 'channels': [4, 4, 4, 4]}}
LAYERS = {'num_layers': 4, 'num_heads': 2, 'img_size': 32}
BEIT = {'embed_dims': 8, **LAYERS, 'out_indices': [3]}
VIT = {'arch': {'embed_dims': 8, 'feedforward_channels': 16, 'num_layers': 4, 'num_heads': 2}, 'img_size': 32}
SWIN_ARCH = {'arch': {'embed_dims': 4, 'depths': [1, 1, 1, 1], 'num_heads': [1, 1, 1, 1]}}
# stock config: what makes its backbone small; rates of the backbone's first layer and of local heads, by the base rate
STOCK = {
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py': (SWIN, 0.1, 1.0),
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py': (CONVNEXT, 0.95**7, 1.0),
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': (CONVNEXT, 0.9**7, 1.0),
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py': (BEIT, 0.9**13, 1.0),
    'mmseg::setr/setr_vit-l_naive_8xb1-80k_cityscapes-768x768.py': (BEIT, 1.0, 10.0),
    'mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py': (VIT, 0.65**5, 1.0),
    'mmpretrain::simmim/benchmarks/swin-base-w7_8xb256-coslr-100e_in1k.py': (SWIN_ARCH, 0.9**5, 1.0),
    'mmpretrain::spark/benchmarks/resnet50_8xb256-coslr-300e_in1k.py': ({'base_channels': 4}, 0.7**7, 1.0),
    'mmpretrain::csra/resnet101-csra_1xb16_voc07-448px.py': ({'depth': 18, 'base_channels': 4}, 1.0, 10.0),
}


class Model(nn.Module):
    """As much of a model as a constructor looks at."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)

    def get_layer_depth(self, name):
        return self.backbone.get_layer_depth(name, 'backbone.')


@pytest.mark.parametrize('stock', STOCK)
def test_settings_of_stock_configs(stock):
    """Local heads learn as fast as the model's own head, and the copy B decays like any unit."""
    pytest.importorskip(stock.partition('::')[0])
    small, slowest, fast = STOCK[stock]
    cfg = StockConfig.read(stock).cfg
    init_default_scope(stock.partition('::')[0])
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None, **small})
    model = Model(localize_(backbone, num_blocks=2, local_head={'type': 'mmman.ToyLocalHead'}))
    wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key in ('optimizer', 'constructor', 'paramwise_cfg')}
    wrapper['optimizer'] = {**SGD, 'weight_decay': wrapper['optimizer'].get('weight_decay', 0.0)}
    optimizer = build_local_optim_wrapper(model, {'type': 'mmman.LocalLearningOptimWrapper', **wrapper}).optimizer
    groups = {p: group for group in optimizer.param_groups for p in group['params']}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = {name: groups[p]['lr'] / SGD['lr'] for name, p in trained.items()}
    assert min(rate for name, rate in rates.items() if '.local.' not in name) == pytest.approx(slowest)
    local = {round(rate, 6) for name, rate in rates.items() if '.local.' in name and not name.endswith('bias_table')}
    assert local == {rates['head.weight']} == {fast}
    weights = [p for name, p in trained.items() if '.transfer.bias.' in name and name.endswith('.weight') and p.ndim > 1]
    assert weights and {groups[p]['weight_decay'] for p in weights} == {wrapper['optimizer']['weight_decay']}


def test_a_key_for_biases_does_not_match_the_copy_b(model):
    keys = {'.bias': {'decay_mult': 0.0}, 'transfer.bias': {'lr_mult': 0.5}}
    options = options_of(model, {'paramwise_cfg': {'custom_keys': keys}})
    assert {value for name, value in options.items() if '.transfer.bias.' in name} == {(0.4, 1e-4)}
    assert options['head.fc.bias'] == (0.8, 0.0)
    assert hasattr(next(iter(model.backbone.local.values())).transfer, 'bias')
