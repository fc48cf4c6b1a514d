"""Rejects a checkpoint with no tensor of the model. mmengine only warns, and trains or tests random weights."""

from __future__ import annotations

import re
from copy import copy

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from mmman.errors import CheckpointError


class WeightsHook(Hook):
    """Checks the checkpoint of ``load_from`` before it is loaded. :func:`mmman.runtime.launch.build_runner` registers it.

    Raises:
        CheckpointError: No tensor of the checkpoint has the name and shape of a tensor of the model.
    """

    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict | Tensor) -> None:
        """Compare names and shapes. :class:`mmman.runtime.resume.ExactResumeHook` compares a checkpoint to resume in full."""
        if not isinstance(checkpoint, dict):
            raise CheckpointError(f'{runner._load_from} holds a tensor, not the weights of a model; give another checkpoint')
        if runner._resume:
            return
        if 'state_dict' not in checkpoint:  # plain weights, like torchvision's; mmengine's EMAHook needs the key
            weights = copy(checkpoint)
            checkpoint.clear()
            checkpoint['state_dict'] = weights
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        state = checkpoint['state_dict']
        ours = model.state_dict()
        theirs = {re.sub(r'^module\.', '', name): value for name, value in state.items() if torch.is_tensor(value)}
        if not any(name in ours and ours[name].shape == value.shape for name, value in theirs.items()):
            names = [', '.join([*weights][:2]) or 'none' for weights in (theirs, ours)]
            raise CheckpointError(
                f'{runner._load_from} has no weights of this model: its tensors are {names[0]}, ..., '
                f"those of the model are {names[1]}, ...; give a checkpoint of this config's model"
            )
