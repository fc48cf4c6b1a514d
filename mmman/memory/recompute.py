"""Recompute units in the backward pass to save memory: in full, or all but the operators that are expensive to recompute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from mmman.errors import ConfigError, PartitionError
from mmman.memory.output_relu import OutputReLUs, defer_relu_, restore_relus_
from mmman.memory.selective import CachedMode, CachingMode, SavedOutputs, alias, versions
from mmman.memory.stem import StemInChunks, StemTail, precision_of, stem_paths
from mmman.partition import Chain, Unit
from mmman.partition.chain import STEM

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

RandomStates = tuple[list[Tensor], list[int]]
"""Generator states of the CPU and of the devices that some tensors are on; and the indices of these devices."""


def units_to_recompute(
    backbone: nn.Module, chain: Chain, recompute: bool | Sequence[str], selective_recompute: bool | Sequence[str] = False
) -> dict[Unit, bool]:
    """Select the units to recompute. The values say whether selectively.

    Args:
        backbone: The backbone.
        chain: The backbone's units.
        recompute: False: none. True: all but the stem. Or names of units, or of modules that contain units, such as a stage.
        selective_recompute: The same.

    Raises:
        PartitionError: A name matches no unit.
        ConfigError: A unit is in both options; a stem is not supported by :func:`stem_paths`, or is in ``selective_recompute``;
            a unit checkpoints itself (``with_cp``) or its forward was replaced.
    """
    full, selective = _named(chain, 'recompute', recompute), _named(chain, 'selective_recompute', selective_recompute)
    if both := [unit.name for unit in full if unit in selective]:
        raise ConfigError(f'{", ".join(both)}: in recompute and in selective_recompute; leave out one of them')
    if any(unit.name == STEM for unit in selective):
        raise ConfigError(f'selective_recompute: the {STEM} can only be recomputed as a whole: put it into recompute')
    if any(unit.name == STEM and stem_paths(backbone, unit) is None for unit in full):
        raise ConfigError(
            f'recompute: the {STEM} of {type(backbone).__name__} is not one convolution without bias, BatchNorm, ReLU and '
            'at most a pooling: leave it out'
        )
    for unit in (*full, *selective):
        for module in (backbone.get_submodule(path) for path in unit.modules):
            if any(getattr(layer, 'with_cp', False) for layer in module.modules()):
                raise ConfigError(f'unit {unit.name} already uses with_cp=True: set with_cp=False, since recompute replaces it')
            if 'forward' in vars(module):
                raise ConfigError(
                    f'the forward of unit {unit.name} has been replaced (activation_checkpointing?): remove that setting, or '
                    'leave the unit out of recompute'
                )
    return dict.fromkeys(full, False) | dict.fromkeys(selective, True)


def _named(chain: Chain, option: str, names: bool | Sequence[str]) -> list[Unit]:
    if isinstance(names, bool):
        return [unit for unit in chain.units if unit.name != STEM] if names else []
    found = {name: [unit for unit in chain.units if f'{unit.name}.'.startswith(f'{name}.')] for name in names}
    if unknown := [name for name, own in found.items() if not own]:
        units = ', '.join(unit.name for unit in chain.units)
        raise PartitionError(f'{option} names {unknown}, which are no units; the units are {units}')
    return list(dict.fromkeys(unit for own in found.values() for unit in own))


def recompute_unit_(backbone: nn.Module, unit: Unit, output_relus: OutputReLUs, selective: bool = False) -> None:
    """Recompute ``unit`` in the backward pass from now on: each of its modules separately, a stem in chunks of the batch."""
    if unit.name == STEM:
        StemInChunks(backbone, stem_paths(backbone, unit)).install_()
        return
    for path in unit.modules:
        module = backbone.get_submodule(path)
        recompute_(module, selective, output_relus.get(module))


def recompute_(module: nn.Module, selective: bool = False, output_relu: tuple[str, int] | None = None) -> None:
    """Recompute the forward of ``module`` in the backward pass from now on. Its hooks are not recomputed, and fire once."""
    if output_relu is not None:
        defer_relu_(module, output_relu[0])
    module.forward = Recomputed(module, selective, output_relu)


def disable_recompute_(module: nn.Module) -> None:
    """Undo :func:`recompute_` and :meth:`StemInChunks.install_` for one module. Does nothing if they were not called for it."""
    if isinstance(vars(module).get('forward'), (Recomputed, StemInChunks, StemTail)):
        del module.forward
        restore_relus_(module)


class Recomputed:
    """Replaces the ``forward`` of one module. It runs the class's forward and saves only the arguments for the backward pass.

    It is an object that holds the module, so deepcopy and pickle preserve it and bind it to the copy. In eval mode, and with
    gradients disabled, it runs the plain forward.

    Recomputation uses the random numbers and the autocast state of the first run, and doesn't update buffers (running
    statistics). It leaves out a ReLU that produces the output: the ReLU needs only its output, which the next module saves
    anyway.

    Args:
        module: A module whose class defines ``forward``.
        selective: Whether outputs for which :func:`should_save` is true are saved and not recomputed. A graph can then be
            back-propagated only once.
        output_relu: The :class:`DeferrableReLU` that produces the output, if one does, and the number of its call.

    Raises:
        ConfigError: When called in training, if the module is compiled. Its children may be.
    """

    def __init__(self, module: nn.Module, selective: bool = False, output_relu: tuple[str, int] | None = None) -> None:
        self.module, self.selective, self.output_relu = module, selective, output_relu
        self.draws = False

    def __call__(self, *args: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        if self.output_relu is None or not (self.module.training and torch.is_grad_enabled()):
            return self.run(forward, *args)
        name, call = self.output_relu
        relu = self.module.get_submodule(name)

        def without_output_relu(*args: Any) -> Any:
            with relu.deferred(call):
                return forward(*args)

        return relu(self._run_recomputed(without_output_relu, *args))

    def run(self, forward: Callable[..., Any], *args: Any) -> Any:
        """Run ``forward``, a function that runs parts of the module, with the same recomputation."""
        return self._run_recomputed(forward, *args) if self.module.training and torch.is_grad_enabled() else forward(*args)

    @torch.compiler.disable
    def _run_recomputed(self, forward: Callable[..., Any], *args: Any) -> Any:
        if self.module._compiled_call_impl is not None:
            raise ConfigError(
                f'a compiled {type(self.module).__name__} cannot be recomputed: compile the layers in it, or leave it out of '
                'recompute'
            )
        call = _RecomputedCall(self.module, self.selective, forward, args)
        if self.draws and _is_capturing():
            raise ConfigError(
                f'{type(self.module).__name__} draws random numbers, which a CUDA graph cannot draw again: leave it out of '
                'recompute, or set optim_wrapper.cuda_graphs=False'
            )
        out = call(*args)
        self.draws = self.draws or call.random is not None
        return out


class _RecomputedCall:
    """One call of a module whose forward pass is recomputed in the backward pass, as with torch's ``checkpoint``.

    The graph is that of the plain forward, with an index in place of each saved tensor. Unpacking the first one triggers
    recomputation. torch's implementation spends more Python time per saved tensor (docs/design/recompute.md has numbers).

    Args:
        module: The module.
        selective: Whether outputs for which :func:`should_save` is true are saved.
        forward: The function to compute.
        args: Its arguments: tensors and other values, in tuples, lists and dicts.
    """

    def __init__(self, module: nn.Module, selective: bool, forward: Callable[..., Any], args: tuple) -> None:
        self.module, self.forward = module, forward
        leaves, self.spec = tree_flatten(args)
        self.inputs = [(alias(leaf), leaf.requires_grad) if isinstance(leaf, Tensor) else (leaf, None) for leaf in leaves]
        self.input_versions = versions(leaves)
        self.saved_outputs: SavedOutputs | None = deque() if selective else None
        self.num_packed, self.recomputed = 0, []

    def __call__(self, *args: Any) -> Any:
        tensors = [leaf for leaf, _ in self.inputs if isinstance(leaf, Tensor)]
        self.device_type = tensors[0].device.type
        before = None if _is_capturing() else _random_states(tensors)
        self.precision = precision_of(tensors[0])
        caching = nullcontext() if self.saved_outputs is None else CachingMode(self.saved_outputs)
        with saved_tensors_hooks(self._pack, self._unpack), caching:
            out = self.forward(*args)
        self.random = before if before is not None and _differ(before, _random_states(tensors)) else None
        return out

    def _pack(self, _: Tensor) -> int:
        self.num_packed += 1
        return self.num_packed - 1

    def _unpack(self, index: int) -> Tensor:
        if not self.recomputed or self.recomputed[index] is None:
            self._recompute()
        tensor, self.recomputed[index] = self.recomputed[index], None
        return tensor

    def _recompute(self) -> None:
        """Recompute with the inputs, random numbers and autocast state of the first run, up to the last tensor saved."""
        name = type(self.module).__name__
        if self.input_versions != versions([leaf for leaf, _ in self.inputs]):
            raise ConfigError(
                f'an input of {name} was changed in place, so {name} cannot be recomputed: leave it out of recompute'
            )
        leaves = [leaf if grad is None else leaf.detach().requires_grad_(grad) for leaf, grad in self.inputs]
        recomputed: list[Tensor] = []

        def save(tensor: Tensor) -> None:
            recomputed.append(tensor.detach())
            if len(recomputed) == self.num_packed:
                raise _AllSaved

        with ExitStack() as stack:
            stack.enter_context(suppress(_AllSaved))
            if self.random is not None:
                (cpu, *states), devices = self.random
                stack.enter_context(torch.random.fork_rng(devices, device_type=self.device_type))
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self.device_type)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.precision())
            stack.enter_context(temporary_buffers(self.module))
            if self.saved_outputs is not None:
                stack.enter_context(CachedMode(self.saved_outputs))
            stack.enter_context(saved_tensors_hooks(save, save))
            self.forward(*tree_unflatten(leaves, self.spec))
        if len(recomputed) != self.num_packed:
            raise ConfigError(
                f'{name} saved {self.num_packed} tensors for the backward pass, and {len(recomputed)} when it was recomputed: '
                'leave it out of recompute'
            )
        self.recomputed = recomputed


class _AllSaved(Exception):  # noqa: N818  not an error
    """Stops recomputation once all tensors that the backward pass needs are computed."""


def _random_states(tensors: Sequence[Tensor]) -> RandomStates:
    devices, states = get_device_states(*tensors)
    return [torch.get_rng_state(), *states], devices


def _differ(before: RandomStates, after: RandomStates) -> bool:
    return any(not torch.equal(*states) for states in zip(before[0], after[0], strict=True))


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured. The state of the device's generator cannot be read then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextmanager
def temporary_buffers(module: nn.Module) -> Iterator[None]:
    """While this context is open, layers of ``module`` in training mode update temporary buffers.

    ``track_running_stats=False`` would also work, but BatchNorm then saves two tensors fewer for its backward pass.
    """
    own = [(layer._buffers, dict(layer._buffers)) for layer in module.modules() if layer.training and layer._buffers]
    try:
        for layer in module.modules():
            if layer.training and layer._buffers:
                layer._buffers.update(_spare_buffers(layer))
        yield
    finally:
        for buffers, values in own:
            buffers.update(values)


def _spare_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of a layer's buffers; uninitialised, so without a kernel, for BatchNorm, whose training output ignores them."""
    own = {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
    if type(layer) not in BATCHNORMS:
        return {name: buffer.clone() for name, buffer in own.items()}
    counter = torch.zeros((), dtype=torch.long)
    return {name: torch.empty_like(buffer) if buffer.dim() else counter for name, buffer in own.items()}
