"""Keep the ReLU that produces a unit's output out of the recomputation: its backward pass needs only that output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from mmman.partition import Unit

OutputReLUs = dict[nn.Module, tuple[str, int]]
"""For each module whose output is that of one of its ReLUs: the ReLU's name, and how often the module calls it."""


class DeferrableReLU(nn.ReLU):
    """A ReLU that can return its input unchanged at one of its calls, so that the caller applies it afterwards.

    Args:
        inplace: As of ``nn.ReLU``.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(inplace)
        self._calls_left = 0

    @contextmanager
    def deferred(self, call: int) -> Iterator[None]:
        """While this context is open, call number ``call`` (counted from 1) returns its input."""
        self._calls_left = call
        try:
            yield
        finally:
            self._calls_left = 0

    def forward(self, x: Tensor) -> Tensor:
        if self._calls_left:
            self._calls_left -= 1
            if not self._calls_left:
                return x
        return super().forward(x)


@contextmanager
def find_output_relus(modules: Iterable[nn.Module]) -> Iterator[OutputReLUs]:
    """While this context is open, each module must run once. The yielded :data:`OutputReLUs` are filled as they run."""
    found: OutputReLUs = {}
    with ExitStack() as handles:
        for module in modules:
            outputs: list[tuple[str, Tensor]] = []
            for name, child in module.named_children():
                if type(child) in (nn.ReLU, DeferrableReLU) and not child._forward_hooks and not child._forward_pre_hooks:

                    def collect(_: nn.Module, args: tuple, out: Tensor, name: str = name, outputs: list = outputs) -> None:
                        outputs.append((name, out))

                    handles.callback(child.register_forward_hook(collect).remove)

            def compare(module: nn.Module, args: tuple, out: Tensor, outputs: list = outputs) -> None:
                if outputs and outputs[-1][1] is out:
                    found[module] = outputs[-1][0], sum(name == outputs[-1][0] for name, _ in outputs)
                outputs.clear()

            handles.callback(module.register_forward_hook(compare).remove)
        yield found


def output_relus_of(units: Iterable[Unit], backbone: nn.Module, run: Callable[[nn.Module], object]) -> OutputReLUs:
    """Find the ReLUs that produce the outputs of the modules of ``units``, by ``run(backbone)``, a forward pass."""
    paths = [path for unit in units for path in unit.modules]
    if not paths:
        return {}
    with find_output_relus(map(backbone.get_submodule, paths)) as found:
        run(backbone)
    return found


def defer_relu_(module: nn.Module, name: str) -> None:
    """Replace the child ReLU called ``name`` by a :class:`DeferrableReLU`."""
    setattr(module, name, _like(DeferrableReLU, module.get_submodule(name)))


def restore_relus_(module: nn.Module) -> None:
    """Replace every :class:`DeferrableReLU` among the children of ``module`` by a plain ReLU."""
    for name, child in list(module.named_children()):
        if isinstance(child, DeferrableReLU):
            setattr(module, name, _like(nn.ReLU, child))


def _like(kind: type[nn.ReLU], relu: nn.ReLU) -> nn.ReLU:
    return kind(relu.inplace).train(relu.training)
