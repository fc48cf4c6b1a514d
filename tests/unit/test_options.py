"""Options checked against typed signatures."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Sequence
from typing import Annotated, Literal

import pytest

from mmman.errors import ConfigError
from mmman.options import Count, NonNegative, Positive, Range, check_options, checked


@checked('toy', injected=('free',))
class Toy:
    def __init__(
        self,
        free,
        count: Count = 1,
        rate: Annotated[float, Range(0, below=1)] = 0.5,
        mode: Literal['a', 'b', False] = 'a',
        flag: bool = False,
        names: bool | Sequence[str] = False,
        weight: Positive | Sequence[Positive] = 1.0,
        pair: NonNegative | tuple[NonNegative, NonNegative] = 0.0,
        table: dict | None = None,
    ) -> None:
        self.count = count


@checked('pair')
class Pair:
    def __init__(self, first: int, second: int) -> None: ...


class Child(Toy):
    def __init__(self, more: int) -> None:
        super().__init__('anything', count=more)


VALID = [
    {'count': 3},
    {'rate': 0},
    {'rate': 0.999},
    {'mode': False},
    {'names': ['x', 'y']},
    {'names': True},
    {'weight': 2},
    {'weight': (0.5, 1)},
    {'pair': [1, 0.5]},
    {'table': {'any': 1}},
    {'table': None},
]
INVALID = [
    ({'count': 0}, 'toy.count=0: expected an integer >= 1'),
    ({'count': True}, 'toy.count=True: expected an integer >= 1'),
    ({'count': 1.0}, 'toy.count=1.0: expected an integer >= 1'),
    ({'count': '1'}, "toy.count='1': expected an integer >= 1"),
    ({'count': [1]}, 'toy.count=[1]: expected an integer >= 1'),
    ({'count': None}, 'toy.count=None: expected an integer >= 1'),
    ({'rate': 1}, 'toy.rate=1: expected a finite number >= 0 and < 1'),
    ({'rate': math.nan}, 'toy.rate=nan: expected a finite number >= 0 and < 1'),
    ({'mode': 0}, "toy.mode=0: expected 'a', 'b' or False"),
    ({'mode': 'c'}, "toy.mode='c': expected 'a', 'b' or False"),
    ({'flag': 1}, 'toy.flag=1: expected True or False'),
    ({'names': 'x'}, "toy.names='x': expected True, False or a list of strings"),
    ({'names': [1]}, 'toy.names=[1]: expected True, False or a list of strings'),
    ({'weight': math.inf}, 'toy.weight=inf: expected a finite number > 0 or a list of finite numbers'),
    ({'weight': [1, 0]}, 'toy.weight=[1, 0]: expected a finite number > 0 or a list of finite numbers'),
    ({'pair': [1]}, 'toy.pair=[1]: expected a finite number >= 0 or 2 values, each a finite number >= 0'),
    ({'table': []}, 'toy.table=[]: expected a dict or None'),
    ({'cuont': 1}, 'toy: Toy has no option cuont; did you mean count?'),
    ({'zzz': 1}, 'toy: Toy has no option zzz; the options are count, rate, mode, flag, names, weight, pair, table'),
    ({'momentum': 1}, 'toy: Toy has no option momentum; it is an option of EMABiasHook'),
]


@pytest.mark.parametrize('options', VALID)
def test_valid_options_pass(options):
    Toy('anything', **options)
    check_options(Toy, options, 'toy')


@pytest.mark.parametrize(('options', 'message'), INVALID)
def test_an_error_names_the_option_and_what_to_choose(options, message):
    import mmman  # noqa: F401  whose components are known places of options

    for call in (lambda: Toy('anything', **options), lambda: check_options(Toy, options, 'toy')):
        with pytest.raises(ConfigError) as error:
            call()
        assert str(error.value) == message


def test_positional_and_missing_options():
    with pytest.raises(ConfigError, match=r'toy\.count=0: expected'):
        Toy('anything', 0)
    with pytest.raises(ConfigError, match='pair: Pair requires the option second'):
        Pair(1)


def test_a_subclass_describes_its_own_options():
    assert Child(3).count == 3
    assert Child(0).count == 0  # which no signature of Child rules out


def test_a_checked_class_stays_an_ordinary_one():
    assert 'count' in inspect.signature(Toy).parameters
    assert pickle.loads(pickle.dumps(copy.deepcopy(Toy('anything', 2)))).count == 2
