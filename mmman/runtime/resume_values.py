"""Checks single values of a checkpoint, so that loading can't fail halfway and a resumed run has no invalid state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

from mmman.errors import CheckpointError
from mmman.runtime.compare import (
    MISSING,
    Rule,
    get_at_path,
    is_finite,
    is_integer,
    is_list_of,
    is_mapping_of,
    is_number,
    kind,
    plain,
)
from mmman.runtime.optimizer_state import IMPLEMENTATION
from mmman.runtime.resume_record import GRADIENTS, RECORD, by_number, states_by_wrapper, unwrap, wrappers

REMEDY = 'resume from another checkpoint, or start a new run from its weights: load_from without resume'

_NON_NEGATIVE_INT = Rule('an integer >= 0', is_integer)
_STEP = Rule('an integer >= -1', lambda value: is_integer(value, minimum=-1))
_NON_NEGATIVE = Rule('a number >= 0', lambda value: not is_number(value, below=0))
_SEED = Rule('an integer from 0 to 4294967295', lambda value: value is None or is_integer(value, maximum=2**32 - 1))
_COUNTS = Rule('a dict of integers', lambda value: is_mapping_of(value, is_integer))
_BOOL = Rule('a bool', lambda value: isinstance(value, bool))
_TRUE = Rule('True', lambda value: value is True)
_INTS = Rule('a list of integers', lambda value: is_list_of(value, is_integer))
_INT_LISTS = Rule('a dict of lists of integers', lambda value: is_mapping_of(value, _INTS.accepts))
_NUMBERS = Rule('a list of finite numbers', lambda value: is_list_of(value, is_number))
_STRING = Rule('a string', lambda value: isinstance(value, str))
_STRINGS = Rule('a list of strings', lambda value: is_list_of(value, _STRING.accepts))
_MAPPING = Rule('a dict', lambda value: is_mapping_of(value, _ANY.accepts))
_ANY = Rule('anything', lambda value: True)
_PRESENT = Rule('present', lambda found: found != MISSING)
_BOOLS = Rule('a dict of bools', lambda value: is_mapping_of(value, _BOOL.accepts))
_SCORE = Rule('a number', lambda value: is_number(value) or plain(value) in (float('inf'), float('-inf')))

_REQUIRED = {'meta.epoch': _NON_NEGATIVE_INT, 'meta.iter': _NON_NEGATIVE_INT, 'state_dict': _MAPPING, 'message_hub': _MAPPING}
_OPTIONAL = {
    'meta.seed': _SEED,
    f'meta.{RECORD}': _MAPPING,
    f'meta.{RECORD}.by epoch': _BOOL,
    f'meta.{RECORD}.batch': _NON_NEGATIVE_INT,
    f'meta.{RECORD}.regular': _BOOL,
    f'meta.{RECORD}.batches': _NON_NEGATIVE_INT,
    f'meta.{RECORD}.sampler seed': Rule('an integer >= 0', lambda value: value is None or is_integer(value)),
    f'meta.{RECORD}.data': _COUNTS,
    f'meta.{RECORD}.classes': _MAPPING,
    f'meta.{RECORD}.accumulative counts': _COUNTS,
    f'meta.{RECORD}.gradients': _STRINGS,
    f'meta.{RECORD}.parameters with state': _INT_LISTS,
    'ema_state_dict': _MAPPING,
    GRADIENTS: _MAPPING,
    'param_schedulers': Rule(
        'a list',
        lambda value: is_list_of(value, _ANY.accepts) or is_mapping_of(value, lambda own: is_list_of(own, _ANY.accepts)),
    ),
    'message_hub.log_scalars': Rule('a dict of log buffers', lambda value: is_mapping_of(value, _is_log)),
    'message_hub.runtime_info': _MAPPING,
    'message_hub.resumed_keys': _BOOLS,
}
# Entries of the record: those that every version writes, and those that only this version writes.
_RECORDED = ('by epoch', 'batch', 'data')
_NEWLY_RECORDED = ('regular', 'batches', 'classes', 'accumulative counts', 'gradients', 'parameters with state')

# Entries of mmengine's message hub that the checkpoint hook reads, by the beginning of the name.
_HUB_RULES = {
    'superseded_ckpts': _STRINGS,
    'keep_ckpt_ids': _INTS,
    'last_ckpt': _STRING,
    'best_ckpt': _STRING,
    'best_score': _SCORE,
}

_NON_NEGATIVE_OPTIONS = ('lr', 'initial_lr', 'weight_decay', 'eps', 'momentum')  # options that have to be at least 0
_OPTIONAL_BOOL = Rule('a bool or None', lambda value: value is None or isinstance(value, bool))
_OPTIMIZER = {
    'state': Rule('a dict by parameter', lambda value: isinstance(value, Mapping)),
    'param_groups': Rule(
        'a list of parameter groups',
        lambda value: is_list_of(value, lambda group: _MAPPING.accepts(group) and _INTS.accepts(group.get('params'))),
    ),
}
_WRAPPER = {
    'steps': _NON_NEGATIVE_INT,
    'loss_scaler.scale': Rule('a positive number', lambda value: is_number(value, above=0)),
    'loss_scaler.growth_factor': Rule('a number above 1', lambda value: is_number(value, above=1)),
    'loss_scaler.backoff_factor': Rule('a number between 0 and 1', lambda value: is_number(value, above=0, below=1)),
    'loss_scaler.growth_interval': Rule('an integer >= 1', lambda value: is_integer(value, minimum=1)),
    'loss_scaler._growth_tracker': _NON_NEGATIVE_INT,
}
_SCHEDULER = {'last_step': _STEP, '_global_step': _NON_NEGATIVE_INT, 'base_values': _NUMBERS, '_last_value': _NUMBERS}


_ABSENT = object()


def check_values(checkpoint: Mapping, runner: Runner) -> None:
    """Check the values of a checkpoint to resume.

    Raises:
        CheckpointError: A value is missing or invalid. The message names it.
    """
    for path, value, rule, required in _values(checkpoint, runner):
        if (value is _ABSENT and not required) or rule.accepts(value):
            continue
        value = None if value is _ABSENT else value
        description = repr(value)[:40] if plain(value) is value else kind(value)
        raise CheckpointError(f'cannot resume: {path} of the checkpoint is {description}, not {rule.text}; {REMEDY}')


def check_finite(checkpoint: Mapping, runner: Runner) -> None:
    """Check that no tensor of a checkpoint has a NaN and no parameter an infinity, unless the new model has.

    Raises:
        CheckpointError: A tensor isn't finite. A run that diverged can't be resumed.
    """
    model = unwrap(runner.model)
    parameters, ours = {name for name, _ in model.named_parameters()}, model.state_dict()
    average = {f'module.{name}' for name in parameters}
    parts = [
        ('state_dict', checkpoint['state_dict'], parameters),
        ('ema_state_dict', checkpoint.get('ema_state_dict'), average),
    ]
    if not any(getattr(wrapper, 'loss_scaler', None) for wrapper in wrappers(runner).values()):  # a scaler skips such steps
        parts.append((GRADIENTS, checkpoint.get(GRADIENTS), parameters))
    for name, state in states_by_wrapper(checkpoint['optimizer'], runner).items():
        for index, own in state['state'].items():
            parts.append((_join_path('optimizer', name, 'state', str(index)), own if isinstance(own, Mapping) else {}, set()))
    for part, tensors, bounded in parts:
        for name, tensor in (tensors or {}).items():
            infinity = name not in bounded
            if not is_finite(tensor, infinity) and is_finite(ours.get(name.removeprefix('module.')), infinity):
                raise CheckpointError(f'cannot resume: {part}.{name} of the checkpoint is not finite; {REMEDY}')


def _values(checkpoint: Mapping, runner: Runner) -> Iterator[tuple[str, Any, Rule, bool]]:
    for rules, required in ((_REQUIRED, True), (_OPTIONAL, False)):
        for path, rule in rules.items():
            yield path, get_at_path(checkpoint, path, _ABSENT), rule, required
    record = get_at_path(checkpoint, f'meta.{RECORD}')
    if record is not None:
        is_new = any(name in record for name in _NEWLY_RECORDED)
        for name in (*_RECORDED, *_NEWLY_RECORDED) if is_new else _RECORDED:
            yield f'meta.{RECORD}.{name}', kind(record.get(name)), _PRESENT, True
    flags = get_at_path(checkpoint, 'message_hub.resumed_keys') or {}
    for name, value in (get_at_path(checkpoint, 'message_hub.runtime_info') or {}).items():
        for prefix, rule in _HUB_RULES.items():
            if name.startswith(prefix):
                yield f'message_hub.runtime_info.{name}', _ABSENT if value is None else value, rule, False
                yield f'message_hub.resumed_keys.{name}', flags.get(name, _ABSENT), _TRUE, False
    states = states_by_wrapper(checkpoint['optimizer'], runner)
    yield 'optimizer', states, _MAPPING, True
    for name, state in states.items():
        for rules, required in ((_OPTIMIZER, True), (_WRAPPER, False)):
            for path, rule in rules.items():
                yield _join_path('optimizer', name, path), get_at_path(state, path, _ABSENT), rule, required
        counted = Rule('a number >= 0 and at most the number of steps of the run', partial(_is_count, state.get('steps')))
        for i, group in enumerate(state['param_groups']):
            for option, value in group.items():
                rule = (
                    _NON_NEGATIVE if option in _NON_NEGATIVE_OPTIONS else _OPTIONAL_BOOL if option in IMPLEMENTATION else _ANY
                )
                yield _join_path('optimizer', name, 'param_groups', str(i), str(option)), value, rule, False
        for index, own in state['state'].items():
            if isinstance(own, Mapping):
                yield _join_path('optimizer', name, 'state', str(index), 'step'), own.get('step', _ABSENT), counted, False
        most = Rule('at most the number of iterations', lambda value: value <= checkpoint['meta']['iter'])
        yield _join_path('optimizer', name, 'steps'), state.get('steps', _ABSENT), most, False
    for name, state in by_number(checkpoint.get('param_schedulers')).items():
        for path, rule in _SCHEDULER.items():
            yield _join_path('param_schedulers', name, path), get_at_path(state, path, _ABSENT), rule, False


def _is_count(steps: int | None, value: object) -> bool:
    return is_number(value) and 0 <= value <= (math.inf if steps is None else steps)


def _join_path(*names: str) -> str:
    return '.'.join(filter(None, names))


def _is_log(value: object) -> bool:
    if not isinstance(value, HistoryBuffer):
        return False
    history, counts = (getattr(value, name, MISSING) for name in ('_log_history', '_count_history'))
    are_arrays = all(getattr(array, 'ndim', 0) == 1 and array.dtype.kind in 'fiu' for array in (history, counts))
    return are_arrays and len(history) == len(counts)
