"""Units that keep only their input for the backward pass, and are computed again there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmman.errors import MisuseError, PartitionError
from mmman.local.stem import StemByImage, stem_paths
from mmman.partition import Chain, Unit
from mmman.partition.chain import STEM


def units_to_recompute(backbone: nn.Module, chain: Chain, recompute: bool | Sequence[str]) -> list[Unit]:
    """The units that ``recompute`` names.

    Args:
        backbone: The backbone.
        chain: Its units.
        recompute: False: none. True: all but the stem. Or names of units, or of what has units in it: a stage.

    Raises:
        PartitionError: A name of neither.
        MisuseError: A stem that :func:`stem_paths` doesn't know; a unit that checkpoints itself (``with_cp``) or whose forward
            was replaced; or no list of names.
    """
    if isinstance(recompute, str):
        raise MisuseError(f'recompute={recompute!r}: choose True, False or a list of unit names, e.g. [{recompute!r}]')
    if isinstance(recompute, bool):
        chosen = [unit for unit in chain.units if unit.name != STEM] if recompute else []
    else:
        units = {unit.name: unit for unit in chain.units}
        named = {name: [unit for unit in units.values() if f'{unit.name}.'.startswith(f'{name}.')] for name in recompute}
        if unknown := [name for name, own in named.items() if not own]:
            raise PartitionError(f'recompute names {unknown}, which are no units; the units are {", ".join(units)}')
        if STEM in recompute and stem_paths(backbone, units[STEM]) is None:
            raise MisuseError(
                f'recompute: the {STEM} of {type(backbone).__name__} is not one convolution without bias, BatchNorm, ReLU and '
                'at most a pooling: leave it out'
            )
        chosen = list(dict.fromkeys(unit for own in named.values() for unit in own))
    for unit in chosen:
        for module in (backbone.get_submodule(path) for path in unit.modules):
            if any(getattr(layer, 'with_cp', False) for layer in module.modules()):
                raise MisuseError(f'unit {unit.name} is checkpointed by with_cp already: drop with_cp, recompute does the same')
            if 'forward' in vars(module):
                raise MisuseError(f'the forward of unit {unit.name} was replaced (activation_checkpointing?): drop what did it')
    return chosen


def recompute_unit_(backbone: nn.Module, unit: Unit) -> None:
    """From now on ``unit`` is computed again in the backward pass: its modules one by one, a stem image by image."""
    if unit.name == STEM:
        backbone.get_submodule(unit.modules[0]).forward = StemByImage(backbone, stem_paths(backbone, unit))
        return
    for path in unit.modules:
        recompute_(backbone.get_submodule(path))


def recompute_(module: nn.Module) -> None:
    """From now on ``module`` computes its forward pass again in the backward pass. Its hooks stay outside, and fire once."""
    module.forward = Recomputed(module)


def keep_(module: nn.Module) -> None:
    """Undo what was done to the forward of ``module``, if anything was."""
    if isinstance(vars(module).get('forward'), (Recomputed, StemByImage)):
        del module.forward


class Recomputed:
    """The ``forward`` of one module: that of its class, of which the arguments alone are kept for the backward pass.

    An object that holds the module, so that deepcopy and pickle take it along and bind it to the copy. Outside training, and
    with gradients disabled, the forward is the plain one.

    The second time runs with the random numbers and the autocast of the first, and leaves buffers (running statistics) alone.

    Args:
        module: A module whose class defines ``forward``.

    Raises:
        MisuseError: When called in training, the module is compiled. Its children may be.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.instead(partial(type(self.module).forward, self.module), *args)

    def instead(self, forward: Callable[..., Any], *args: Any) -> Any:
        """Run ``forward``, which runs parts of the module, in the same way."""
        return self._twice(forward, *args) if self.module.training and torch.is_grad_enabled() else forward(*args)

    @torch.compiler.disable
    def _twice(self, forward: Callable[..., Any], *args: Any) -> Any:
        if self.module._compiled_call_impl is not None:
            raise MisuseError(
                f'a compiled {type(self.module).__name__} cannot run again in the backward pass: compile the layers in it, or '
                'leave it out of recompute'
            )
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """What the forward pass runs in the first time, and what it runs in again."""
        return nullcontext(), _BuffersAside(self.module)


class _BuffersAside:
    """While this context is open, the layers of a module that are in training mode have copies of their buffers to update.

    ``track_running_stats=False`` would keep them too, but then BatchNorm saves two tensors less for its backward pass, and
    ``checkpoint`` counts them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.own = [(layer._buffers, dict(layer._buffers)) for layer in self.module.modules() if layer.training]
        for buffers, own in self.own:
            buffers.update({name: buffer.clone() for name, buffer in own.items() if buffer is not None})

    def __exit__(self, *_: object) -> None:
        for buffers, own in self.own:
            buffers.update(own)
        del self.own
