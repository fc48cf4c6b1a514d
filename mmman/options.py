"""Checks options from a config against the typed signature of the component that takes them.

The parameters of the signature are the known options. Their annotations give the types, and
``Annotated[float, Range(above=0)]`` and ``Literal['block', 'global']`` the allowed values. :func:`checked` checks the options
whenever a component is built; :func:`check_options` checks a config before anything is built.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from mmman.errors import ConfigError

Component = TypeVar('Component', bound=Callable)

LocateOption = Callable[[str, Mapping[str, Any]], str | None]
"""Called with an unknown option and all given options. Returns a message that says where the option belongs, or None."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number or of the length of a sequence, used as ``Annotated[int, Range(1)]``. Numbers are always finite.

    Attributes:
        minimum: Lower bound, included.
        maximum: Upper bound, included.
        above: Lower bound, excluded.
        below: Upper bound, excluded.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {'>=': self.minimum, '>': self.above, '<=': self.maximum, '<': self.below}
        return ' and '.join(f'{sign} {bound:g}' for sign, bound in bounds.items() if bound is not None)


@dataclass(frozen=True)
class _CheckedComponent:
    """A component and the arguments of :func:`checked` for it."""

    where: str
    component: Callable
    injected: tuple[str, ...]
    locate_option: LocateOption | None


_CHECKED: dict[Callable, _CheckedComponent] = {}  # decorated components, by the function that has the signature

Positive = Annotated[float, Range(above=0)]
"""A finite number above 0."""
NonNegative = Annotated[float, Range(0)]
"""A finite number, at least 0."""
Count = Annotated[int, Range(1)]
"""An integer, at least 1."""


def checked(
    where: str, injected: Iterable[str] = (), locate_option: LocateOption | None = None
) -> Callable[[Component], Component]:
    """Decorate a class or a builder function so that its arguments are checked on every call.

    Args:
        where: The place of the component's options in a config, e.g. ``'optim_wrapper'``, for error messages.
        injected: Parameters that other code passes, not the config.
        locate_option: Returns a message that says where an unknown option belongs, or None.

    Returns:
        A decorator. A decorated call raises :class:`ConfigError` for an option that is unknown, missing or of a wrong type or
        value. A parameter without an annotation takes any value.
    """

    def decorate(component: Component) -> Component:
        call = component.__init__ if inspect.isclass(component) else component

        @functools.wraps(call)
        def with_check(*args, **kwargs) -> Any:
            own, values = (args[:1], args[1:]) if inspect.isclass(component) else ((), args)
            if not own or type(own[0]).__init__ is with_check:  # otherwise a subclass defines the options
                options = {**dict(zip(names, values, strict=False)), **kwargs}
                check_options(component, {name: value for name, value in options.items() if name not in injected}, where)
            return call(*args, **kwargs)

        names = [*option_parameters(component)]
        _CHECKED[inspect.unwrap(call)] = _CheckedComponent(where, component, tuple(injected), locate_option)
        if inspect.isclass(component):
            component.__init__ = with_check
            return component
        return with_check

    return decorate


def check_options(component: Callable, options: Mapping[str, Any], where: str, injected: Iterable[str] = ()) -> None:
    """Check options against the signature of the component that will be called with them.

    Args:
        component: A class or function.
        options: The arguments by name.
        where: The place of the options in a config, for error messages.
        injected: Parameters that other code passes, in addition to those passed to :func:`checked`. They are not options.

    Raises:
        ConfigError: An option is unknown, missing or of a wrong type or value. The message names the option and the
            allowed values; for an unknown option it suggests the closest known one.
    """
    parameters, hints, name = option_parameters(component), _hints(component), component.__name__
    entry = _CHECKED.get(_signature_owner(component), _CheckedComponent(where, component, (), None))
    injected = {*injected, *entry.injected}
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n not in injected]
    for option, value in options.items():
        if option in known:
            if option in hints and not _fits(hints[option], value):
                raise ConfigError(f'{where}.{option}={_short(value)}: expected {_describe(hints[option])}')
        elif not accepts_any:
            if entry.locate_option is not None and (hint := entry.locate_option(option, options)):
                raise ConfigError(f'{where}.{option}: {hint}')
            raise ConfigError(f'{where}: {_unknown_option(option, known, name)}')
    for option in known:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f'{where}: {name} requires the option {option}')


def _unknown_option(option: object, known: Sequence[str], name: str) -> str:
    """Return the message for an unknown option, with a suggestion."""
    near = difflib.get_close_matches(str(option), known, 1)
    owners = [entry.where for entry in _CHECKED.values() if option in {*option_parameters(entry.component)} - {*entry.injected}]
    owners.sort(key=lambda where: '.' not in where)  # places in a config before functions, in any order of imports
    if near:
        hint = f'did you mean {near[0]}?'
    elif owners:
        hint = f'it is an option of {_any_of(owners)}'
    else:
        hint = f'the options are {", ".join(known) or "none"}'
    return f'{name} has no option {option}; {hint}'


def option_parameters(component: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function by name, without ``self``."""
    parameters = dict(inspect.signature(component).parameters)
    parameters.pop('self', None)
    return parameters


def _signature_owner(component: Callable) -> Callable:
    return inspect.unwrap(component.__init__ if inspect.isclass(component) else component)


def _hints(component: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(_signature_owner(component), include_extras=True)
    except NameError:  # annotations that only a type checker can resolve
        return {}


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = next((extra for extra in arguments[1:] if isinstance(extra, Range)), None)
        return _fits(arguments[0], value) and (bounds is None or _size(value) in bounds)
    if origin in (Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, arguments, value))
        return not arguments or all(_fits(arguments[0], item) for item in value)
    if hint is dict or origin is dict:
        return isinstance(value, Mapping)
    if inspect.isclass(hint) and not getattr(hint, '_is_protocol', False):
        return isinstance(value, hint)
    return True  # other annotations are not checked


def _size(value: Any) -> float:
    return value if isinstance(value, (int, float)) else len(value)


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ' '.join([_describe(arguments[0]), *(str(extra) for extra in arguments[1:] if isinstance(extra, Range))])
    if origin in (Union, types.UnionType):
        choices = [_describe(argument) for argument in arguments]
        return _any_of([part for choice in choices for part in (('True', 'False') if choice == _NAMES[bool] else (choice,))])
    if origin is Literal:
        return _any_of([repr(argument) for argument in arguments])
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f'{len(arguments)} values, each {_describe(arguments[0])}'
    if origin in (list, tuple, Sequence):
        return f'a list of {_PLURALS.get(_bare(arguments[0]), "values")}' if arguments else 'a list'
    return _NAMES.get(origin or hint) or getattr(hint, '__name__', str(hint))


_NAMES = {
    None: 'None',
    type(None): 'None',
    bool: 'True or False',
    int: 'an integer',
    float: 'a finite number',
    str: 'a string',
    dict: 'a dict',
}
_PLURALS = {int: 'integers', float: 'finite numbers', str: 'strings', dict: 'dicts'}


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _any_of(choices: Sequence[str]) -> str:
    *others, last = dict.fromkeys(choices)
    return f'{", ".join(others)} or {last}' if others else last


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
