"""Initialise modules exactly once while a model initialises its weights, whatever else the model's ``init_weights`` does."""

from __future__ import annotations

import torch
from mmengine.logging import print_log
from mmengine.model import ModuleDict
from torch import Tensor, nn


class InitialisedOnce(ModuleDict):
    """Modules by name, in a model of OpenMMLab, that are initialised once when the model initialises its weights.

    Most models call ``init_weights`` of all children, in order. Some backbones (Swin in mmdet and mmseg) skip their children:
    these modules are then initialised last. Others overwrite the children's initial values: these are restored.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__(modules)
        self._init_info: dict | None = None  # mmengine's, while the model initialises its weights
        self._initial_values: dict[str, Tensor] = {}  # until the model is done

    @property
    def _params_init_info(self) -> dict:
        """The attribute that mmengine sets on every module while a model initialises its weights. Its deletion is the end."""
        if self._init_info is None:
            raise AttributeError('_params_init_info')
        return self._init_info

    @_params_init_info.setter
    def _params_init_info(self, info: dict) -> None:
        self._init_info = info

    @_params_init_info.deleter
    def _params_init_info(self) -> None:
        if not self.is_init:
            self.init_weights()
        self._restore_initial_values()
        self._init_info = None

    @property
    def is_initialising(self) -> bool:
        """Whether the model initialises its weights, or loads those that ``init_cfg`` names."""
        return self._init_info is not None

    def tensors_to_initialise(self) -> dict[str, Tensor]:
        """The parameters and buffers, by name, whose initial values are those that the modules' own ``init_weights`` gives."""
        return self.state_dict(keep_vars=True)

    def init_weights(self) -> None:
        """Initialise all modules. The model calls this when it initialises its weights; later calls do nothing."""
        is_first = not self.is_init
        super().init_weights()
        if is_first and self.is_initialising:
            self._initial_values = {name: own.detach().clone() for name, own in self.tensors_to_initialise().items()}

    @torch.no_grad()
    def _restore_initial_values(self) -> None:
        own = self.state_dict(keep_vars=True)
        changed = [name for name, value in self._initial_values.items() if not torch.equal(own[name], value)]
        for name in changed:
            own[name].copy_(self._initial_values[name])
        if changed:
            print_log(
                f'init_weights of the model or its backbone overwrote {len(changed)} initialised tensors of local heads, e.g. '
                f"{changed[0]}: the heads' own initial values were restored",
                logger='current',
            )
        self._initial_values = {}
