"""Malformed configs: every value of every option either is valid, or ends in one error of ours that names the option.

The cases are generated: each option of each component, given values of every kind. A table says independently of the code which
of them are valid.
"""

import copy
import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS, init_default_scope
from torch import nn

from mmman.engine.config_check import check_config
from mmman.errors import LocalLearningError
from tests.configs import read_config
from tests.conftest import ROOT

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

# One value of every kind that a config can hold.
VALUES = [
    None, True, False, 0, 1, 2, -1, 1.5, 0.5, -0.5, 4.0, math.nan, math.inf, -math.inf, '', '4', 'no', 'block',
    [], [4], ['4'], [0.5, 0.5], [math.nan], [None], (1, 2, 3), {}, {'a': 1}, {'type': 'Nothing'},
]  # fmt: skip


def is_int(value):
    return type(value) is int


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def is_bool(value):
    return type(value) is bool


def is_optional(check):
    return lambda value: value is None or check(value)


def is_count(value):
    return is_int(value) and value >= 1


def is_positive(value):
    return is_number(value) and value > 0


def is_weight(value):
    return (is_number(value) and value >= 0) or (is_pair(value) and min(value) >= 0)


def is_pair(value):
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))


def is_dict(value):
    return isinstance(value, dict)


# For each option, whether a value alone is valid. Options whose values depend on the model are tried below.
OPTIONS = {
    'paper/retinanet_r18_manpp_k4.py': {
        'model.backbone.num_blocks': is_optional(is_count),
        'model.backbone.loss_weight': lambda v: is_positive(v) or (is_pair(v) and min(v) > 0) or v in ([], [4], (1, 2, 3)),
        'model.backbone.recompute': lambda v: is_bool(v) or (isinstance(v, list) and all(type(x) is str for x in v)),
        'model.backbone.selective_recompute': lambda v: is_bool(v) or (isinstance(v, list) and all(type(x) is str for x in v)),
        'model.backbone.transfer.ema': lambda v: v is True,  # the default scale needs it
        'model.backbone.transfer.bias': lambda v: v == 'unit',
        'model.backbone.transfer.scale': is_bool,
        'model.backbone.local_head.stacked_convs': is_count,
        'model.backbone.local_head.downsample': is_count,
        'model.backbone.local_head.size_filter': is_bool,
        'model.backbone.local_head.projection': lambda v: False,
        'model.backbone.local_head.num_classes': is_optional(is_count),
        'model.backbone.local_head.train_cfg': is_optional(is_dict),
        'model.backbone.local_head.loss_weight': lambda v: False,
        'model.backbone.local_head.boundary': lambda v: False,
        'model.backbone.local_head.transfer': lambda v: False,
        'optim_wrapper.clip_scope': lambda v: v == 'block',
        'optim_wrapper.update': lambda v: False,
        'optim_wrapper.images_per_chunk': is_optional(is_count),
        'optim_wrapper.cuda_graphs': is_bool,
        'optim_wrapper.dtype': lambda v: v is None,
        'optim_wrapper.loss_scale': lambda v: v is None or is_positive(v) or is_dict(v),
        'optim_wrapper.accumulative_counts': is_count,
        'optim_wrapper.clip_grad': is_optional(is_dict),
        'custom_hooks.0.momentum': lambda v: is_number(v) and 0 <= v <= 1,
        'custom_hooks.0.interval': is_count,
    },
    'table1/cifar10_resnet32_k16_dgl_manpp': {
        'model.backbone.local_head.pool_size': is_count,
        'model.backbone.local_head.conv_channels': is_count,
        'model.backbone.local_head.fc_channels': is_count,
        'model.backbone.local_head.original': is_bool,
        'model.backbone.local_head.head': is_dict,
        'model.backbone.backbone.depth': is_int,
    },
    'table1/cifar10_resnet32_k16_infopro_manpp': {
        'model.backbone.local_head.lambda_rec': is_weight,
        'model.backbone.local_head.lambda_task': is_weight,
        'model.backbone.local_head.contrast': is_bool,
        'model.backbone.local_head.temperature': is_positive,
        'model.backbone.local_head.classifier': lambda v: False,
    },
    'paper/deeplabv3_r50_manpp_k2.py': {
        'model.backbone.local_head.lambda_rec': is_weight,
        'model.backbone.local_head.lambda_task': is_weight,
        'model.backbone.local_head.network': is_optional(is_dict),
    },
    'vit-base_manpp_k6_imagenet.py': {
        'model.backbone.local_head.layers': lambda v: is_int(v) and v >= 0,
        'model.backbone.local_head.pool': is_optional(lambda v: False),
    },
}
CASES = [(name, option) for name, options in OPTIONS.items() for option in options]
COUNT = len(VALUES) * len(CASES)
assert COUNT >= 300


