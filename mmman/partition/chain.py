"""A backbone as a chain of units: where it can be cut, and which unit makes which output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor

from torch import Tensor, nn

from mmman.partition.calls import Call, Grid, call

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
        calls: How each of ``modules`` is called, of :mod:`mmman.partition.calls`. Default: each as
            :func:`mmman.partition.calls.call` does.
    """

    name: str
    modules: tuple[str, ...]
    output: str
    stage: int
    tensors: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()

    @classmethod
    def single(cls, path: str, stage: int) -> Unit:
        """Create a unit of one module, named by its path."""
        return cls(path, (path,), path, stage)

    @classmethod
    def sequence(cls, paths: tuple[str, ...], stage: int) -> Unit:
        """Create a unit of several modules, named by the path of the last module."""
        return cls(paths[-1], paths, paths[-1], stage)

    def of(self, backbone: nn.Module) -> nn.Module:
        """Return the unit of ``backbone`` as one module, called as ``unit(x)``, or ``unit(x, (h, w))`` if the chain needs that.

        Several modules, and modules with ``calls`` of their own, are wrapped in a :class:`UnitSequence`.
        """
        modules = [backbone.get_submodule(path) for path in self.modules]
        return modules[0] if len(modules) == 1 and not self.calls else UnitSequence(modules, self.calls)

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
        needs_hw_shape: Whether units, as :meth:`Unit.of` returns them, are called as ``unit(x, (h, w))``, with the height and
            width of x in pixels or patches (Swin, PVT).
        attends_everywhere: Whether units attend to all positions, so that their memory grows with the square of the pixels.
        input_size: Height and width in pixels of the image for the dry run. If the backbone rejects it, larger images are
            tried.
        in_channels: Number of image channels that the backbone takes. Default: found by the dry run.
    """

    units: tuple[Unit, ...]
    out_units: tuple[int, ...]
    norms: Mapping[int, str] = field(default_factory=dict)
    extra_tokens: int = 0
    needs_hw_shape: bool = False
    attends_everywhere: bool = False
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

    def fits(self, other: Feature) -> bool:
        """Whether a unit that takes features of the shape ``other`` takes those of this shape.

        Of a chain that hands on both, each unit takes a map as well as tokens.
        """
        return (self.channels, self.stride) == (other.channels, other.stride)

    def hw_shape(self, x: Tensor, size: tuple[int, int]) -> Grid:
        """Height and width of ``x``, in feature pixels or patches.

        Of tokens they are the sides of the images over the stride, rounded so that their product is the number of patch tokens:
        some backbones pad images that aren't a multiple of the stride, others (PVT) drop the border.

        Args:
            x: Features of this shape, (B, C, H, W) or (B, L, C).
            size: Height and width of the images, pixels.
        """
        if x.dim() == 4:
            return tuple(x.shape[-2:])
        count, (height, width) = x.shape[1] - (self.extra_tokens or 0), (side / self.stride for side in size)
        near = [(h, count // h) for h in range(max(1, floor(height) - 1), ceil(height) + 2) if count % h == 0]
        assert near, f'{count} tokens make no grid of about {height:g} x {width:g}'
        return min(near, key=lambda grid: abs(grid[0] - height) + abs(grid[1] - width))

    def as_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Convert features of this shape, from images of ``size``, to a map (B, C, H, W) without the extra tokens."""
        if self.extra_tokens is None:
            return x
        return x[:, self.extra_tokens :].transpose(1, 2).unflatten(2, self.hw_shape(x, size))

    def pool(self, x: Tensor) -> Tensor:
        """Pool features to vectors (B, C): the class token if there is one, else the mean over the map or the tokens."""
        if self.extra_tokens is None:
            return x.mean((2, 3))
        return x[:, 0] if self.extra_tokens else x.mean(1)


class UnitSequence(nn.ModuleList):
    """A unit of several modules as one module.

    Args:
        modules: The modules.
        calls: How each is called. Default: each as :func:`mmman.partition.calls.call` does.
    """

    def __init__(self, modules: Iterable[nn.Module], calls: Sequence[Call] = ()) -> None:
        super().__init__(modules)
        self.calls = tuple(calls) or (call,) * len(self)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        return self.run(x, *grid)[0]

    def run(self, x: Tensor, *grid: Grid) -> tuple:
        """Run the modules in order, from features ``(x, *grid)`` to features."""
        features = (x, *grid)
        for module, call_ in zip(self, self.calls, strict=True):
            features = call_(module, *features)
        return features


def run_unit(unit: nn.Module, x: Tensor, *grid: Grid) -> tuple:
    """Run a unit, :meth:`Unit.of` a backbone, on features, and return its features: x, and with a grid the new grid."""
    return unit.run(x, *grid) if isinstance(unit, UnitSequence) else call(unit, x, *grid)
