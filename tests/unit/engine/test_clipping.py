"""The options of gradient clipping. What clipping does to gradients is in test_optim_wrapper.py."""

import math

import pytest

from mmman.engine.clipping import check_clipping
from mmman.errors import ConfigError


@pytest.mark.parametrize(
    'clip_grad',
    [
        None,
        {'max_norm': 0.1},
        {'type': 'norm', 'max_norm': 35, 'norm_type': math.inf, 'error_if_nonfinite': True},
        {'max_norm': 1, 'norm_type': 'inf', 'foreach': False},
        {'type': 'value', 'clip_value': 1e-3},
    ],
)
def test_what_torch_takes_passes(clip_grad):
    check_clipping(clip_grad)


@pytest.mark.parametrize(
    ('clip_grad', 'message'),
    [
        ({}, 'max_norm'),
        ({'max_norm': 0}, 'clip_grad.max_norm=0'),
        ({'max_norm': math.nan}, 'clip_grad.max_norm=nan'),
        ({'max_norm': 1, 'norm_type': 'two'}, "clip_grad.norm_type='two'"),
        ({'max_nrom': 1}, 'did you mean max_norm?'),
        ({'type': 'value'}, 'clip_value'),
        ({'type': 'value', 'max_norm': 1}, 'no option max_norm'),
        ({'type': 'nothing', 'max_norm': 1}, "clip_grad.type='nothing': choose 'norm' or 'value'"),
    ],
)
def test_other_options_are_refused(clip_grad, message):
    with pytest.raises(ConfigError, match=message):
        check_clipping(clip_grad)
