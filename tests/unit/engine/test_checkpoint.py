import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import mmman  # noqa: F401  allows training checkpoints
from mmman.errors import CheckpointError


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
