"""Recompute units in the backward pass to save memory: in full, or all but the operators that are expensive to recompute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from mmman.errors import ConfigError, PartitionError
from mmman.memory.chunks import replaced
from mmman.memory.stem import StemInChunks, StemTail, precision_of, stem_paths
from mmman.partition import Chain, Unit
from mmman.partition.chain import STEM

aten = torch.ops.aten
SECOND_FACTOR = {aten.mm.default: 1, aten.bmm.default: 1, aten.addmm.default: 2, aten.baddbmm.default: 2}
"""Index of the argument of a matrix product that is its second factor, (..., summed, channels)."""

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Ends = dict[nn.Module, tuple[str, int]]
"""For each module whose output is produced by one of its ReLUs: the ReLU's name, and how often the module calls it."""

RandomStates = tuple[list[Tensor], list[int]]
"""Generator states of the CPU and of the devices that some tensors are on; and the indices of these devices."""

Kept = deque[tuple[Callable, Any, list[int]]]
"""The expensive operators in the order they ran, with their outputs and the version counters of these."""


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
        raise ConfigError(f'selective_recompute: the {STEM} can only be computed again as a whole: put it into recompute')
    if any(unit.name == STEM and stem_paths(backbone, unit) is None for unit in full):
        raise ConfigError(
            f'recompute: the {STEM} of {type(backbone).__name__} is not one convolution without bias, BatchNorm, ReLU and '
            'at most a pooling: leave it out'
        )
    for unit in (*full, *selective):
        for module in (backbone.get_submodule(path) for path in unit.modules):
            if any(getattr(layer, 'with_cp', False) for layer in module.modules()):
                raise ConfigError(f'unit {unit.name} is checkpointed by with_cp already: drop with_cp, recompute does the same')
            if 'forward' in vars(module):
                raise ConfigError(f'the forward of unit {unit.name} was replaced (activation_checkpointing?): drop what did it')
    return dict.fromkeys(full, False) | dict.fromkeys(selective, True)


def _named(chain: Chain, option: str, names: bool | Sequence[str]) -> list[Unit]:
    if isinstance(names, bool):
        return [unit for unit in chain.units if unit.name != STEM] if names else []
    found = {name: [unit for unit in chain.units if f'{unit.name}.'.startswith(f'{name}.')] for name in names}
    if unknown := [name for name, own in found.items() if not own]:
        units = ', '.join(unit.name for unit in chain.units)
        raise PartitionError(f'{option} names {unknown}, which are no units; the units are {units}')
    return list(dict.fromkeys(unit for own in found.values() for unit in own))


@contextmanager
def ends_told(modules: Iterable[nn.Module]) -> Iterator[Ends]:
    """While this context is open, each module must run once. The yielded :data:`Ends` are filled as they run."""
    ends: Ends = {}
    with ExitStack() as handles:
        for module in modules:
            relus = [(name, child) for name, child in module.named_children() if isinstance(child, nn.ReLU)]
            outputs: list[tuple[str, Tensor]] = []
            for name, relu in relus:
                hook = relu.register_forward_hook(lambda _, args, out, name=name, outputs=outputs: outputs.append((name, out)))
                handles.callback(hook.remove)

            def told(module: nn.Module, args: tuple, out: Tensor, outputs: list = outputs) -> None:
                if outputs and outputs[-1][1] is out:
                    ends[module] = outputs[-1][0], sum(name == outputs[-1][0] for name, _ in outputs)
                outputs.clear()

            handles.callback(module.register_forward_hook(told).remove)
        yield ends


def recompute_unit_(backbone: nn.Module, unit: Unit, ends: Ends, selective: bool = False) -> None:
    """Recompute ``unit`` in the backward pass from now on: each of its modules separately, a stem in chunks of the batch."""
    if unit.name == STEM:
        StemInChunks(backbone, stem_paths(backbone, unit)).install_()
        return
    for path in unit.modules:
        module = backbone.get_submodule(path)
        recompute_(module, selective, ends.get(module))


def recompute_(module: nn.Module, selective: bool = False, end: tuple[str, int] | None = None) -> None:
    """Recompute the forward of ``module`` in the backward pass from now on. Its hooks are not recomputed, and fire once."""
    module.forward = Recomputed(module, selective, end)


def keep_(module: nn.Module) -> None:
    """Restore the forward of ``module`` if this package replaced it."""
    if isinstance(vars(module).get('forward'), (Recomputed, StemInChunks, StemTail)):
        del module.forward


