"""Reduces the config text inside a checkpoint to plain data.

If an inferencer gets a checkpoint without a config, mmengine executes this text as Python (``Config.fromstring``) and builds
what it names. This module therefore keeps only assignments of plain values. Their ``type`` has to be a name in a registry of
the OpenMMLab libraries, and their strings must not contain anything that a builder could evaluate or unpickle.
"""

from __future__ import annotations

import ast
import re
from typing import Any

PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmcls', 'mmman')

_MAX_LENGTH, _MAX_DEPTH = 2**22, 60
_PACKAGE = '|'.join(PACKAGES)
_TYPE = re.compile(
    rf'(({_PACKAGE})\.)?[a-z]{{0,3}}[A-Z]\w*|(torchvision|timm)/[A-Z]\w*|default_collate|pseudo_collate|(soft_)?nms'
)
_IMPORT = re.compile(rf'({_PACKAGE})(\.(models|datasets|engine|evaluation|visualization|structures))?')
_SCOPE = re.compile(_PACKAGE)
# No call, subscript, comprehension or dunder, because some constructors evaluate strings. {} are format fields.
_TEXT = re.compile(r'([^(){}\[\]`]|\{[\w:.]*\})*')
_FLOATS = ('inf', '-inf', 'nan')


def plain_config(text: str) -> tuple[str, list[str]]:
    """Return the plain data in a config's text. The text is parsed, never executed.

    Args:
        text: Python source, as ``Config.pretty_text`` writes it.

    Returns:
        The unchanged text if all of it is plain data; otherwise its plain assignments, or ``''`` if ``model`` isn't one of
        them. Second, what was left out, one entry per statement.
    """
    try:
        body = ast.parse(text).body if len(text) <= _MAX_LENGTH else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    if not body:
        return '', ['it is not valid Python source']
    kept, dropped = [], []
    for statement in body:
        try:
            _check_statement(statement)
            kept.append(statement)
        except _NotPlainError as reason:
            dropped.append(f'line {statement.lineno} {reason}')
    if 'model' not in {statement.targets[0].id for statement in kept}:
        return '', dropped or ['it does not set model']
    characters = text.isascii() or text.replace('\n', '').replace('\t', '').isprintable()
    if dropped or not characters or '\r' in text or '\0' in text or '\f' in text:
        text = '\n'.join(ast.unparse(statement) for statement in kept) + '\n'
    return text, dropped


class _NotPlainError(Exception):
    """The reason why a part of a config isn't kept."""


def _check_statement(statement: ast.stmt) -> None:
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name)):
        raise _NotPlainError('is not an assignment')
    name = statement.targets[0].id
    if name == '_base_' or '__' in name:
        raise _NotPlainError(f'sets {name}')
    _check_value(name, _value(statement.value, _MAX_DEPTH))


def _value(node: ast.expr, depth: int) -> Any:
    """Evaluate an expression of literals and ``dict(...)`` calls. Mappings are returned as lists of pairs."""
    if depth == 0:
        raise _NotPlainError('is nested too deeply')
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [_value(item, depth - 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        return _pairs(node, depth)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float):
            return -node.operand.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == 'dict' and len(node.args) <= 1 and all(keyword.arg for keyword in node.keywords):
            pairs = [pair for argument in node.args for pair in _pairs(argument, depth)]
            return pairs + [(keyword.arg, _value(keyword.value, depth - 1)) for keyword in node.keywords]
        argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if node.func.id == 'float' and isinstance(argument, ast.Constant) and argument.value in _FLOATS:
            return float(argument.value)
    raise _NotPlainError('is not a plain value')


def _pairs(node: ast.expr, depth: int) -> list[tuple[Any, Any]]:
    if not isinstance(node, ast.Dict) or None in node.keys:
        raise _NotPlainError('is not a plain value')
    return [(_value(key, depth - 1), _value(item, depth - 1)) for key, item in zip(node.keys, node.values, strict=True)]


def _check_value(key: Any, value: Any) -> None:
    """Check a value and its key. Mappings are lists of pairs."""
    if isinstance(key, str) and key in _RULES and not _RULES[key](value):
        raise _NotPlainError(f'has {key}={value!r}')
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, tuple):  # a key-value pair of a mapping
        _check_text(value[0])
        _check_value(*value)
    elif isinstance(value, list):
        for item in value:
            _check_value(None, item)


def _check_text(text: Any) -> None:
    if isinstance(text, str) and (not _TEXT.fullmatch(text) or '__' in text or text.lower().endswith(('pkl', 'pickle'))):
        raise _NotPlainError(f'has the string {text!r}')


def _is_type(value: Any) -> bool:
    """Whether a ``type`` is a name in a registry. A dotted path could import and call any function."""
    return not isinstance(value, str) or _TYPE.fullmatch(value) is not None


def _is_scope(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _SCOPE.fullmatch(value) is not None)


def _are_imports(value: Any) -> bool:
    """Whether only modules of the OpenMMLab libraries that register classes are imported. Other imports could run any code."""
    pairs = value if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value) else []
    names = next((item for key, item in pairs if key == 'imports'), None)
    names = [names] if isinstance(names, str) else names
    return isinstance(names, list) and all(isinstance(name, str) and _IMPORT.fullmatch(name) for name in names)


_RULES = {
    'type': _is_type,
    '_scope_': _is_scope,
    'default_scope': _is_scope,
    'custom_imports': _are_imports,
    'trust_remote_code': lambda value: not value,
}
