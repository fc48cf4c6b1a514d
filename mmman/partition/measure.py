"""A dry run of a backbone: the images that it takes, and the shape of every unit's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmman.errors import LocalLearningError, UnsupportedBackboneError
from mmman.partition.chain import Chain, Feature

LARGER_SIDES = (128, 224, 256, 384, 512)
"""Sides in pixels of the square images to try where a backbone doesn't run on one of its chain's ``input_size``."""

USUAL_CHANNELS = (3, 1, 4)
"""Channels of images to try where the first convolution doesn't see the image itself."""


@dataclass(frozen=True)
class Measured:
    """What a dry run shows.

    Attributes:
        image_channels: Channels of the images that the backbone takes.
        image_size: Height and width of the image that it ran on.
        features: The shape of every unit's output.
        is_complete: Whether every unit saw more than one pixel, so that its stride shows.
    """

    image_channels: int
    image_size: tuple[int, int]
    features: tuple[Feature, ...]
    is_complete: bool

    def run(self, backbone: nn.Module) -> None:
        """Run the backbone once more as it was measured."""
        run_once(backbone, self.image_channels, self.image_size)


def measure(backbone: nn.Module, chain: Chain) -> Measured:
    """Run ``backbone`` without leaving a trace, on the first image that it accepts.

    It tries the chain's ``input_size``, then larger images, with the chain's ``in_channels``, or else with the channels that
    the first convolution takes, then with :data:`USUAL_CHANNELS`.

    Raises:
        UnsupportedBackboneError: It accepts none of them, or its units aren't what its forward pass runs.
    """
    reason, narrow = None, None
    for channels in _image_channels(backbone, chain):
        for size in _image_sizes(chain):
            try:
                found = _measure_on(backbone, chain, channels, size)
            except LocalLearningError:
                raise
            except Exception as error:  # a backbone may raise anything on an image that it can't take
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
        f'{type(backbone).__name__} cannot be cut into blocks: it ran on no image that was tried, the last one of '
        f'{channels} x {size[0]} x {size[1]} ({type(error).__name__}: {error}); if it needs another, set in_channels and '
        'input_size of its Chain (docs/howto/new_backbone.md)'
    ) from error


@torch.no_grad()
def run_once(backbone: nn.Module, channels: int, size: tuple[int, int]) -> object:
    """The backbone's outputs for a black image, in eval mode; every module returns to the mode it was in."""
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

    def note(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not isinstance(output, Tensor) or output.dim() not in (3, 4):
                raise UnsupportedBackboneError(
                    f'{type(backbone).__name__} cannot be cut into blocks: its unit {name} gives no single (B, C, H, W) or '
                    '(B, L, C) tensor'
                )
            order.append(name)
            shapes.append(output.shape)

        return hook

    handles = [backbone.get_submodule(unit.output).register_forward_hook(note(unit.name)) for unit in chain.units]
    try:
        outputs = run_once(backbone, channels, size)
    finally:
        for handle in handles:
            handle.remove()
    count = len(outputs) if isinstance(outputs, (tuple, list)) else 1
    if order != [unit.name for unit in chain.units] or count != len(chain.taps):
        raise UnsupportedBackboneError(f'the units of {type(backbone).__name__} are not what its forward pass runs')

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
    """The stride between two sides, of which a unit may have rounded the second one up or down."""
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
    # a stem may rearrange pixels into channels in front of its convolution (Focus: 2 x 2 pixels)
    first = next((module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    yield from dict.fromkeys(channels for channels in (first, *USUAL_CHANNELS, (first or 0) // 4) if channels)


def _image_sizes(chain: Chain) -> Iterator[tuple[int, int]]:
    yield chain.input_size
    yield from ((side, side) for side in LARGER_SIDES if side > max(chain.input_size))
