"""Recompute units in the backward pass to save memory: in full, or all but the operators that are expensive to recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmman.errors import ConfigError, PartitionError
from mmman.memory.output_relu import OutputReLUs, defer_relu_, restore_relus_
from mmman.memory.selective import save_policy
from mmman.memory.stem import StemInChunks, StemTail, stem_paths
from mmman.partition import Chain, Unit
from mmman.partition.chain import STEM

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
    """Replaces the ``forward`` of one module by torch's ``checkpoint`` of the class's forward.

    It is an object that holds the module, so deepcopy and pickle preserve it and bind it to the copy. In eval mode, and with
    gradients disabled, it runs the plain forward.

    Recomputation uses the random numbers and the autocast state of the first run, and doesn't update buffers (running
    statistics). It leaves out a ReLU that produces the output: the ReLU needs only its output, which the next module saves
    anyway. An input or a saved output that is changed in place is an error of torch's, and so is a module that saves something
    else when it is recomputed.

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

    def __call__(self, *args: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        if self.output_relu is None or not (self.module.training and torch.is_grad_enabled()):
            return self.run(forward, *args)
        name, call = self.output_relu
        relu = self.module.get_submodule(name)

        def without_output_relu(*args: Any) -> Any:
            with relu.deferred(call):
                return forward(*args)

        return relu(self._checkpoint(without_output_relu, *args))

    def run(self, forward: Callable[..., Any], *args: Any) -> Any:
        """Run ``forward``, a function that runs parts of the module, with the same recomputation."""
        return self._checkpoint(forward, *args) if self.module.training and torch.is_grad_enabled() else forward(*args)

    @torch.compiler.disable
    def _checkpoint(self, forward: Callable[..., Any], *args: Any) -> Any:
        if self.module._compiled_call_impl is not None:
            raise ConfigError(
                f'a compiled {type(self.module).__name__} cannot be recomputed: compile the layers in it, or leave it out of '
                'recompute'
            )
        # while a CUDA graph is captured, the state of the device's generator cannot be read
        is_capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts, preserve_rng_state=not is_capturing)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of the first run and of recomputation."""
        save, reuse = create_selective_checkpoint_contexts(save_policy) if self.selective else (nullcontext(), nullcontext())
        return save, _Recomputation(self.module, reuse)


class _Recomputation:
    """Opens :func:`temporary_buffers` and ``inner`` while a module is recomputed; again in another backward pass."""

    def __init__(self, module: nn.Module, inner: AbstractContextManager) -> None:
        self.module, self.inner = module, inner

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(temporary_buffers(self.module))
            stack.enter_context(self.inner)
            self.close = stack.pop_all().__exit__

    def __exit__(self, *error: Any) -> None:
        self.close(*error)


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
