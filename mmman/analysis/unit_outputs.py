"""Records the outputs of a backbone's units during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mmman.partition import Unit


@contextmanager
def unit_outputs(
    backbone: nn.Module, units: Iterable[Unit], reduce: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record the last output of each unit while the context is open.

    Args:
        backbone: The backbone, with or without local heads.
        units: The units to record, from the backbone's chain.
        reduce: Called with the unit's name and output as soon as the unit has run. Its result is recorded in place of the
            output, which can then be freed.

    Yields:
        Outputs by the unit's name, in the order in which the units run: (B, C, H, W) or (B, L, C), attached to the autograd
        graph if gradients are enabled.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[name] = output if reduce is None else reduce(name, output)

        return hook

    handles = [backbone.get_submodule(unit.output).register_forward_hook(record(unit.name)) for unit in units]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
