"""Checks whether a run can resume from a checkpoint: compares everything that would be restored with the run first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmman.engine.ema_hook import check_local_heads
from mmman.errors import CheckpointError
from mmman.runtime.compare import BOOL, MAPPING, MISSING, Kind, as_values, differences, get_at_path, is_integer, kind, kinds
from mmman.runtime.optimizer_state import IMPLEMENTATION, ExpectedState
from mmman.runtime.resume_changes import REMEDY, SCHEDULER_STATE, changed_options, changed_position
from mmman.runtime.resume_record import (
    GRADIENTS,
    RECORD,
    averaged_model,
    by_number,
    classes,
    scaler_state,
    states_by_wrapper,
    unwrap,
    wrappers,
)
from mmman.runtime.resume_values import check_finite, check_values


class Part(NamedTuple):
    """A part of a checkpoint and its counterpart in the run, which are compared by the kinds of their values.

    ``what`` describes the part in error messages, with ``{}`` for the path of a difference.
    """

    what: str
    theirs: object
    ours: object


def check_fits(checkpoint: Mapping, runner: Runner) -> list[str]:
    """Check that a checkpoint fits the run's model, optimizer, schedulers and data, and that its values are valid.

    Args:
        checkpoint: The loaded checkpoint.
        runner: The runner. It is not changed.

    Returns:
        Messages for the user: differences that don't prevent resuming, and what can't be compared.

    Raises:
        CheckpointError: The run can't resume from the checkpoint.
    """
    for key, what in (('state_dict', 'weights'), ('message_hub', 'log'), ('optimizer', 'optimizer state')):
        if key not in checkpoint:
            raise CheckpointError(
                f'cannot resume: the checkpoint has no {what}, e.g. because it is a published one or a best_*.pth: '
                'resume from an epoch_*.pth or iter_*.pth, or start a new run from its weights: load_from without resume'
            )
    check_values(checkpoint, runner)
    check_local_heads(checkpoint['state_dict'], unwrap(runner.model).state_dict())
    record = get_at_path(checkpoint, f'meta.{RECORD}') or {}
    for part in _parts(checkpoint, runner, record):
        found = [*differences(part.theirs, part.ours)]
        if found:
            path, theirs, ours = found[0]
            raise CheckpointError(
                f'cannot resume: {part.what.format(path).strip()}: {theirs} in the checkpoint, {ours} in this run'
                f'{f" ({len(found) - 1} more differ)" if found[1:] else ""}; {REMEDY}'
            )
    check_finite(checkpoint, runner)
    notes = [*changed_options(checkpoint, runner, record), *changed_position(checkpoint['meta'], record, runner)]
    if record and 'classes' not in record:
        notes.append(
            'The checkpoint was saved by an earlier version, which did not record the classes of its optimizer and schedulers: '
            'make sure that this config uses the same ones'
        )
    return notes


def _parts(checkpoint: Mapping, runner: Runner, record: Mapping) -> Iterator[Part]:
    """Yield the parts to compare, in order: each part requires that the previous ones match."""
    theirs = by_number(checkpoint.get('param_schedulers'))
    schedulers = {name: scheduler.state_dict() for name, scheduler in by_number(runner.param_schedulers).items()}
    yield Part('parameter schedulers', Kind(len(theirs)), Kind(len(schedulers)))
    if 'classes' in record:
        yield Part('the class of the {}', as_values(record['classes']), as_values(classes(runner)))
    model, average = unwrap(runner.model), averaged_model(runner)
    yield Part('the checkpoint is from a different model, {}', checkpoint['state_dict'], model.state_dict())
    ours = None if average is None else average.state_dict()
    yield Part('averaged weights (EMAHook) {}', checkpoint.get('ema_state_dict'), ours)
    hub = dict.fromkeys(('log_scalars', 'runtime_info', 'resumed_keys'), MAPPING)
    yield Part('message_hub {}', kinds(checkpoint['message_hub']), hub)
    yield Part(
        'param_scheduler {}', *({name: _scheduler(state) for name, state in side.items()} for side in (theirs, schedulers))
    )
    states = states_by_wrapper(checkpoint['optimizer'], runner)
    yield Part('optimizer {}', kinds(states), dict.fromkeys(wrappers(runner), MAPPING))
    if 'parameters with state' in record:
        yield Part(
            'optimizer {}', dict.fromkeys(record['parameters with state'], MAPPING), dict.fromkeys(wrappers(runner), MAPPING)
        )
    for name, wrapper in wrappers(runner).items():
        yield from _optimizer_parts(name, wrapper, states[name], checkpoint['meta'], record, dict(model.named_parameters()))
    parameters = dict(model.named_parameters())
    gradients = checkpoint.get(GRADIENTS) or {}
    yield Part(
        'accumulated gradients {}', gradients, {name: parameters.get(name) for name in record.get('gradients', gradients)}
    )
    if 'accumulative counts' in record:
        compared = as_values if gradients else kinds
        counts = {name: wrapper._accumulative_counts for name, wrapper in wrappers(runner).items()}
        yield Part('accumulative_counts {}', compared(record['accumulative counts']), compared(counts))


def _optimizer_parts(
    name: str, wrapper: OptimWrapper, state: Mapping, meta: Mapping, record: Mapping, parameters: dict[str, nn.Parameter]
) -> Iterator[Part]:
    what = f'optimizer {name}'.rstrip()
    if 'classes' in record:
        yield Part(f'{what}, steps', kind(state.get('steps')), kind(getattr(wrapper, 'steps', None)))
    groups = wrapper.optimizer.param_groups
    count = sum(len(group['params']) for group in groups)
    yield Part(
        f'{what}, parameter groups (does paramwise_cfg differ?) {{}}',
        [*map(_group, state['param_groups'])],
        [*map(_group, groups)],
    )
    indices = [index for group in state['param_groups'] for index in group['params']]
    found = Kind('in order' if indices == [*range(count)] else 'others')
    yield Part(f'{what}, parameter indices', found, Kind('in order'))
    yield Part(f'{what}, loss scaler (does dtype or loss_scale differ?) {{}}', state.get('loss_scaler'), scaler_state(wrapper))
    yield Part(
        f'{what}, base_param_settings {{}}',
        *(
            _group(side) if isinstance(side, Mapping) else kind(side)
            for side in (state.get('base_param_settings'), wrapper.base_param_settings)
        ),
    )

    own = [parameter for group in groups for parameter in group['params']]
    names = {id(parameter): name for name, parameter in parameters.items()}
    labels = [names.get(id(parameter), str(index)) for index, parameter in enumerate(own)]
    theirs = {
        labels[index] if is_integer(index, maximum=count - 1) else index: _normalised_state(values)
        for index, values in state['state'].items()
        if values != {}
    }
    with_state = (record.get('parameters with state') or {}).get(name)
    if with_state is None:  # an older checkpoint: those that have state, or all if it has none after a step
        stepped = state.get('steps', meta['iter'] // wrapper._accumulative_counts)
        with_state = [i for i, parameter in enumerate(own) if labels[i] in theirs or (stepped and not theirs)]
    expected = _expected_state(wrapper, state['param_groups'], with_state)
    yield Part(
        f'{what}, state {{}}',
        theirs,
        {labels[i]: theirs.get(labels[i]) if e is None else e for i, e in expected.items() if e != {}},
    )


def _expected_state(wrapper: OptimWrapper, groups: list[Mapping], indices: Iterable[int]) -> dict[int, object]:
    """Return the expected state of each parameter after a step, by the parameter's index; None if unknown."""
    options = [group for group in groups for _ in group['params']]
    own = [parameter for group in wrapper.optimizer.param_groups for parameter in group['params']]
    state = ExpectedState(wrapper.optimizer)
    return {index: _normalised_state(state.of(own[index], options[index])) for index in indices if index < len(own)}


def _scheduler(state: object) -> object:
    if not isinstance(state, Mapping):
        return kind(state)
    moving = {name: Kind('a state') for name in SCHEDULER_STATE if name in state}
    return {**kinds(state), **moving, 'param_name': as_values(state.get('param_name'))}


def _group(group: Mapping) -> dict:
    """Return the options of a group that a step needs. Options that only some torch versions have are off if missing."""
    options = {name: kind(value) for name, value in group.items() if name not in IMPLEMENTATION}
    needed = {name: value for name, value in options.items() if value not in (MISSING, BOOL)}
    return {**needed, 'params': Kind(f'{len(group["params"])} parameters')}


def _normalised_state(values: object) -> object:
    """Normalise a parameter's state: some torch versions store step counts as Python numbers, and None for unused entries."""
    if not isinstance(values, Mapping):
        return values
    kept = {name: value for name, value in values.items() if value is not None}
    return {**kept, 'step': Kind('a count')} if 'step' in kept else kept
