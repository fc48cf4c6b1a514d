"""A backbone as a chain of units: what can be cut where, and which unit makes which output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """The smallest layer that is never cut: a stem, a residual block, a transformer layer.

    A unit names modules and holds none, because conversions (SyncBN) replace modules.

    Attributes:
        name: What a user writes to cut after this unit, e.g. ``layer2.3`` or ``stem``.
        modules: Paths below the backbone of all its modules that own parameters or state, in order.
        output: Path of the module whose output is the unit's output.
        stage: Zero-based stage. A stem belongs to the first.
    """

    name: str
    modules: tuple[str, ...]
    output: str
    stage: int

    @classmethod
    def single(cls, path: str, stage: int) -> Unit:
        """A unit that is one module, named by its path."""
        return cls(path, (path,), path, stage)

    def parameters(self, backbone: nn.Module) -> Iterator[nn.Parameter]:
        for path in self.modules:
            yield from backbone.get_submodule(path).parameters()

    def is_trainable(self, backbone: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters(backbone))


@dataclass(frozen=True)
class Chain:
    """All units of a backbone in the order in which they run, each fed by the one before and by nothing else.

    Attributes:
        units: The units.
        taps: For every element of the tuple that the backbone returns, the index of the unit that makes it.
    """

    units: tuple[Unit, ...]
    taps: tuple[int, ...]
