"""How a backbone calls the modules of its units.

Between units and modules a backbone hands on *features*: a tensor x, (B, C, H, W) or (B, L, C), and behind it the grid (height,
width) of its pixels or tokens, if the chain has ``needs_hw_shape``. Each function here calls a module on features and returns
the next features. The functions are names in a module, so units that hold them can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Grid = tuple[int, int]
"""Height and width of features, in pixels or tokens."""

Call = Callable[..., tuple]
"""``call(module, x, *grid)``, with one grid or none, returns ``(x, *grid)`` behind the module."""


def call(module: nn.Module, x: Tensor, *grid: Grid) -> tuple:
    """``module(x)``, or ``module(x, (h, w))``. A module that changes the grid returns it beside x (Swin's patch merging)."""
    out = module(x, *grid)
    return out if isinstance(out, tuple) else (out, *grid)


def call_with_sides(module: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """``module(x, h, w)``: a block of MSCAN."""
    return module(x, *grid), grid


def call_on_map(module: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """``module(x)`` on a map (B, C, H, W), which is contiguous if it was tokens.

    A patch embedding returns the new grid beside x, as ``x, (h, w)`` or ``x, h, w``.
    """
    return _call_on_map(module, to_map(x, grid).contiguous(), grid)


def call_on_view(module: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """:func:`call_on_map` on a view of tokens, as mmseg's SegFormer: with another memory layout, so other rounding."""
    return _call_on_map(module, to_map(x, grid), grid)


def call_on_tokens(module: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """``module(x)`` on tokens (B, L, C): a norm behind a stage."""
    return module(to_tokens(x)), grid


def to_map(x: Tensor, *grid: Grid) -> Tensor:
    """View tokens (B, H * W, C) as a map (B, C, H, W). A map is returned as it is."""
    return x if x.dim() == 4 else x.transpose(1, 2).unflatten(2, *grid)


def to_tokens(x: Tensor) -> Tensor:
    """View a map (B, C, H, W) as tokens (B, H * W, C). Tokens are returned as they are."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def _call_on_map(module: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    out = module(x)
    if isinstance(out, Tensor):
        return out, grid
    x, *sides = out
    return x, tuple(sides[0] if len(sides) == 1 else sides)
