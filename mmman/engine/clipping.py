"""Checks the options of gradient clipping, which mmengine passes to torch unchecked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmman.errors import ConfigError
from mmman.options import Positive, checked


@checked('optim_wrapper.clip_grad')
@dataclass(frozen=True)
class ClipByNorm:
    """Options for clipping by norm: the arguments of :func:`torch.nn.utils.clip_grad_norm_`."""

    max_norm: Positive
    norm_type: Positive | Literal[math.inf, 'inf'] = 2.0
    error_if_nonfinite: bool = False
    foreach: bool | None = None


@checked('optim_wrapper.clip_grad')
@dataclass(frozen=True)
class ClipByValue:
    """Options for clipping by value: the arguments of :func:`torch.nn.utils.clip_grad_value_`."""

    clip_value: Positive
    foreach: bool | None = None


def check_clipping(clip_grad: dict | None) -> None:
    """Raise :class:`ConfigError` if an option of ``clip_grad`` is unknown to torch or out of range."""
    if clip_grad is None:
        return
    options = dict(clip_grad)
    kind = options.pop('type', 'norm')
    if kind not in ('norm', 'value'):
        raise ConfigError(f"optim_wrapper.clip_grad.type={kind!r}: choose 'norm' or 'value'")
    (ClipByNorm if kind == 'norm' else ClipByValue)(**options)
