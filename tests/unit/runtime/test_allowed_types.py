"""What a checkpoint may name besides tensors, and what the stand-ins of these types refuse."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import mmman  # noqa: F401  allows training checkpoints
from mmman.errors import CheckpointError
from mmman.runtime.allowed_types import LoadedArray, LoadedDtype, is_allowed


class Attack:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_training_checkpoint_loads_in_a_fresh_process(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({'hub': {'train/loss': buffer, 'best': np.float64(0.5), 'epoch': 3}}, tmp_path / 'a.pth')
    code = f'import mmman, torch; print(torch.load({str(tmp_path / "a.pth")!r})["hub"]["train/loss"].mean())'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '1.5'


@pytest.mark.parametrize(
    'call',
    [(getattr, (HistoryBuffer, '__init__')), (getattr, (torch.nn.Module, '__init__')), (print, ('code ran',)), (eval, ('1',))],
)
def test_nothing_else_in_a_checkpoint_is_called(call, tmp_path, capsys):
    torch.save(Attack(*call), tmp_path / 'attack.pth')
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        torch.load(tmp_path / 'attack.pth')
    assert 'code ran' not in capsys.readouterr().out


@pytest.mark.parametrize(
    'name',
    ['torch._utils._rebuild_tensor_v2', 'torch.FloatStorage', 'torch.float16', 'collections.OrderedDict', 'numpy.dtype'],
)
def test_names_of_weights_and_logs_are_allowed(name):
    assert is_allowed(name)


@pytest.mark.parametrize('name', ['builtins.eval', 'os.system', 'torch.load', 'torch.float16.x', 'numpy.load', 'torch.hub'])
def test_other_names_are_not(name):
    assert not is_allowed(name)


def loaded(path, value):
    torch.save(value, path)
    return torch.load(path, weights_only=True)


def test_arrays_and_scalars_are_those_that_were_saved(tmp_path):
    arrays = [
        np.arange(6, dtype='>i2').reshape(2, 3).T,
        np.array(['a', 'bc']),
        np.array(2.5),
        np.zeros((0, 3)),
        np.float32(1.5),
    ]
    for array in arrays:
        found = loaded(tmp_path / 'a.pth', array)
        assert (found.dtype.kind, found.dtype.itemsize) == (array.dtype.kind, array.dtype.itemsize)
        assert found.shape == array.shape and np.array_equal(found, array)


@pytest.mark.filterwarnings('ignore:The length of history buffer:UserWarning')
def test_a_log_buffer_is_an_ordinary_one_again(tmp_path):
    buffer, before = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1], max_length=2), dict(HistoryBuffer._statistics_methods)
    found = loaded(tmp_path / 'a.pth', buffer)
    assert type(found) is HistoryBuffer and found.max_length == 2
    assert [array.tolist() for array in found.data] == [array.tolist() for array in buffer.data] and found.mean() == 4
    assert HistoryBuffer._statistics_methods == before


FLOATS = LoadedDtype('f8')


@pytest.mark.parametrize(
    'state',
    [
        (1, (3,), FLOATS, False, bytes(16)),  # another number of bytes
        (1, (-2,), FLOATS, False, bytes(16)),
        (1, (True,), FLOATS, False, bytes(8)),
        (1, [2], FLOATS, False, bytes(16)),
        (1, (2,), np.dtype('f8'), False, bytes(16)),  # a dtype that no stand-in has checked
        (1, (2,), FLOATS, False, [0.0, 0.0]),
    ],
)
def test_an_array_of_another_size_or_type_is_refused(state):
    with pytest.raises(CheckpointError, match='holds a NumPy array'):
        LoadedArray().__setstate__(state)


@pytest.mark.parametrize('code', ['O', 'V8', 'f8,f8', 'U9999999', 8, None])
def test_a_dtype_of_objects_is_refused(code):
    with pytest.raises(CheckpointError, match='holds a NumPy array of dtype .*: only numbers, bools and strings'):
        LoadedDtype(code)
