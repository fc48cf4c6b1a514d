"""Which process holds what of a model: a stage is the whole model with every tensor of other stages on the meta device.

So names, order and the optimizer's numbering are those of an ordinary run, a foreign tensor takes no memory, and what stages
hold of one thing (weights, optimizer state) adds up to an ordinary checkpoint by name or number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.optim import Optimizer

from mmman.errors import MisuseError
from mmman.local.scopes import blocks_of_tensors

SHARED = 'data_preprocessor.'
"""Held by every stage: a few numbers that heads restore images with."""


class Part:
    """A stage's part of a model.

    Args:
        model: The localised model, whole, in host memory; from :meth:`split_` on, what other stages hold is on the meta device.
        stage: The stage, from 0.
    """

    def __init__(self, model: nn.Module, stage: int) -> None:
        self.model = model
        blocks = blocks_of_tensors(model)
        self.own = {name for name, block in blocks.items() if block == stage or name.startswith(SHARED)}
        self.foreign = blocks.keys() - self.own
        self._absent: dict[str, Tensor] = {}

    def split_(self, optimizer: Optimizer, device: torch.device | str) -> None:
        """Move what this stage holds to ``device`` and drop all else; the optimizer keeps its numbering."""
        for name, (module, key) in self._places():
            tensor = getattr(module, key)
            if name in self.own:
                tensor.data = tensor.data.to(device)
            else:
                absent = torch.empty_like(tensor, device='meta', requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    tensor.grad = None
                    optimizer.state.pop(tensor, None)
                    absent = nn.Parameter(absent, requires_grad=False)
                torch.utils.swap_tensors(tensor, absent)
        self.model.data_preprocessor.to(device)
        optimizer.load_state_dict(optimizer.state_dict())  # brings the state to the parameters' device

    def weights(self) -> dict[str, Tensor]:
        """What this stage holds of the model's state dict, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items() if name in self.own}

    def optimizer_state(self, optimizer: Optimizer) -> dict[int, dict]:
        """The optimizer's state of this stage's parameters, on the CPU, numbered as in an ordinary run."""
        return apply_to(optimizer.state_dict()['state'], lambda x: isinstance(x, Tensor), Tensor.cpu)

    def fill_(self, weights: dict[str, Tensor]) -> None:
        """Complete the model by what other stages hold, for evaluation or a checkpoint; :meth:`empty_` undoes it.

        Raises:
            MisuseError: A tensor of the model is in no stage's part.
        """
        state = self.model.state_dict()
        missing = sorted(name for name in self.foreign if name in state and name not in weights)
        if missing:
            raise MisuseError(f'no stage holds {missing[0]} and {len(missing) - 1} more: stages run different configs')
        for name, (module, key) in self._places():
            if name in self.foreign and name in weights:
                self._absent[name] = getattr(module, key)
                value = weights[name].to(self._device())
                is_parameter = key in module._parameters
                setattr(module, key, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    def empty_(self) -> None:
        """Drop again what :meth:`fill_` brought."""
        for name, (module, key) in self._places():
            if name in self._absent:
                setattr(module, key, self._absent.pop(name))

    def _device(self) -> torch.device:
        return next(p.device for name, p in self.model.named_parameters() if name in self.own)

    def _places(self) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
        for path, module in self.model.named_modules():
            for key in [*module._parameters, *module._buffers]:
                if getattr(module, key) is not None:
                    yield f'{path}.{key}' if path else key, (module, key)