@pytest.fixture(scope='module')
def configs():
    return {name: read_config(name) for name in OPTIONS}


def replaced(cfg: Config, key: str, value: object) -> Config:
    """The config with a value in place of what it has at ``key``; nothing is merged."""
    cfg = copy.deepcopy(cfg)
    *path, last = key.split('.')
    node = cfg
    for part in path:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            node[part] = node.get(part, {})
            node = node[part]
    node[last] = value
    return cfg


def error_of(call) -> str | None:
    """The message of the error of ours that a call raises. Any other error is a failure of the test."""
    try:
        call()
    except LocalLearningError as error:
        return str(error)
    return None


@pytest.mark.parametrize(('name', 'option'), CASES)
def test_every_value_is_valid_or_refused_by_name(configs, name, option):
    leaf = option.rpartition('.')[-1]
    for value in VALUES:
        message = error_of(lambda value=value: check_config(replaced(configs[name], option, value)))
        if OPTIONS[name][option](value):
            assert message is None, (value, message)
        else:
            assert message is not None and leaf in message and '\n' not in message, (value, message)


def build(cfg: Config, option: str) -> None:
    """Build what has the option as the libraries' own tools do, which don't look at a config as a whole."""
    init_default_scope(cfg.default_scope)
    if option.startswith('optim_wrapper'):
        model = nn.Linear(2, 2)
        build_optim_wrapper(model, cfg.optim_wrapper)
    elif option.startswith('custom_hooks'):
        HOOKS.build(cfg.custom_hooks[0])
    else:
        with torch.device('meta'):
            MODELS.build(cfg.model)


@pytest.mark.parametrize(('name', 'option'), [case for case in CASES if not case[1].endswith('.depth')])
def test_a_component_refuses_what_the_check_refuses(configs, name, option):
    for value in VALUES:
        if not OPTIONS[name][option](value):
            message = error_of(lambda value=value: build(replaced(configs[name], option, value), option))
            assert message is not None and option.rpartition('.')[-1] in message, (value, message)


MISSPELLED = {
    'model.backbone.num_block': 'did you mean num_blocks?',
    'model.backbone.partitions': 'did you mean partition?',
    'model.backbone.frozen_stages': 'set model.backbone.backbone.frozen_stages',
    'model.backbone.depth': 'set model.backbone.backbone.depth',
    'model.backbone.images_per_chunk': 'it is an option of optim_wrapper',
    'model.backbone.momentum': 'it is an option of EMABiasHook',
    'model.backbone.transfer.scales': 'did you mean scale?',
    'model.backbone.transfer.source': 'MomentumTransfer has no option source',
    'model.backbone.local_head.stacked_conv': 'did you mean stacked_convs?',
    'model.backbone.local_head.num_blocks': 'it is an option of model.backbone',
    'optim_wrapper.clip_scop': 'did you mean clip_scope?',
    'optim_wrapper.loss_scales': 'did you mean loss_scale?',
    'optim_wrapper.num_blocks': 'it is an option of model.backbone',
    'custom_hooks.0.momentun': 'did you mean momentum?',
    'num_blocks': 'num_blocks has no effect: set model.backbone.num_blocks',
    'transfer': 'transfer has no effect: set model.backbone.transfer',
    'images_per_chunk': 'images_per_chunk has no effect: set optim_wrapper.images_per_chunk',
    'model.num_blocks': 'model.num_blocks has no effect: set model.backbone.num_blocks',
    'model.local_head': 'model.local_head has no effect: set model.backbone.local_head',
}


@pytest.mark.parametrize('option', MISSPELLED)
def test_an_unknown_option_leads_to_the_right_one(configs, option):
    message = error_of(lambda: check_config(replaced(configs['paper/retinanet_r18_manpp_k4.py'], option, 2)))
    assert message is not None and MISSPELLED[option] in message


