"""Comparing what a checkpoint holds with what a run expects, without trusting the former to have any form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Kind(str):
    """What sort of value something is, as it is said to users."""


NOTHING, FLAG, TABLE = Kind('nothing'), Kind('True or False'), Kind('a table')


class Difference(NamedTuple):
    """Where two values differ, and what each is there."""

    path: str
    theirs: str
    ours: str


def kind(value: object) -> Kind:
    """The kind of a value: a tensor's dtype and shape, a number, a list of 3, ...; of a :class:`Kind`, itself."""
    if isinstance(value, Kind):
        return value
    if value is None:
        return NOTHING
    if isinstance(value, (bool, np.bool_)):
        return FLAG
    if isinstance(value, Mapping):
        return TABLE
    return Kind(_name(value))


def kind_of(dtype: torch.dtype, shape: Iterable[int]) -> Kind:
    """The kind of a tensor."""
    return Kind(f'{str(dtype).removeprefix("torch.")} {tuple(shape)}')


def _name(value: object) -> str:
    if isinstance(value, Tensor):
        return kind_of(value.dtype, value.shape)
    if isinstance(value, (Number, np.number)):
        return 'a number' if is_number(value) else 'no finite number'
    if isinstance(value, (list, tuple)):
        return f'a list of {len(value)}'
    return 'a text' if isinstance(value, str) else type(value).__name__


def kinds(value: object) -> object:
    """The kinds of a table's entries; of any other value, its own."""
    return {name: kind(item) for name, item in value.items()} if isinstance(value, Mapping) else kind(value)


def plain(value: object) -> object:
    """A text, a number or a flag as it is; of any other value, its kind."""
    return value if isinstance(value, (str, bool, int, float)) else kind(value)


def words(value: object) -> object:
    """A value with every text, number and flag in it as a :class:`Kind`, so that these are compared as they are."""
    if isinstance(value, Mapping):
        return {name: words(item) for name, item in value.items()}
    return [*map(words, value)] if isinstance(value, (list, tuple)) else Kind(plain(value))


def differences(theirs: object, ours: object, look: Callable[[object], object] = kind, path: str = '') -> Iterator[Difference]:
    """Walk through two values, as deep as ``ours`` goes.

    Args:
        theirs: Anything.
        ours: What is expected.
        look: What has to be equal of two values that are no tables or lists: by default their :func:`kind`.
        path: Where the two values are, for the result.

    Yields:
        All differences, in the order of the keys.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        pairs = [(key, theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys(), key=str)]
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(theirs) == len(ours):
        pairs = [(i, *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        if look(theirs) != look(ours):
            yield Difference(path, str(look(theirs)), str(look(ours)))
        return
    for key, their, our in pairs:
        yield from differences(their, our, look, f'{path}.{key}' if path else str(key))


class Rule(NamedTuple):
    """What a single value has to be."""

    text: str
    holds: Callable[[object], bool]


def is_whole(value: object, minimum: int = 0, maximum: int = 2**63 - 1) -> bool:
    """Whether a value is a whole number in a range; True and False aren't."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and minimum <= value <= maximum


def is_number(value: object, above: float = -math.inf, below: float = math.inf) -> bool:
    """Whether a value is a finite number between two others, these excluded."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and above < value < below


def is_table_of(value: object, holds: Callable[[object], bool]) -> bool:
    """Whether a value maps names to values that fulfil a condition."""
    return isinstance(value, Mapping) and all(isinstance(name, str) and holds(item) for name, item in value.items())


def is_list_of(value: object, holds: Callable[[object], bool]) -> bool:
    """Whether a value is a list of values that fulfil a condition."""
    return isinstance(value, (list, tuple)) and all(map(holds, value))


def at(value: object, path: str, default: object = None) -> object:
    """The value at a dotted path through nested tables, or the default where there is none."""
    for key in path.split('.'):
        value = value.get(key, default) if isinstance(value, Mapping) else default
    return value


def is_finite(tensor: object, infinity: bool = False) -> bool:
    """Whether a tensor has no NaN and, unless ``infinity=True``, no infinity. Other values have neither."""
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return not torch.isnan(tensor).any() if infinity else bool(torch.isfinite(tensor).all())
