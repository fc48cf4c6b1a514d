"""Mixed precision: selects the autocast dtype and builds the loss scaler from the optim wrapper's options."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from mmengine.device import get_device

from mmman.errors import ConfigError
from mmman.options import Count, Positive, Range, checked


@checked('optim_wrapper.loss_scale')
@dataclass(frozen=True)
class DynamicScale:
    """Options of a dynamic ``loss_scale``: the arguments of :class:`torch.amp.GradScaler`."""

    init_scale: Positive = 2.0**16
    growth_factor: Annotated[float, Range(above=1)] = 2.0
    backoff_factor: Annotated[float, Range(above=0, below=1)] = 0.5
    growth_interval: Count = 2000
    enabled: Literal[True] = True


def autocast_dtype(dtype: str | torch.dtype | None, loss_scale: str | float | dict | None) -> torch.dtype | None:
    """Return the autocast dtype of forward passes, or None for full precision.

    Args:
        dtype: The value in the config.
        loss_scale: The value in the config. Unless it is None, it implies float16 if ``dtype`` is None.

    Raises:
        ConfigError: The dtype is float16 and the device is a CPU.
    """
    if dtype is None:
        dtype = None if loss_scale is None else 'float16'
    if isinstance(dtype, str):
        dtype = {'float16': torch.float16, 'bfloat16': torch.bfloat16}[dtype]
    if dtype is torch.float16 and get_device() == 'cpu':
        raise ConfigError("autocast on a CPU supports bfloat16 only: set optim_wrapper.dtype='bfloat16'")
    return dtype


def make_loss_scaler(
    dtype: torch.dtype | None, loss_scale: str | float | dict | None
) -> tuple[torch.amp.GradScaler | None, float | None]:
    """Return the loss scaler, or None, and the fixed scale, or None if the scale is dynamic."""
    if loss_scale is None:
        loss_scale = 'dynamic' if dtype is torch.float16 else None
    if loss_scale is None:
        return None, None
    new = getattr(torch.amp, 'GradScaler', None)  # torch >= 2.3
    scaler = partial(new, get_device()) if new else torch.cuda.amp.GradScaler
    if loss_scale == 'dynamic':
        return scaler(), None
    if isinstance(loss_scale, dict):
        return scaler(**asdict(DynamicScale(**loss_scale))), None
    return scaler(init_scale=float(loss_scale)), float(loss_scale)
