"""Loading mmengine's checkpoints under ``torch.load(weights_only=True)``, the default since torch 2.6.

mmengine 0.10 calls ``torch.load`` bare, and its training checkpoints hold log buffers besides tensors. Exactly the types that
these are made of are allowed; nothing in a checkpoint can run code.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version
from mmengine.utils.dl_utils import TORCH_VERSION


def allow_training_checkpoints() -> None:
    """Allow-list what mmengine's message hub pickles. An older torch loads it without."""
    if digit_version(TORCH_VERSION) < digit_version('2.6'):
        return
    array, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(name)) for name in ('float64', 'float32', 'int64')}
    method = (_statistics_method, 'builtins.getattr')
    torch.serialization.add_safe_globals([HistoryBuffer, array, scalar, np.ndarray, np.dtype, *dtypes, method])


def _statistics_method(owner: type, name: str) -> Callable:
    """What ``getattr`` means inside a checkpoint: a log buffer refers to its own statistics that way, and to nothing else."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'a checkpoint asks for the attribute {name!r} of {owner!r}; it is not from a training run of mmengine'
    )
