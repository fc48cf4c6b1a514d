"""Run a backbone once to find the images that it takes, and the shape of every unit's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from mmman.errors import LocalLearningError, UnsupportedBackboneError
from mmman.partition.chain import Chain, Feature

LARGER_SIDES = (128, 224, 256, 384, 512)
"""Sides in pixels of the square images to try if a backbone fails on an image of its chain's ``input_size``."""

USUAL_CHANNELS = (3, 1, 4)
"""Numbers of image channels to try if the first convolution doesn't see the image itself."""


@dataclass(frozen=True)
class Measured:
    """Result of a dry run.

    Attributes:
        image_channels: Number of image channels that the backbone takes.
        image_size: Height and width, in pixels, of the image that the backbone ran on.
        features: The shape of every unit's output.
        is_complete: Whether the input of every unit was wider than one pixel, so that the unit's stride could be measured.
    """

    image_channels: int
    image_size: tuple[int, int]
    features: tuple[Feature, ...]
    is_complete: bool

    def run(self, backbone: nn.Module) -> None:
        """Run the backbone once more on an image of the same size and channels."""
        run_once(backbone, self.image_channels, self.image_size)


def measure(backbone: nn.Module, chain: Chain) -> Measured:
    """Run ``backbone`` on the first image that it accepts. The backbone isn't modified.

    This tries the chain's ``input_size``, then larger images. The number of channels is the chain's ``in_channels``. If that is
    None, it tries the number that the first convolution takes, then :data:`USUAL_CHANNELS`.

    Raises:
        UnsupportedBackboneError: The backbone accepts none of these images, or its forward pass doesn't run the chain's units.
    """
    reason, narrow = None, None
    for channels in _image_channels(backbone, chain):
        for size in _image_sizes(chain):
            try:
                found = _measure_on(backbone, chain, channels, size)
            except LocalLearningError:
                raise
            except Exception as error:  # a backbone may raise any exception on an unsupported image
                if reason is None or reason[0] == channels:
                    reason = channels, size, error
                continue
            if found.is_complete:
                return found
            narrow = narrow or found
        if narrow is not None:
            return narrow
    channels, size, error = reason
    raise UnsupportedBackboneError(
        f'{type(backbone).__name__} cannot be cut into blocks: it failed on every image that was tried, the last one of '
        f'{channels} x {size[0]} x {size[1]} ({type(error).__name__}: {error}); if it needs another, set in_channels and '
        'input_size of its Chain (docs/howto/new_backbone.md)'
    ) from error


@torch.no_grad()
def run_once(backbone: nn.Module, channels: int, size: tuple[int, int]) -> object:
    """Run the backbone on a black image in eval mode, and restore the mode of every module. Returns its outputs."""
    modes = {module: module.training for module in backbone.modules()}
    for module in modes:
        module.training = False
    try:
        return backbone(next(backbone.parameters()).new_zeros(1, channels, *size))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _measure_on(backbone: nn.Module, chain: Chain, channels: int, size: tuple[int, int]) -> Measured:
    shapes: list[torch.Size] = []
    order: list[str] = []

    def record(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not isinstance(output, Tensor) or output.dim() not in (3, 4):
                raise UnsupportedBackboneError(
                    f'{type(backbone).__name__} cannot be cut into blocks: its unit {name} does not return a single '
                    '(B, C, H, W) or (B, L, C) tensor'
                )
            order.append(name)
            shapes.append(output.shape)

        return hook

    handles = [backbone.get_submodule(unit.output).register_forward_hook(record(unit.name)) for unit in chain.units]
    try:
        outputs = run_once(backbone, channels, size)
    finally:
        for handle in handles:
            handle.remove()
    count = len(outputs) if isinstance(outputs, (tuple, list)) else 1
    if order != [unit.name for unit in chain.units] or count != len(chain.out_units):
        runs = zip_longest(order, [unit.name for unit in chain.units], fillvalue='no unit')
        found = next((f'it runs {ran}, not {unit}' for ran, unit in runs if ran != unit), None)
        found = found or f'it has {count} outputs, not {len(chain.out_units)}'
        raise UnsupportedBackboneError(
            f'the forward pass of {type(backbone).__name__} does not run the units of its chain in order ({found}): correct '
            'the chain that is registered for it (mmman.register_chain)'
        )

    features, side, stride = [], float(size[1]), 1.0
    is_complete = True
    for shape in shapes:
        is_complete &= side > 1
        is_map = len(shape) == 4
        new = float(shape[3]) if is_map else ((shape[1] - chain.extra_tokens) * size[1] / size[0]) ** 0.5
        stride *= _ratio(side, new)
        side = new
        features.append(Feature(shape[1 if is_map else 2], max(1, round(stride)), None if is_map else chain.extra_tokens))
    return Measured(channels, size, tuple(features), is_complete)


def _ratio(before: float, after: float) -> float:
    """The stride of a unit from the sides of its input and output. The output side may be rounded up or down."""
    if after > before:
        return 1 / round(after / before)
    nearest = round(before / after)
    if after != round(after) or before != round(before):
        return nearest
    fitting = [r for r in range(1, round(before) + 1) if after in (before // r, -(-before // r))]
    powers = [r for r in fitting if r & (r - 1) == 0]
    return min(powers or fitting or [nearest], key=lambda r: abs(r - before / after))


def _image_channels(backbone: nn.Module, chain: Chain) -> Iterator[int]:
    if chain.in_channels is not None:
        yield chain.in_channels
        return
    # A stem may rearrange pixels into channels before its convolution (Focus: 2 x 2 pixels).
    first = next((module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    yield from dict.fromkeys(channels for channels in (first, *USUAL_CHANNELS, (first or 0) // 4) if channels)


def _image_sizes(chain: Chain) -> Iterator[tuple[int, int]]:
    yield chain.input_size
    yield from ((side, side) for side in LARGER_SIDES if side > max(chain.input_size))
