"""A backbone as a chain of units: where it can be cut, and which unit makes which output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

STEM = 'stem'
"""Name of a stem, the first unit. When a stage is split evenly, a stem stays with the next unit and isn't counted."""


@dataclass(frozen=True)
class Unit:
    """The smallest part of a backbone that is never cut: a stem, a residual block, a transformer layer.

    A unit stores the paths of its modules instead of the modules, because conversions (SyncBN) replace modules.

    Attributes:
        name: The name that a user writes to cut after this unit, e.g. ``layer2.3`` or ``stem``.
        modules: Paths, relative to the backbone, of all modules of the unit that own parameters or state, in the order in
            which they run. Each module takes the output of the previous one. Only the first unit of a chain, which is never
            copied, may run other operations between its modules.
        output: Path of the module whose output is the unit's output. It is the last of ``modules``, except in a first unit.
        stage: Zero-based index of the stage. A stem belongs to the first stage.
        tensors: Names of parameters and buffers that belong to the backbone itself and that the unit uses, e.g. ``cls_token``.
    """

    name: str
    modules: tuple[str, ...]
    output: str
    stage: int
    tensors: tuple[str, ...] = ()

    @classmethod
    def single(cls, path: str, stage: int) -> Unit:
        """Create a unit of one module, named by its path."""
        return cls(path, (path,), path, stage)

    @classmethod
    def sequence(cls, paths: tuple[str, ...], stage: int) -> Unit:
        """Create a unit of several modules, named by the path of the last module."""
        return cls(paths[-1], paths, paths[-1], stage)

    def of(self, backbone: nn.Module) -> nn.Module:
        """Return the unit of ``backbone`` as one module. Several modules are wrapped in a :class:`UnitSequence`."""
        modules = [backbone.get_submodule(path) for path in self.modules]
        return modules[0] if len(modules) == 1 else UnitSequence(modules)

    def parameters(self, backbone: nn.Module) -> Iterator[nn.Parameter]:
        for path in self.modules:
            yield from backbone.get_submodule(path).parameters()
        own = dict(backbone.named_parameters(recurse=False))
        yield from (own[name] for name in self.tensors if name in own)

    def is_trainable(self, backbone: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters(backbone))


@dataclass(frozen=True)
class Chain:
    """All units of a backbone in the order in which they run. The only input of a unit is the output of the previous one.

    Attributes:
        units: The units.
        out_units: For every element of the tuple that the backbone returns, the index of the unit that makes it.
        norms: Maps an element of the returned tuple to the path of a module that is applied only to that output (Swin's
            ``norm0``, a ViT's final norm). The module counts as part of the neck: an output from inside a non-final block is
            detached before it.
        extra_tokens: Number of tokens before the patch tokens in features (B, L, C): class and distillation tokens.
        needs_hw_shape: Whether units are called as ``unit(x, (h, w))``, with the height and width of x in patches (Swin).
        input_size: Height and width in pixels of the image for the dry run. If the backbone rejects it, larger images are
            tried.
        in_channels: Number of image channels that the backbone takes. Default: found by the dry run.
    """

    units: tuple[Unit, ...]
    out_units: tuple[int, ...]
    norms: Mapping[int, str] = field(default_factory=dict)
    extra_tokens: int = 0
    needs_hw_shape: bool = False
    input_size: tuple[int, int] = (64, 64)
    in_channels: int | None = None


@dataclass(frozen=True)
class Feature:
    """The shape of a unit's output.

    Attributes:
        channels: Number of channels C.
        stride: Input pixels per feature pixel, or per patch token, along a side.
        extra_tokens: None for a map (B, C, H, W). For tokens (B, L, C), the number of tokens before the H * W patch tokens.
    """

    channels: int
    stride: int
    extra_tokens: int | None = None

    def __str__(self) -> str:
        return f'{self.channels} channels at stride {self.stride}'

    def hw_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, in feature pixels or patches, for images of ``size`` (H, W) in pixels. Sizes are rounded up."""
        return -(-size[0] // self.stride), -(-size[1] // self.stride)

    def as_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Convert features of this shape, from images of ``size``, to a map (B, C, H, W) without the extra tokens."""
        if self.extra_tokens is None:
            return x
        return x[:, self.extra_tokens :].transpose(1, 2).unflatten(2, self.hw_shape(size))

    def pool(self, x: Tensor) -> Tensor:
        """Pool features to vectors (B, C): the class token if there is one, else the mean over the map or the tokens."""
        if self.extra_tokens is None:
            return x.mean((2, 3))
        return x[:, 0] if self.extra_tokens else x.mean(1)


class UnitSequence(nn.ModuleList):
    """A unit of several modules as one module."""

    def forward(self, x: Tensor, *hw_shape: tuple[int, int]) -> Tensor:
        """Run the modules in order. A module that changes the shape (Swin's patch merging) returns (features, new hw_shape)."""
        for module in self:
            out = module(x, *hw_shape)
            x, *hw_shape = out if isinstance(out, tuple) else (out, *hw_shape)
        return x
