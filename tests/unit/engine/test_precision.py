"""Which dtype and which loss scaler the options of the optim wrapper select."""

import pytest
import torch

from mmman import LocalLearningOptimWrapper
from mmman.engine.precision import autocast_dtype, make_loss_scaler
from mmman.errors import ConfigError


@pytest.mark.skipif(torch.cuda.is_available(), reason='checks what a CPU refuses')
@pytest.mark.parametrize('options', [{'dtype': 'float16'}, {'loss_scale': 'dynamic'}])
def test_float16_is_for_gpus(options):
    with pytest.raises(ConfigError, match="supports bfloat16 only: set optim_wrapper.dtype='bfloat16'"):
        LocalLearningOptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), **options)


def test_the_dtype_is_that_of_the_config_and_a_loss_scale_implies_float16(monkeypatch):
    assert autocast_dtype(None, None) is None
    assert autocast_dtype('bfloat16', 8.0) is autocast_dtype(torch.bfloat16, None) is torch.bfloat16
    monkeypatch.setattr('mmman.engine.precision.get_device', lambda: 'cuda')
    assert autocast_dtype(None, 'dynamic') is autocast_dtype('float16', None) is torch.float16


@pytest.mark.parametrize(
    ('dtype', 'loss_scale', 'scale', 'fixed'),
    [
        (None, None, None, None),
        (torch.bfloat16, None, None, None),
        (torch.float16, None, 2.0**16, None),
        (torch.bfloat16, 'dynamic', 2.0**16, None),
        (torch.bfloat16, {'init_scale': 8.0}, 8.0, None),
        (torch.bfloat16, 512, 512.0, 512.0),
    ],
)
def test_the_loss_scaler(dtype, loss_scale, scale, fixed):
    scaler, fixed_scale = make_loss_scaler(dtype, loss_scale)
    assert (scaler and scaler.get_scale(), fixed_scale) == (scale, fixed)


@pytest.mark.parametrize(
    ('loss_scale', 'message'),
    [
        ({'init_scale': 0}, 'loss_scale.init_scale=0'),
        ({'growth_factor': 1}, 'loss_scale.growth_factor=1'),
        ({'backoff_factor': 1.5}, 'loss_scale.backoff_factor=1.5'),
        ({'initial_scale': 2}, 'did you mean init_scale?'),
    ],
)
def test_options_of_a_dynamic_scale_are_checked(loss_scale, message):
    with pytest.raises(ConfigError, match=message):
        make_loss_scaler(torch.bfloat16, loss_scale)
