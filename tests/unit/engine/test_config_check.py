"""The check of a whole config. Every value of every option is tried in tests/integration/test_malformed_configs.py."""

import copy

import pytest

from mmman import DetLocalHead
from mmman.engine.config_check import check_config
from mmman.errors import ConfigError

CONFIG = {
    'model': {
        'type': 'ImageClassifier',
        'backbone': {
            'type': 'mmman.LocalBackbone',
            'backbone': {'type': 'mmman.CIFARResNet', 'depth': 32},
            'num_blocks': 4,
            'local_head': {'type': 'mmman.DGLLocalHead', 'head': {'type': 'LinearClsHead', 'num_classes': 10}},
        },
    },
    'optim_wrapper': {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
    'custom_hooks': [{'type': 'mmman.EMABiasHook', 'momentum': 0.99}],
}


def changed(**changes):
    """The config with values at keys that are written with __ for dots."""
    cfg = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *path, last = key.split('__')
        node = cfg
        for part in path:
            node = node[part]
        node[last] = value
    return cfg


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'num_blocks': 4},  # a variable of the config with the value of the option
        {'pipeline': {'queue': 3}},  # another program's
        {'pipeline': {'staleness': 0}, 'runner_type': 'mmman.PipelineRunner'},
        {'train_cfg': {'type': 'EpochBasedTrainLoop', 'max_epoch': 3}},  # mmengine's, which checks it itself
    ],
)
def test_what_is_valid_passes(changes):
    check_config(changed(**changes))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__backbone__type': 'mmman.LocalBackbon'}, '^model.backbone.type=.* did you mean mmman.LocalBackbone?'),
        ({'model__backbone__num_blocks': 0}, '^model.backbone.num_blocks=0: expected'),
        ({'model__backbone__local_head': {'type': 'mmman.DGLLocalHead', 'pool': 2}}, '^model.backbone.local_head.*pool'),
        ({'custom_hooks': [{'type': 'mmman.EMABiasHook', 'momentum': 2}]}, r'^custom_hooks\[0\].momentum=2'),
        ({'custom_hooks': [{'type': 'mmman.EMABiasHook'}] * 2}, 'has 2 mmman.EMABiasHook, and each would'),
        ({'num_blocks': 2}, '^num_blocks has no effect: set model.backbone.num_blocks instead'),
        ({'model__clip_scope': 'block'}, '^model.clip_scope has no effect: set optim_wrapper.clip_scope instead'),
        ({'pipeline': {'staleness': 1}}, "^pipeline has no effect without runner_type='mmman.PipelineRunner'"),
        ({'pipeline': {'staleness': -1}, 'runner_type': 'mmman.PipelineRunner'}, '^pipeline.staleness=-1'),
    ],
)
def test_the_message_names_the_place_and_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(changed(**changes))


def test_a_component_may_be_named_by_its_class():
    cfg = changed(model__backbone__local_head={'type': DetLocalHead, 'downsample': 0})
    with pytest.raises(ConfigError, match='^model.backbone.local_head.downsample=0'):
        check_config(cfg)