class Recomputed:
    """Replaces the ``forward`` of one module. It runs the class's forward and saves only the arguments for the backward pass.

    It is an object that holds the module, so deepcopy and pickle preserve it and bind it to the copy. In eval mode, and with
    gradients disabled, it runs the plain forward.

    Recomputation uses the random numbers and the autocast state of the first run, and doesn't update buffers (running
    statistics). It leaves out a ReLU that produces the output: the ReLU needs only its output, which the next module saves
    anyway.

    Args:
        module: A module whose class defines ``forward``.
        selective: Whether :func:`is_costly` outputs are saved and not recomputed. A graph can then be back-propagated only
            once.
        end: The ReLU that produces the output, if one does: see :data:`Ends`.

    Raises:
        ConfigError: When called in training, if the module is compiled. Its children may be.
    """

    def __init__(self, module: nn.Module, selective: bool = False, end: tuple[str, int] | None = None) -> None:
        self.module, self.selective, self.end = module, selective, end
        self.draws = False

    def __call__(self, *args: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        if self.end is None or not (self.module.training and torch.is_grad_enabled()):
            return self.instead(forward, *args)
        name, calls = self.end
        relu = self.module.get_submodule(name)
        return relu(self._twice(partial(_without_call, relu, calls, forward), *args))

    def instead(self, forward: Callable[..., Any], *args: Any) -> Any:
        """Run ``forward``, a function that runs parts of the module, with the same recomputation."""
        return self._twice(forward, *args) if self.module.training and torch.is_grad_enabled() else forward(*args)

    @torch.compiler.disable
    def _twice(self, forward: Callable[..., Any], *args: Any) -> Any:
        if self.module._compiled_call_impl is not None:
            raise ConfigError(
                f'a compiled {type(self.module).__name__} cannot run again in the backward pass: compile the layers in it, or '
                'leave it out of recompute'
            )
        run = _Run(self.module, self.selective, forward, args)
        if self.draws and _is_recorded():
            raise ConfigError(
                f'{type(self.module).__name__} draws random numbers, which a recorded step cannot draw again: leave it out of '
                'recompute, or set optim_wrapper.cuda_graphs=False'
            )
        out = run(*args)
        self.draws = self.draws or run.random is not None
        return out


class _Run:
    """One call of a module whose forward pass is recomputed in the backward pass, as with torch's ``checkpoint``.

    The graph is that of the plain forward, with an index in place of each saved tensor. Unpacking the first one triggers
    recomputation. torch's implementation spends more Python time per saved tensor (docs/design/recompute.md has numbers).

    Args:
        module: The module.
        selective: Whether outputs for which :func:`is_costly` is true are saved.
        forward: The function to compute.
        args: Its arguments: tensors and other values, in tuples, lists and dicts.
    """

    def __init__(self, module: nn.Module, selective: bool, forward: Callable[..., Any], args: tuple) -> None:
        self.module, self.forward = module, forward
        leaves, self.spec = tree_flatten(args)
        self.inputs = [(_alias(leaf), leaf.requires_grad) if isinstance(leaf, Tensor) else (leaf, None) for leaf in leaves]
        self.versions = _versions(leaves)
        self.kept: Kept | None = deque() if selective else None
        self.places, self.saved = 0, []

    def __call__(self, *args: Any) -> Any:
        tensors = [leaf for leaf, _ in self.inputs if isinstance(leaf, Tensor)]
        self.kind = tensors[0].device.type
        before = None if _is_recorded() else _random_states(tensors)
        self.precision = precision_of(tensors[0])
        with saved_tensors_hooks(self._place, self._fill), nullcontext() if self.kept is None else _Keeping(self.kept):
            out = self.forward(*args)
        self.random = before if before is not None and _differ(before, _random_states(tensors)) else None
        return out

    def _place(self, _: Tensor) -> int:
        self.places += 1
        return self.places - 1

    def _fill(self, place: int) -> Tensor:
        if not self.saved or self.saved[place] is None:
            self._again()
        tensor, self.saved[place] = self.saved[place], None
        return tensor

    def _again(self) -> None:
        """Recompute with the inputs, random numbers and autocast state of the first run, up to the last tensor saved."""
        if self.versions != _versions([leaf for leaf, _ in self.inputs]):
            raise ConfigError(
                f'an input of {type(self.module).__name__} was changed in place, so it cannot run again: leave it out of '
                'recompute'
            )
        leaves = [leaf if grad is None else leaf.detach().requires_grad_(grad) for leaf, grad in self.inputs]
        saved: list[Tensor] = []

        def save(tensor: Tensor) -> None:
            saved.append(tensor.detach())
            if len(saved) == self.places:
                raise _AllSaved

        with ExitStack() as stack:
            stack.enter_context(suppress(_AllSaved))
            if self.random is not None:
                (cpu, *states), devices = self.random
                stack.enter_context(torch.random.fork_rng(devices, device_type=self.kind))
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self.kind)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.precision())
            stack.enter_context(_Again(self.module, self.kept))
            stack.enter_context(saved_tensors_hooks(save, save))
            self.forward(*tree_unflatten(leaves, self.spec))
        if len(saved) != self.places:
            raise ConfigError(
                f'{type(self.module).__name__} saved {self.places} tensors for the backward pass, and {len(saved)} when it ran '
                'again: leave it out of recompute'
            )
        self.saved = saved


