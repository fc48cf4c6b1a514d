"""Logs the local losses of an iteration and checks that they are finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from mmengine.logging import MessageHub, print_log
from torch import Tensor

from mmman.errors import NonFiniteLossError

NON_FINITE_STEPS = 20
"""Under a loss scaler, this many consecutive steps with a non-finite local loss end the run."""


class LocalLossLog:
    """Writes local losses to a message hub.

    Args:
        is_scaled: Whether a loss scaler skips steps with non-finite gradients. If so, a single non-finite loss is no error.
    """

    def __init__(self, is_scaled: bool) -> None:
        self._is_scaled = is_scaled
        self._non_finite_steps = 0  # consecutive

    def report(self, losses: Mapping[str, Tensor], hub: MessageHub) -> None:
        """Write the losses of one iteration, with one device-to-host transfer.

        Args:
            losses: Scalars by name, ``local/<block>/<loss>``.
            hub: The message hub. Losses are written as ``train/<name>``.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite; under a loss scaler,
                in :data:`NON_FINITE_STEPS` consecutive iterations.
        """
        if not losses:
            return
        values = torch.stack([value.float() for value in losses.values()]).tolist()
        log = dict(zip(losses, values, strict=True))
        bad = [f'{name} = {value}' for name, value in log.items() if not math.isfinite(value)]
        self._non_finite_steps = self._non_finite_steps + 1 if bad else 0
        if bad:
            message = f'a local loss is not finite: {", ".join(bad)} (local/<block>/<loss>)'
            if not self._is_scaled or self._non_finite_steps == NON_FINITE_STEPS:
                steps = f', {NON_FINITE_STEPS} steps in a row' if self._is_scaled else ''
                raise NonFiniteLossError(
                    f"{message}{steps}; lower the learning rate, set clip_grad, or lower that block's loss_weight"
                )
            print_log(f'{message}; the loss scaler skips this step', logger='current', level=logging.WARNING)
        for name, value in log.items():
            hub.update_scalar(f'train/{name}', value)
