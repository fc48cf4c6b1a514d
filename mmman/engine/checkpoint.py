"""Loading mmengine's checkpoints under ``torch.load(weights_only=True)``, the default since torch 2.6.

mmengine 0.10 calls ``torch.load`` bare, and its training checkpoints hold log buffers besides tensors. Exactly the types they are
made of are allowed; nothing else in a checkpoint can run code.
"""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def allow_training_checkpoints() -> None:
    """Allow-list the types of mmengine's message hub."""
    reconstruct = np.empty(0).__reduce__()[0]
    dtypes = {type(np.dtype(name)) for name in ('float64', 'float32', 'int64')}
    torch.serialization.add_safe_globals([HistoryBuffer, reconstruct, np.ndarray, np.dtype, *dtypes])
