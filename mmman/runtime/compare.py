"""Compares the content of a checkpoint with what a run expects, without assuming any structure of the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Kind(str):
    """A description of a value's kind, for messages."""


MISSING, BOOL, MAPPING = Kind('missing'), Kind('a bool'), Kind('a dict')


class Difference(NamedTuple):
    """A path at which two values differ, and a description of each."""

    path: str
    theirs: str
    ours: str


def kind(value: object) -> Kind:
    """Return the kind of a value: a tensor's dtype and shape, a number, a list of 3, ... A :class:`Kind` is returned as is."""
    if isinstance(value, Kind):
        return value
    if value is None:
        return MISSING
    if isinstance(value, (bool, np.bool_)):
        return BOOL
    if isinstance(value, Mapping):
        return MAPPING
    return Kind(_name(value))


def kind_of(dtype: torch.dtype, shape: Iterable[int]) -> Kind:
    """Return the kind of a tensor with this dtype and shape."""
    return Kind(f'{str(dtype).removeprefix("torch.")} {tuple(shape)}')


def _name(value: object) -> str:
    if isinstance(value, Tensor):
        return kind_of(value.dtype, value.shape)
    if isinstance(value, (Number, np.number)):
        return 'a number' if is_number(value) else 'a non-finite number'
    if isinstance(value, (list, tuple)):
        return f'a list of {len(value)}'
    return 'a string' if isinstance(value, str) else type(value).__name__


def kinds(value: object) -> object:
    """Return the kinds of a mapping's entries; for any other value, its kind."""
    return {name: kind(item) for name, item in value.items()} if isinstance(value, Mapping) else kind(value)


def plain(value: object) -> object:
    """Return a str, number or bool as is; for any other value, its kind."""
    return value if isinstance(value, (str, bool, int, float)) else kind(value)


def as_values(value: object) -> object:
    """Convert every str, number and bool in a value to a :class:`Kind`, so that they are compared by value."""
    if isinstance(value, Mapping):
        return {name: as_values(item) for name, item in value.items()}
    return [*map(as_values, value)] if isinstance(value, (list, tuple)) else Kind(plain(value))


def differences(
    theirs: object, ours: object, compare_by: Callable[[object], object] = kind, path: str = ''
) -> Iterator[Difference]:
    """Compare two values recursively, as deep as ``ours`` is nested.

    Args:
        theirs: Any value.
        ours: The expected value.
        compare_by: Maps values that are neither mappings nor lists to what must be equal; by default their :func:`kind`.
        path: The path of the two values, for the result.

    Yields:
        All differences, in the order of the keys.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        pairs = [(key, theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys(), key=str)]
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(theirs) == len(ours):
        pairs = [(i, *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        if compare_by(theirs) != compare_by(ours):
            yield Difference(path, str(compare_by(theirs)), str(compare_by(ours)))
        return
    for key, their, our in pairs:
        yield from differences(their, our, compare_by, f'{path}.{key}' if path else str(key))


class Rule(NamedTuple):
    """A condition on a single value, and its description."""

    text: str
    accepts: Callable[[object], bool]


def is_integer(value: object, minimum: int = 0, maximum: int = 2**63 - 1) -> bool:
    """Whether a value is an integer in a range, bounds included. A bool is no integer here."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and minimum <= value <= maximum


def is_number(value: object, above: float = -math.inf, below: float = math.inf) -> bool:
    """Whether a value is a finite number between two bounds, which are excluded."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and above < value < below


def is_mapping_of(value: object, accepts: Callable[[object], bool]) -> bool:
    """Whether a value is a mapping from strings to values that satisfy a condition."""
    return isinstance(value, Mapping) and all(isinstance(name, str) and accepts(item) for name, item in value.items())


def is_list_of(value: object, accepts: Callable[[object], bool]) -> bool:
    """Whether a value is a list or tuple of values that satisfy a condition."""
    return isinstance(value, (list, tuple)) and all(map(accepts, value))


def get_at_path(value: object, path: str, default: object = None) -> object:
    """Return the value at a dotted path through nested mappings, or the default if there is none."""
    for key in path.split('.'):
        value = value.get(key, default) if isinstance(value, Mapping) else default
    return value


def is_finite(tensor: object, infinity: bool = False) -> bool:
    """Whether a tensor has no NaN and, unless ``infinity=True``, no infinity. True for all values but such tensors."""
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return not torch.isnan(tensor).any() if infinity else bool(torch.isfinite(tensor).all())
