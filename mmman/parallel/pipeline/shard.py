"""The shard of a model that a stage holds: the whole model, with every tensor of other stages on the meta device.

Parameter names, their order and the optimizer's numbering are those of an ordinary run. A tensor of another stage takes no
memory. The weights and optimizer states of all stages merge into an ordinary checkpoint by name or number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.optim import Optimizer

from mmman.engine.block_parameters import block_index
from mmman.errors import ConfigError

SHARED = 'data_preprocessor.'
"""Prefix of tensors that every stage holds: the few values with which heads undo the normalisation of images."""


class StageShard:
    """A stage's shard of a model.

    Args:
        model: The complete localised model, in host memory. :meth:`split_` moves the tensors of other stages to the
            meta device.
        stage: Index of the stage, from 0.

    Attributes:
        own, foreign: Names of the tensors that this stage holds, and of all others.

    Raises:
        ConfigError: Units of several stages share a tensor.
    """

    def __init__(self, model: nn.Module, stage: int) -> None:
        self.model = model
        blocks = block_index(model)
        _check_unshared(model, blocks)
        self.own = {name for name, block in blocks.items() if block == stage or name.startswith(SHARED)}
        self.foreign = blocks.keys() - self.own
        self._meta: dict[str, Tensor] = {}

    def split_(self, optimizer: Optimizer, device: torch.device | str) -> None:
        """Move this stage's tensors to ``device`` and all others to the meta device. The optimizer keeps its numbering.

        ``optimizer`` is the optimizer of the whole model. The state of foreign parameters is dropped from it.
        """
        for name, (module, key) in self._named_tensors():
            tensor = getattr(module, key)
            if name in self.own:
                tensor.data = tensor.data.to(device)
            else:
                meta = torch.empty_like(tensor, device='meta', requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    tensor.grad = None
                    optimizer.state.pop(tensor, None)
                    meta = nn.Parameter(meta, requires_grad=False)
                torch.utils.swap_tensors(tensor, meta)
        self.model.data_preprocessor.to(device)
        optimizer.load_state_dict(optimizer.state_dict())  # moves the state to the device of the parameters

    def weights(self) -> dict[str, Tensor]:
        """This stage's entries of the model's state dict, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items() if name in self.own}

    def optimizer_state(self, optimizer: Optimizer) -> dict[int, dict]:
        """The optimizer state of this stage's parameters, on the CPU, numbered as in an ordinary run."""
        return apply_to(optimizer.state_dict()['state'], lambda x: isinstance(x, Tensor), Tensor.cpu)

    def fill_(self, weights: dict[str, Tensor]) -> None:
        """Fill in the tensors of other stages from ``weights``, for evaluation or a checkpoint. :meth:`empty_` undoes this.

        Raises:
            ConfigError: No stage holds a tensor of the model.
        """
        state = self.model.state_dict()
        missing = sorted(name for name in self.foreign if name in state and name not in weights)
        if missing:
            raise ConfigError(f'no stage holds {missing[0]} and {len(missing) - 1} more: stages run different configs')
        for name, (module, key) in self._named_tensors():
            if name in self.foreign and name in weights:
                self._meta[name] = getattr(module, key)
                value = weights[name].to(self._device())
                is_parameter = key in module._parameters
                setattr(module, key, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    def empty_(self) -> None:
        """Remove the tensors that :meth:`fill_` filled in."""
        for name, (module, key) in self._named_tensors():
            if name in self._meta:
                setattr(module, key, self._meta.pop(name))

    def _device(self) -> torch.device:
        return next(p.device for name, p in self.model.named_parameters() if name in self.own)

    def _named_tensors(self) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
        """The name of every parameter and buffer, with its module and its attribute name in the module."""
        for path, module in self.model.named_modules():
            for key in [*module._parameters, *module._buffers]:
                if getattr(module, key) is not None:
                    yield f'{path}.{key}' if path else key, (module, key)


def _check_unshared(model: nn.Module, blocks: dict[str, int]) -> None:
    first: dict[Tensor, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        other = first.setdefault(tensor, name)
        if blocks[other] != blocks[name]:
            raise ConfigError(
                f'{other} and {name} are the same tensor, but belong to different stages of a pipeline: train in one process, '
                'or cut so that both are in one block'
            )