class _AllSaved(Exception):  # noqa: N818  not an error
    """Stops recomputation once all tensors that the backward pass needs are computed."""


def _random_states(tensors: Sequence[Tensor]) -> RandomStates:
    devices, states = get_device_states(*tensors)
    return [torch.get_rng_state(), *states], devices


def _differ(before: RandomStates, after: RandomStates) -> bool:
    return any(not torch.equal(*states) for states in zip(before[0], after[0], strict=True))


def _is_recorded() -> bool:
    """Whether a CUDA graph is being captured. The state of the device's generator cannot be read then."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Again:
    """Context in which a module is recomputed: its layers in training mode have temporary buffers to update.

    ``track_running_stats=False`` would also work, but BatchNorm then saves two tensors fewer for its backward pass.

    Args:
        module: The module.
        kept: The outputs that the first run saved, to be used in the same order.
    """

    def __init__(self, module: nn.Module, kept: Kept | None = None) -> None:
        self.module, self.taking = module, nullcontext() if kept is None else _Taking(kept)

    def __enter__(self) -> None:
        self.own = [(layer._buffers, dict(layer._buffers)) for layer in self.module.modules() if layer.training]
        for layer in (layer for layer in self.module.modules() if layer.training and layer._buffers):
            layer._buffers.update(_spare_buffers(layer))
        self.taking.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.taking.__exit__(*error)
        for buffers, own in self.own:
            buffers.update(own)
        del self.own


def _spare_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of a layer's buffers; uninitialised, so without a kernel, for BatchNorm, whose training output ignores them."""
    own = {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
    if type(layer) not in BATCHNORMS:
        return {name: buffer.clone() for name, buffer in own.items()}
    counter = torch.zeros((), dtype=torch.long)
    return {name: torch.empty_like(buffer) if buffer.dim() else counter for name, buffer in own.items()}


class _Keeping(TorchDispatchMode):
    """Saves the outputs of operators for which :func:`is_costly` is true."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:  # so that compiled layers may run in this mode
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if is_costly(op, args):
            own = _alias(out) if isinstance(out, Tensor) else tree_map_only(Tensor, _alias, out)
            self.kept.append((op, own, _versions(own)))
        return out


class _Taking(_Keeping):
    """Returns the saved outputs instead of computing them."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not is_costly(op, args):
            return op(*args, **kwargs or {})
        if not self.kept:
            raise ConfigError('a unit of selective_recompute can be back-propagated once: put it into recompute')
        before, own, versions = self.kept.popleft()
        if before is not op or versions != _versions(own):
            raise ConfigError(
                f'a unit of selective_recompute changes the output of {before} in place, or runs {op} the second time: put it '
                'into recompute'
            )
        return own


def _alias(tensor: Tensor) -> Tensor:
    """Return the tensor detached from its graph, sharing its version counter."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(tensors: Any) -> list[int]:
    leaves = [tensors] if isinstance(tensors, Tensor) else tree_leaves(tensors)
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _without_call(relu: nn.ReLU, number: int, forward: Callable[..., Any], *args: Any) -> Any:
    """Run ``forward``, with the given call of ``relu`` (counted from 1) returning its input."""
    count = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x if count == number else type(relu).forward(relu, x)

    with replaced(relu, 'forward', counted):
        return forward(*args)


def is_costly(op: Callable, args: Sequence[Any]) -> bool:
    """Whether the output of an operator is expensive to recompute for its size.

    True for attention, and for a convolution or matrix product that sums at least as many values per output element as the
    output has channels. It is therefore false for a 1x1 convolution or a linear layer that widens, and for a depthwise
    convolution over many channels.
    """
    weigh = _weigher(op)
    return weigh is not None and weigh(args)


@cache
def _weigher(op: Callable) -> Callable[[Sequence[Any]], bool] | None:
    """A function of the arguments of ``op`` that says whether it is costly; None if it never is."""
    if op is aten.convolution.default:
        return lambda args: not args[6] and args[1].shape[1:].numel() >= args[1].shape[0]
    if (index := SECOND_FACTOR.get(op)) is not None:
        return lambda args: args[index].shape[-2] >= args[index].shape[-1]
    return (lambda _: True) if '_scaled_dot_product' in op.name() else None
