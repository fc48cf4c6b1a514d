"""A first step of a localised model on random data: what gets no gradient, and whose fault it is if the step fails."""

import copy

import pytest
import torch
from mmengine.config import Config

from mmman import DGLLocalHead
from mmman.analysis.dry_step import SIDES, dry_step
from mmman.errors import ConfigError
from mmman.registry import MODELS

pytest.importorskip('mmpretrain')
from mmpretrain.models import LinearClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS


@MODELS.register_module()
class IdleHead(DGLLocalHead):
    """A local head with a parameter that its loss does not use."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.idle = torch.nn.Parameter(torch.zeros(1))


@MODELS.register_module()
class FailingLocalHead(DGLLocalHead):
    def loss(self, y, inputs, data_samples):
        raise KeyError('gt_text')


@MMPRETRAIN_MODELS.register_module()
class FailingHead(LinearClsHead):
    """A task head that needs more than an image and a label."""

    def loss(self, feats, data_samples, **options):
        raise KeyError('gt_text')


HEAD = {'type': 'LinearClsHead', 'num_classes': 4, 'in_channels': 64}


@pytest.fixture
def stock(monkeypatch):
    monkeypatch.setitem(SIDES, 'mmpretrain', (16, 32))
    return Config(
        {
            'default_scope': 'mmpretrain',
            'model': {
                'type': 'ImageClassifier',
                'backbone': {'type': 'mmman.CIFARResNet', 'depth': 20},
                'neck': {'type': 'GlobalAveragePooling'},
                'head': HEAD,
            },
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.1}},
        }
    )


def localised(stock, kind):
    child = copy.deepcopy(stock)
    head = {'type': f'mmman.{kind}', 'head': HEAD}
    child.model.backbone = {
        'type': 'mmman.LocalBackbone',
        'backbone': stock.model.backbone,
        'num_blocks': 2,
        'local_head': head,
    }
    child.optim_wrapper = {'type': 'mmman.LocalLearningOptimWrapper', 'dtype': 'float16', **stock.optim_wrapper}
    return child


def test_a_step_that_trains_every_local_parameter(stock):
    child = localised(stock, 'DGLLocalHead')
    before = child.to_dict()
    assert dry_step(child, stock) == ([], None)
    assert child.to_dict() == before  # also the half precision, which a CPU lacks


def test_parameters_without_a_gradient_are_named(stock):
    names, why_not_whole = dry_step(localised(stock, 'IdleHead'), stock)
    assert why_not_whole is None and len(names) == 1 and names[0].startswith('local.') and names[0].endswith('.idle')


def test_a_failure_of_the_localised_model_alone_is_an_error(stock):
    with pytest.raises(ConfigError, match=r"fails in a first step, where the stock model does not \(KeyError: 'gt_text'\)"):
        dry_step(localised(stock, 'FailingLocalHead'), stock)


def test_where_the_stock_model_fails_too_only_the_backbone_runs(stock):
    stock.model.head.type = 'FailingHead'
    names, why_not_whole = dry_step(localised(stock, 'IdleHead'), stock)
    assert len(names) == 1 and 'the stock model also fails on random data' in why_not_whole
    with pytest.raises(ConfigError, match='the local heads fail in a first step .* the whole model was not run'):
        dry_step(localised(stock, 'FailingLocalHead'), stock)
