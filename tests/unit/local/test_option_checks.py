"""Options of the transfer and of local heads, which are checked before anything is built, also for K = 1."""

import pytest

from mmman import DGLLocalHead
from mmman.errors import ConfigError
from mmman.local.option_checks import check_local_options


@pytest.mark.parametrize('transfer', [None, {}, {'ema': False, 'bias': False, 'scale': False}, {'bias': 'depthwise'}])
@pytest.mark.parametrize('local_head', [None, {'type': 'mmman.ToyLocalHead'}, {'type': DGLLocalHead, 'head': {}}])
def test_what_is_valid_passes(transfer, local_head):
    check_local_options(transfer, local_head)


@pytest.mark.parametrize(
    ('transfer', 'local_head', 'message'),
    [
        ({'scales': True}, None, '^model.backbone.transfer: .*did you mean scale?'),
        ({'scale': 1}, None, '^model.backbone.transfer.scale=1: expected'),
        ({'ema': False}, None, 'transfer.scale'),
        (None, {}, '^model.backbone.local_head requires a type, e.g. dict'),
        (None, {'type': 'mmman.ToyNet'}, "^model.backbone.local_head.type='mmman.ToyNet' is not a subclass of mmman.LocalHead"),
        (None, {'type': 'mmman.Nothing'}, "^model.backbone.local_head.type='mmman.Nothing' is not a subclass"),
        (
            None,
            {'type': 'mmman.ToyLocalHead', 'boundary': 1},
            'local_head.boundary is determined automatically',
        ),
        (None, {'type': 'mmman.ToyLocalHead', 'loss_weight': 2.0}, 'local_head.loss_weight .*set model.backbone.loss_weight'),
        (None, {'type': 'mmman.DGLLocalHead', 'pool_size': 0}, '^model.backbone.local_head.pool_size=0: expected'),
    ],
)
def test_the_message_names_the_option(transfer, local_head, message):
    with pytest.raises(ConfigError, match=message):
        check_local_options(transfer, local_head)


def test_the_place_is_the_callers():
    with pytest.raises(ConfigError, match='^mine.local_head requires a type'):
        check_local_options(None, {}, 'mine')