CONTRADICTIONS = [
    ({'model.backbone.transfer': {'ema': False}}, 'transfer.scale'),
    ({'model.backbone.transfer': {'bias': False}}, 'transfer.scale'),
    ({'model.backbone.transfer': {'ema': False, 'bias': 'channel', 'scale': False}}, "transfer.bias='channel'"),
    ({'model.backbone.transfer': {'ema': False, 'bias': 'depthwise', 'scale': False}}, "transfer.bias='depthwise'"),
    ({'model.backbone.transfer': {'scale': 1}}, 'transfer.scale=1'),
    ({'model.backbone.num_blocks': 1, 'model.backbone.local_head': {'type': 'mmman.DetLocalHead', 'x': 1}}, 'no option x'),
    ({'model.backbone.local_head': {}}, 'local_head requires a type'),
    ({'model.backbone.local_head': {'type': 'ResNet'}}, "local_head.type='ResNet' is not a subclass of mmman.LocalHead"),
    ({'model.backbone.local_head': {'type': 'mmman.DetHead'}}, 'did you mean mmman.DetLocalHead?'),
    ({'model.backbone.type': 'mmman.LocalBackbon'}, 'did you mean mmman.LocalBackbone?'),
    ({'optim_wrapper.type': 'mmman.LocalLearningWrapper'}, 'did you mean mmman.LocalLearningOptimWrapper?'),
    ({'custom_hooks': [{'type': 'mmman.EMABiasHook'}, {'type': 'mmman.EMABiasHook'}]}, '2 mmman.EMABiasHook'),
    ({'custom_hooks': [{'type': 'mmman.EMAHook'}]}, "custom_hooks[0].type='mmman.EMAHook'"),
    ({'pipeline': {'staleness': 1}}, 'pipeline has no effect'),
    ({'pipeline': {'staleness': -1}, 'runner_type': 'mmman.PipelineRunner'}, 'pipeline.staleness=-1'),
    ({'pipeline': {'stalness': 1}, 'runner_type': 'mmman.PipelineRunner'}, 'did you mean staleness?'),
    ({'pipeline': {'timeout': math.nan}, 'runner_type': 'mmman.PipelineRunner'}, 'pipeline.timeout=nan'),
]


@pytest.mark.parametrize(('changes', 'expected'), CONTRADICTIONS)
def test_options_that_contradict_each_other(configs, changes, expected):
    cfg = configs['paper/retinanet_r18_manpp_k4.py']
    for key, value in changes.items():
        cfg = replaced(cfg, key, value)
    message = error_of(lambda: check_config(cfg))
    assert message is not None and expected in message


WRAPPERS = [
    *product(['optim_wrapper.loss_scale'], [
        ({'init_scale': 0}, 'loss_scale.init_scale=0'),
        ({'init_scale': math.inf}, 'loss_scale.init_scale=inf'),
        ({'growth_factor': 1}, 'loss_scale.growth_factor=1'),
        ({'backoff_factor': 0}, 'loss_scale.backoff_factor=0'),
        ({'backoff_factor': 1.5}, 'loss_scale.backoff_factor=1.5'),
        ({'growth_interval': 0}, 'loss_scale.growth_interval=0'),
        ({'enabled': False}, 'loss_scale.enabled=False'),
        ({'initial_scale': 2}, 'did you mean init_scale?'),
    ]),
    *product(['optim_wrapper.clip_grad'], [
        ({'max_norm': 0}, 'clip_grad.max_norm=0'),
        ({'max_norm': math.nan}, 'clip_grad.max_norm=nan'),
        ({'max_norm': 1, 'norm_type': 'two'}, "clip_grad.norm_type='two'"),
        ({'max_nrom': 1}, 'did you mean max_norm?'),
        ({'type': 'value'}, 'requires the option clip_value'),
        ({'type': 'value', 'clip_value': -1}, 'clip_grad.clip_value=-1'),
        ({'type': 'nothing', 'max_norm': 1}, "clip_grad.type='nothing'"),
        ({}, 'requires the option max_norm'),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(('option', 'case'), WRAPPERS)
def test_nested_options_of_the_optim_wrapper(configs, option, case):
    value, expected = case
    cfg = replaced(configs['paper/retinanet_r18_manpp_k4.py'], option, value)
    cfg.optim_wrapper.dtype = 'bfloat16'
    init_default_scope('mmdet')
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key not in ('optimizer', 'paramwise_cfg')}
    message = error_of(lambda: OPTIM_WRAPPERS.build(wrapper, default_args={'optimizer': optimizer}))
    assert message is not None and expected in message


def test_a_tool_ends_with_one_line():
    command = [
        sys.executable,
        'tools/train.py',
        'configs/paper/retinanet_r18_manpp_k4.py',
        '--cfg-options',
        'model.backbone.num_blocks=0',
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].endswith('model.backbone.num_blocks=0: expected an integer >= 1 or None')
