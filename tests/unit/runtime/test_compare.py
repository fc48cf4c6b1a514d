"""Kinds of values and the differences between two of any structure."""

import math

import numpy as np
import pytest
import torch

from mmman.runtime.compare import (
    BOOL,
    MAPPING,
    MISSING,
    as_values,
    differences,
    get_at_path,
    is_finite,
    is_integer,
    is_list_of,
    is_mapping_of,
    is_number,
    kind,
    kind_of,
    kinds,
    plain,
)


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (None, MISSING),
        (True, BOOL),
        (np.bool_(False), BOOL),
        ({}, MAPPING),
        (3, 'a number'),
        (np.float32(0.5), 'a number'),
        ([1, 2], 'a list of 2'),
        (torch.ones(2, 3), 'float32 (2, 3)'),
        (BOOL, BOOL),
    ],
)
def test_kinds(value, expected):
    assert kind(value) == expected


def test_numbers_that_are_not_finite_are_of_another_kind():
    assert kind(math.nan) == kind(math.inf) != kind(1.0)
    assert kind_of(torch.float16, [2]) == kind(torch.ones(2).half())
    assert kinds({'a': 1, 'b': None}) == {'a': kind(1), 'b': MISSING} and kinds(3) == kind(3)


def test_differences_are_found_where_they_are():
    ours = {'a': [1, {'b': torch.ones(2)}], 'c': 'x', 'd': None}
    assert [*differences({'a': [2, {'b': torch.zeros(2)}], 'c': 'y', 'd': None}, ours)] == []  # of the same kinds
    theirs = {'a': [1, {'b': torch.ones(3)}], 'd': 4, 'e': 5}
    found = [*differences(theirs, ours)]
    assert [difference.path for difference in found] == ['a.1.b', 'c', 'd', 'e']
    assert found[0] == ('a.1.b', 'float32 (3,)', 'float32 (2,)') and found[1].theirs == MISSING == found[3].ours
    assert [difference.path for difference in differences([1, 2], [1, 2, 3], path='x')] == ['x']


def test_values_are_compared_where_asked():
    assert [*differences({'lr': 1, 'nesterov': True}, {'lr': 2, 'nesterov': True}, plain)] == [('lr', '1', '2')]
    assert [*differences(as_values({'a': ['x', 1]}), as_values({'a': ['x', 2]}))] == [('a.1', '1', '2')]


@pytest.mark.parametrize('value', [0, 5, np.int64(5), 2**63 - 1])
def test_integers(value):
    assert is_integer(value)


@pytest.mark.parametrize('value', [-1, 2**63, 1.0, True, '1', None, torch.tensor(1)])
def test_other_values_are_no_integers(value):
    assert not is_integer(value)


def test_bounds():
    assert is_integer(3, 3, 3) and not is_integer(3, 4) and not is_integer(3, 0, 2)
    assert is_number(1e-9, above=0) and not is_number(0, above=0) and not is_number(1, below=1)
    assert is_number(torch.tensor([0.5])) and not is_number(torch.ones(2)) and not is_number(torch.tensor(1j))
    assert not any(map(is_number, (math.nan, math.inf, True, '1', None)))


def test_containers():
    assert is_mapping_of({'a': 1}, is_integer) and is_list_of((1, 2), is_integer)
    assert (
        not is_mapping_of({1: 1}, is_integer)
        and not is_mapping_of({'a': 'b'}, is_integer)
        and not is_mapping_of([1], is_integer)
    )
    assert not is_list_of('12', is_integer) and not is_list_of([1, 'b'], is_integer)


def test_paths_through_whatever_is_there():
    nested = {'a': {'b': 1}, 'c': [2]}
    assert get_at_path(nested, 'a.b') == 1
    assert get_at_path(nested, 'a.b.c') is get_at_path(nested, 'c.0') is get_at_path(nested, 'x') is None
    assert get_at_path(nested, 'a.x', 3) == 3


def test_tensors_that_are_not_finite():
    nan, infinite = torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])
    assert is_finite(torch.ones(2)) and is_finite(torch.ones(2, dtype=torch.int64)) and is_finite('nan')
    assert not is_finite(nan) and not is_finite(nan, infinity=True)
    assert not is_finite(infinite) and is_finite(infinite, infinity=True)
