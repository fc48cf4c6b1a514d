"""A backbone as a chain of units: what can be cut where, and which unit makes which output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

STEM = 'stem'
"""Name of a first unit that is no layer of its own: where a stage is split evenly it goes with the unit that follows."""


@dataclass(frozen=True)
class Unit:
    """The smallest layer that is never cut: a stem, a residual block, a transformer layer.

    A unit names modules and holds none, because conversions (SyncBN) replace modules.

    Attributes:
        name: What a user writes to cut after this unit, e.g. ``layer2.3`` or ``stem``.
        modules: Paths below the backbone of all its modules that own parameters or state, in the order in which they run, each
            on what the one before returns. (A first unit, which is never copied, may put more than that between them.)
        output: Path of the module whose output is the unit's output; the last of ``modules``.
        stage: Zero-based stage. A stem belongs to the first.
        tensors: Names of parameters of the backbone itself that the unit uses, e.g. ``cls_token``.
    """

    name: str
    modules: tuple[str, ...]
    output: str
    stage: int
    tensors: tuple[str, ...] = ()

    @classmethod
    def single(cls, path: str, stage: int) -> Unit:
        """A unit that is one module, named by its path."""
        return cls(path, (path,), path, stage)

    @classmethod
    def sequence(cls, paths: tuple[str, ...], stage: int) -> Unit:
        """A unit of several modules, named by the path of the last."""
        return cls(paths[-1], paths, paths[-1], stage)

    def of(self, backbone: nn.Module) -> nn.Module:
        """The unit of ``backbone`` as one module: the module itself, or its modules in a :class:`UnitSequence`."""
        modules = [backbone.get_submodule(path) for path in self.modules]
        return modules[0] if len(modules) == 1 else UnitSequence(modules)

    def parameters(self, backbone: nn.Module) -> Iterator[nn.Parameter]:
        for path in self.modules:
            yield from backbone.get_submodule(path).parameters()
        for name in self.tensors:
            yield getattr(backbone, name)

    def is_trainable(self, backbone: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters(backbone))


@dataclass(frozen=True)
class Chain:
    """All units of a backbone in the order in which they run, each fed by the one before and by nothing else.

    Attributes:
        units: The units.
        taps: For every element of the tuple that the backbone returns, the index of the unit that makes it.
        norms: For elements that pass a module of their own on the way out (Swin's ``norm0``, a ViT's final norm), element to
            path. It belongs to the neck: an output from inside a non-final block is detached in front of it.
        extra_tokens: Tokens in front of the patch tokens where features are (B, L, C): class and distillation tokens.
        takes_grid: Whether units are called as ``unit(x, (h, w))``, the height and width of x in patches (Swin).
        input_size: Height and width in pixels of an image for the dry run; larger ones are tried where the backbone doesn't
            accept it.
        in_channels: Channels of the images that the backbone takes. Default: found by the dry run.
    """

    units: tuple[Unit, ...]
    taps: tuple[int, ...]
    norms: Mapping[int, str] = field(default_factory=dict)
    extra_tokens: int = 0
    takes_grid: bool = False
    input_size: tuple[int, int] = (64, 64)
    in_channels: int | None = None


@dataclass(frozen=True)
class Feature:
    """The shape of a unit's output.

    Attributes:
        channels: Channels C.
        stride: Input pixels a feature pixel, or a patch token, along a side.
        extra_tokens: None for a map (B, C, H, W). For tokens (B, L, C) how many of the L come before the H * W patch tokens.
    """

    channels: int
    stride: int
    extra_tokens: int | None = None

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the map, or of the patches, for images of ``size``; patch embedding and merging round up."""
        return -(-size[0] // self.stride), -(-size[1] // self.stride)

    def as_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Features of this shape from images of ``size`` as a map (B, C, H, W), without the extra tokens."""
        if self.extra_tokens is None:
            return x
        return x[:, self.extra_tokens :].transpose(1, 2).unflatten(2, self.grid(size))

    def pool(self, x: Tensor) -> Tensor:
        """The vector (B, C) that stands for an image: its class token, else the mean over the map or the tokens."""
        if self.extra_tokens is None:
            return x.mean((2, 3))
        return x[:, 0] if self.extra_tokens else x.mean(1)


class UnitSequence(nn.ModuleList):
    """A unit of several modules as one module."""

    def forward(self, x: Tensor, *grid: tuple[int, int]) -> Tensor:
        """Run one module after the other. One that changes the grid (Swin's patch merging) returns it beside the features."""
        for module in self:
            out = module(x, *grid)
            x, *grid = out if isinstance(out, tuple) else (out, *grid)
        return x
