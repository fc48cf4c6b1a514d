"""A recorder of operators on the CPU, which as a CUDA graph does run again on the memory of the recording."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)
SYNCING = (aten._local_scalar_dense.default, aten.nonzero.default)


class CPUGraphCapturer(TorchDispatchMode):
    """In a CUDA recording nothing runs; here everything does, and what it changed is put back at the end.

    Fresh memory is zero and not what happens to be there. Nothing is used again: all tensors of a recording stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.captures = 0
        self.is_capturing = False

    def begin(self) -> None:
        self.is_capturing = True
        self._operators, self._before = [], []
        self.__enter__()

    @torch.no_grad()
    def end(self) -> Callable[[], None]:
        self.cancel()
        for tensor, value in reversed(self._before):
            tensor.data.copy_(value)
        self.captures += 1
        operators = self._operators

        @torch.no_grad()
        @torch.autocast('cpu', enabled=False)  # what was cast was recorded
        def replay() -> None:
            for op, args, kwargs, out in operators:
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.data, (args, kwargs))  # versions aren't counted
                recomputed = op(*args, **kwargs)
                for tensor, value in zip(tensors(out), tensors(recomputed), strict=True):
                    if tensor is not value:
                        tensor.data.copy_(value)

        return replay

    def cancel(self) -> None:
        if self.is_capturing:
            self.__exit__(None, None, None)
        self.is_capturing = False

    def static_view(self, tensor: Tensor) -> Tensor:
        return tensor.data

    def sync_side_stream(self) -> None:
        pass

    def on_side_stream(self, compute: Callable) -> tuple[Tensor, ...]:
        return compute()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in SYNCING and args[0].dtype != torch.long:  # one_hot looks at its labels on a CPU, and on no GPU
            raise RuntimeError(f'{op} waits for the device')
        with self.paused():
            self._before += [(tensor, tensor.clone()) for tensor in changed(op, [*args, *kwargs.values()])]
        out = op(*args, **kwargs)
        if op in EMPTY:
            with self.paused():
                out.zero_()
            if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
                value = float('nan') if out.is_floating_point() else torch.iinfo(out.dtype).max
                self._operators.append((aten.fill_.Scalar, (out, value), {}, out))
            return out
        if not op.is_view:
            self._operators.append((op, args, kwargs, out))
        return out

    def nbytes(self) -> int:
        return 0  # tensors like all others

    def paused(self):
        return torch.utils._python_dispatch._disable_current_modes()


def changed(op: torch._ops.OpOverload, given: list) -> list[Tensor]:
    if op is aten.native_batch_norm.default:  # the running statistics, which its schema keeps quiet about
        return tensors(given[3:5])
    return tensors([one for one, argument in zip(given, op._schema.arguments, strict=False) if argument.is_write])


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
