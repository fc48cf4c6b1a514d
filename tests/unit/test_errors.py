"""The exceptions of mmman, and the built-in ones that handlers may name instead."""

import inspect

import pytest

from mmman import errors
from mmman.errors import ConfigError, LocalLearningError, MisuseError
from mmman.local import MomentumTransfer
from mmman.partition import Feature


def test_handlers_of_the_former_exception_work():
    with pytest.raises(MisuseError) as caught:
        MomentumTransfer(None, Feature(8, 4), ema=False)
    assert type(caught.value) is ConfigError


def test_one_handler_catches_all_of_them_and_each_is_a_built_in_error_too():
    own = [error for _, error in inspect.getmembers(errors, inspect.isclass) if error is not LocalLearningError]
    assert own and all(issubclass(error, LocalLearningError) for error in own)
    built_in = (ValueError, TypeError, RuntimeError, ArithmeticError, ConnectionError)
    assert all(issubclass(error, built_in) for error in own)
