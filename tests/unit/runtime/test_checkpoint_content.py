"""A loaded checkpoint is copied value by value; anything but weights and plain data is refused."""

import math
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmman.errors import CheckpointError
from mmman.runtime import checkpoint_content
from mmman.runtime.checkpoint_content import plain_checkpoint

SIZE = 1 << 20


def checkpoint(**parts):
    return {'state_dict': {'a': torch.ones(2)}, **parts}


def test_the_copy_shares_what_the_original_shares_and_nothing_with_it():
    weight = torch.arange(6.0).reshape(2, 3)
    both = [1, 2]
    given = checkpoint(state_dict={'a': weight, 'tied': weight, 'view': weight[1]}, meta={'x': both, 'y': both, 'z': {1, 2}})
    copied, left_out = plain_checkpoint(given, SIZE)
    weights = copied['state_dict']
    assert left_out == [] and copied['meta'] == given['meta'] and copied['meta']['x'] is copied['meta']['y'] is not both
    weight.zero_()
    both.clear()
    assert weights['a'].tolist() == [[0, 1, 2], [3, 4, 5]] and weights['view'].tolist() == [3, 4, 5]
    assert weights['a'] is weights['tied'] and copied['meta']['x'] == [1, 2]
    weights['a'][1] = 9
    assert weights['view'].tolist() == [9, 9, 9]


def test_of_metadata_only_versions_are_kept():
    state = OrderedDict(a=torch.ones(1))
    state._metadata = {'': {'version': 1}, 'bn': {'version': 2, 'assign_to_params_buffers': True}}
    copied, _ = plain_checkpoint({'state_dict': state}, SIZE)
    assert copied['state_dict']._metadata == {'': {'version': 1}, 'bn': {'version': 2}}


def test_a_single_tensor_is_a_checkpoint():
    tensor, left_out = plain_checkpoint(torch.ones(2), SIZE)
    assert tensor.tolist() == [1, 1] and left_out == []


def nested(depth):
    return [nested(depth - 1)] if depth else []


LOOP = {}
LOOP['itself'] = LOOP


@pytest.mark.parametrize(
    ('loaded', 'message'),
    [
        ([1], 'holds a list'),
        ({'state_dict': {}}, 'has no weights: its state_dict has no tensor'),
        ({'meta': {}}, 'has no weights'),
        (checkpoint(state_dict={'a': torch.ones(1), 'b': 'text'}), 'has a str .* b in state_dict'),
        (checkpoint(meta=[]), 'has a meta that is .* list'),
        (checkpoint(meta={1: 2}), 'has a int as a .* in meta: 1'),
        (checkpoint(meta={'a\nb': 2}), 'control characters in'),
        (checkpoint(meta={'x': object()}), r'holds a builtins.object at meta\.x'),
        (checkpoint(meta={'x': slice}), r'holds a builtins.type at meta\.x'),
        (checkpoint(meta=LOOP), 'is nested too deeply, or in itself'),
        (checkpoint(meta={'x': nested(60)}), 'is nested too deeply'),
        (checkpoint(meta={'x': torch.ones(2, device='meta')}), r'holds a tensor at meta\.x that is'),
        (checkpoint(meta={'x': torch.ones(1).expand(10**9)}), 'claims tensors of 4000000008 bytes'),
        (checkpoint(message_hub=[]), 'has a message_hub that is .* list'),
        (checkpoint(message_hub={'log_scalars': []}), 'has a message_hub whose log_scalars is .* list'),
        (checkpoint(ema_state_dict={'module.a': torch.ones(3)}), 'but no weights of that shape'),
    ],
)
def test_anything_else_is_refused(loaded, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        plain_checkpoint(loaded, SIZE)
    assert '\n' not in str(caught.value)


def test_a_value_that_is_referenced_often_counts_as_often(monkeypatch):
    monkeypatch.setattr(checkpoint_content, '_MAX_VALUES', 1000)
    many = [0] * 9
    for _ in range(2):
        many = [many] * 9
    plain_checkpoint(checkpoint(meta={'x': many}), SIZE)
    with pytest.raises(CheckpointError, match='holds more than 1000 values, counted at meta.x'):
        plain_checkpoint(checkpoint(meta={'x': [many] * 9}), SIZE)


def test_texts_that_mmengine_would_run_are_left_out_but_for_plain_values():
    text = "import os\nmodel = dict(type='ResNet', depth=18)\nlr = os.system('true')\n"
    log = {'loss': HistoryBuffer([1.0], [1])}
    given = checkpoint(
        meta={'cfg': text, 'config': 'x', 'iter': 3}, message_hub={'log_scalars': log, 'runtime_info': {'cfg': 'model = f()'}}
    )
    copied, left_out = plain_checkpoint(given, SIZE)
    assert 'config' not in copied['meta'] and 'cfg' not in copied['message_hub']['runtime_info']
    assert 'depth=18' in copied['meta']['cfg'] and 'os' not in copied['meta']['cfg'] and copied['meta']['iter'] == 3
    assert copied['message_hub']['log_scalars'] == log
    assert [entry.split()[0] for entry in left_out] == ['meta.config', 'meta.cfg', 'message_hub.runtime_info.cfg']
    assert given['meta'].keys() == {'cfg', 'config', 'iter'}


def test_numbers_are_what_they_were():
    values = [math.inf, -0.0, 2**70, 1j, b'ab', None, torch.float16, torch.Size([2]), bytearray(b'c')]
    copied, _ = plain_checkpoint(checkpoint(meta={'x': values}), SIZE)
    assert copied['meta']['x'] == values and [*map(type, copied['meta']['x'])] == [*map(type, values)]
