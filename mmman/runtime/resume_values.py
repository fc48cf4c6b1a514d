"""Checks single values of a checkpoint, so that loading can't fail halfway and a resumed run has no invalid state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

from mmman.errors import CheckpointError
from mmman.runtime.compare import NOTHING, Rule, at, is_finite, is_list_of, is_number, is_table_of, is_whole, kind, plain
from mmman.runtime.optimizer_state import IMPLEMENTATION
from mmman.runtime.resume_record import GRADIENTS, RECORD, by_number, states_by_wrapper, unwrap, wrappers

DAMAGED = 'resume from another checkpoint, or start a new run from its weights: load_from without resume'

_WHOLE = Rule('a whole number from 0', is_whole)
_STEP = Rule('a whole number from -1', lambda value: is_whole(value, minimum=-1))
_SIZE = Rule('a number from 0', lambda value: not is_number(value, below=0))
_SEED = Rule('a whole number from 0 to 4294967295', lambda value: value is None or is_whole(value, maximum=2**32 - 1))
_COUNTS = Rule('a table of whole numbers', lambda value: is_table_of(value, is_whole))
_FLAG = Rule('True or False', lambda value: isinstance(value, bool))
_TRUE = Rule('True', lambda value: value is True)
_WHOLES = Rule('a list of whole numbers', lambda value: is_list_of(value, is_whole))
_LISTS = Rule('a table of lists of whole numbers', lambda value: is_table_of(value, _WHOLES.holds))
_NUMBERS = Rule('a list of finite numbers', lambda value: is_list_of(value, is_number))
_TEXT = Rule('a text', lambda value: isinstance(value, str))
_NAMES = Rule('a list of texts', lambda value: is_list_of(value, _TEXT.holds))
_TABLE = Rule('a table', lambda value: is_table_of(value, _ANY.holds))
_ANY = Rule('anything', lambda value: True)
_FLAGS = Rule('a table of True and False', lambda value: is_table_of(value, _FLAG.holds))
_SCORE = Rule('a number', lambda value: is_number(value) or plain(value) in (float('inf'), float('-inf')))

_REQUIRED = {'meta.epoch': _WHOLE, 'meta.iter': _WHOLE, 'state_dict': _TABLE, 'message_hub': _TABLE}
_OPTIONAL = {
    'meta.seed': _SEED,
    f'meta.{RECORD}': _TABLE,
    f'meta.{RECORD}.by epoch': _FLAG,
    f'meta.{RECORD}.batch': _WHOLE,
    f'meta.{RECORD}.regular': _FLAG,
    f'meta.{RECORD}.batches': _WHOLE,
    f'meta.{RECORD}.sampler seed': Rule('a whole number from 0', lambda value: value is None or is_whole(value)),
    f'meta.{RECORD}.data': _COUNTS,
    f'meta.{RECORD}.classes': _TABLE,
    f'meta.{RECORD}.accumulative counts': _COUNTS,
    f'meta.{RECORD}.gradients': _NAMES,
    f'meta.{RECORD}.parameters with state': _LISTS,
    'ema_state_dict': _TABLE,
    GRADIENTS: _TABLE,
    'param_schedulers': Rule(
        'a list', lambda value: is_list_of(value, _ANY.holds) or is_table_of(value, lambda own: is_list_of(own, _ANY.holds))
    ),
    'message_hub.log_scalars': Rule('a table of log buffers', lambda value: is_table_of(value, _is_log)),
    'message_hub.runtime_info': _TABLE,
    'message_hub.resumed_keys': _FLAGS,
}
# Entries of the record: those that every version writes, and those that only this version writes.
_RECORDED = ('by epoch', 'batch', 'data')
_NEWLY_RECORDED = ('regular', 'batches', 'classes', 'accumulative counts', 'gradients', 'parameters with state')

# Entries of mmengine's message hub that the checkpoint hook reads, by the beginning of the name.
_HUB = {'superseded_ckpts': _NAMES, 'keep_ckpt_ids': _WHOLES, 'last_ckpt': _TEXT, 'best_ckpt': _TEXT, 'best_score': _SCORE}

_SIZES = ('lr', 'initial_lr', 'weight_decay', 'eps', 'momentum')  # options that have to be at least 0
_CHOICES = Rule('True, False or nothing', lambda value: value is None or isinstance(value, bool))
_OPTIMIZER = {
    'state': Rule('a table by parameter', lambda value: isinstance(value, Mapping)),
    'param_groups': Rule(
        'a list of groups',
        lambda value: is_list_of(value, lambda group: _TABLE.holds(group) and _WHOLES.holds(group.get('params'))),
    ),
}
_WRAPPER = {
    'steps': _WHOLE,
    'loss_scaler.scale': Rule('a positive number', lambda value: is_number(value, above=0)),
    'loss_scaler.growth_factor': Rule('a number above 1', lambda value: is_number(value, above=1)),
    'loss_scaler.backoff_factor': Rule('a number between 0 and 1', lambda value: is_number(value, above=0, below=1)),
    'loss_scaler.growth_interval': Rule('a whole number from 1', lambda value: is_whole(value, minimum=1)),
    'loss_scaler._growth_tracker': _WHOLE,
}
_SCHEDULER = {'last_step': _STEP, '_global_step': _WHOLE, 'base_values': _NUMBERS, '_last_value': _NUMBERS}


_ABSENT = object()


def check_values(checkpoint: Mapping, runner: Runner) -> None:
    """Check the values of a checkpoint to resume.

    Raises:
        CheckpointError: A value is missing or invalid. The message names it.
    """
    for path, value, rule, required in _values(checkpoint, runner):
        if rule.holds(value) if required or value is not _ABSENT else True:
            continue
        value = None if value is _ABSENT else value
        said = repr(value)[:40] if plain(value) is value else kind(value)
        raise CheckpointError(f'cannot resume: {path} of the checkpoint is {said}, not {rule.text}; {DAMAGED}')


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
            parts.append((_below('optimizer', name, 'state', str(index)), own if isinstance(own, Mapping) else {}, set()))
    for part, tensors, bounded in parts:
        for name, tensor in (tensors or {}).items():
            infinity = name not in bounded
            if not is_finite(tensor, infinity) and is_finite(ours.get(name.removeprefix('module.')), infinity):
                raise CheckpointError(f'cannot resume: {part}.{name} of the checkpoint is not finite; {DAMAGED}')


def _values(checkpoint: Mapping, runner: Runner) -> Iterator[tuple[str, Any, Rule, bool]]:
    for rules, required in ((_REQUIRED, True), (_OPTIONAL, False)):
        for path, rule in rules.items():
            yield path, at(checkpoint, path, _ABSENT), rule, required
    record = at(checkpoint, f'meta.{RECORD}')
    if record is not None:
        is_new = any(name in record for name in _NEWLY_RECORDED)
        for name in (*_RECORDED, *_NEWLY_RECORDED) if is_new else _RECORDED:
            yield f'meta.{RECORD}.{name}', kind(record.get(name)), Rule('there', lambda found: found != NOTHING), True
    flags = at(checkpoint, 'message_hub.resumed_keys') or {}
    for name, value in (at(checkpoint, 'message_hub.runtime_info') or {}).items():
        for beginning, rule in _HUB.items():
            if name.startswith(beginning):
                yield f'message_hub.runtime_info.{name}', _ABSENT if value is None else value, rule, False
                yield f'message_hub.resumed_keys.{name}', flags.get(name, _ABSENT), _TRUE, False
    states = states_by_wrapper(checkpoint['optimizer'], runner)
    yield 'optimizer', states, _TABLE, True
    for name, state in states.items():
        for rules, required in ((_OPTIMIZER, True), (_WRAPPER, False)):
            for path, rule in rules.items():
                yield _below('optimizer', name, path), at(state, path, _ABSENT), rule, required
        counted = Rule('a number from 0, and no more than the steps of the run', partial(_is_count, state.get('steps')))
        for i, group in enumerate(state['param_groups']):
            for option, value in group.items():
                rule = _SIZE if option in _SIZES else _CHOICES if option in IMPLEMENTATION else _ANY
                yield _below('optimizer', name, 'param_groups', str(i), str(option)), value, rule, False
        for index, own in state['state'].items():
            if isinstance(own, Mapping):
                yield _below('optimizer', name, 'state', str(index), 'step'), own.get('step', _ABSENT), counted, False
        most = Rule('no more than the iterations', lambda value: value <= checkpoint['meta']['iter'])
        yield _below('optimizer', name, 'steps'), state.get('steps', _ABSENT), most, False
    for name, state in by_number(checkpoint.get('param_schedulers')).items():
        for path, rule in _SCHEDULER.items():
            yield _below('param_schedulers', name, path), at(state, path, _ABSENT), rule, False


def _is_count(steps: int | None, value: object) -> bool:
    return is_number(value) and 0 <= value <= (math.inf if steps is None else steps)


def _below(*names: str) -> str:
    return '.'.join(filter(None, names))


def _is_log(value: object) -> bool:
    if not isinstance(value, HistoryBuffer):
        return False
    history, counts = (getattr(value, name, NOTHING) for name in ('_log_history', '_count_history'))
    are_arrays = all(getattr(array, 'ndim', 0) == 1 and array.dtype.kind in 'fiu' for array in (history, counts))
    return are_arrays and len(history) == len(counts)
