"""Whether a run can go on from a checkpoint: everything that would be restored is compared with the run before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmman.engine.compare import FLAG, NOTHING, TABLE, Difference, Kind, at, differences, is_whole, kind, kinds, plain, words
from mmman.engine.hooks import check_local_heads
from mmman.engine.optimizer_state import IMPLEMENTATION, state_of_a_step
from mmman.engine.resume_record import (
    GRADIENTS,
    RECORD,
    averaged_model,
    by_number,
    classes,
    states_by_wrapper,
    unwrap,
    wrappers,
)
from mmman.engine.resume_values import DAMAGED, check_finite, check_values
from mmman.errors import CheckpointError

_REMEDY = 'resume with the config that it was trained with, or start a new run from its weights: load_from without resume'

# What a scheduler changes; the rest is its config. The last three are ReduceOnPlateau's.
_SCHEDULER_STATE = ('last_step', '_global_step', 'base_values', '_last_value', 'best', 'num_bad_epochs', 'cooldown_counter')


class Part(NamedTuple):
    """A part of a checkpoint beside what the run has in its place: compared by what sort of values both are.

    ``what`` is how an error calls a place in it, with ``{}`` for the path.
    """

    what: str
    theirs: object
    ours: object


def check_fits(checkpoint: Mapping, runner: Runner) -> list[str]:
    """Check that a checkpoint is of this model, optimizer, schedule and data, and that every value in it has a meaning.

    Args:
        checkpoint: What was loaded from the file.
        runner: The run; nothing of it changes.

    Returns:
        What the user should know: what differs and doesn't keep the run from going on, and what can't be compared.

    Raises:
        CheckpointError: The run can't go on from it.
    """
    for key, what in (('state_dict', 'weights'), ('message_hub', 'log'), ('optimizer', 'optimizer state')):
        if key not in checkpoint:
            raise CheckpointError(
                f'cannot resume: the checkpoint has no {what}, as a published one or a best_*.pth: '
                'resume from an epoch_*.pth or iter_*.pth, or start a new run from its weights: load_from without resume'
            )
    check_values(checkpoint, runner)
    check_local_heads(checkpoint['state_dict'], unwrap(runner.model).state_dict())
    record = at(checkpoint, f'meta.{RECORD}') or {}
    for part in _parts(checkpoint, runner, record):
        found = [*differences(part.theirs, part.ours)]
        if found:
            path, theirs, ours = found[0]
            raise CheckpointError(
                f'cannot resume: {part.what.format(path).strip()}: {theirs} in the checkpoint, {ours} in this run'
                f'{f" ({len(found) - 1} more differ)" if found[1:] else ""}; {_REMEDY}'
            )
    check_finite(checkpoint, runner)
    notes = [*_changed_options(checkpoint, runner, record), *_position_notes(checkpoint['meta'], record, runner)]
    if record and 'classes' not in record:
        notes.append(
            'The checkpoint is of an earlier version, and does not say of which classes its optimizer and schedulers are: '
            'make sure that this config has the same'
        )
    return notes


def _parts(checkpoint: Mapping, runner: Runner, record: Mapping) -> Iterator[Part]:
    """What is compared, in this order: each part takes for granted that those before it fit."""
    theirs = by_number(checkpoint.get('param_schedulers'))
    schedulers = {name: scheduler.state_dict() for name, scheduler in by_number(runner.param_schedulers).items()}
    yield Part('parameter schedulers', Kind(len(theirs)), Kind(len(schedulers)))
    if 'classes' in record:
        yield Part('the class of the {}', words(record['classes']), words(classes(runner)))
    model, average = unwrap(runner.model), averaged_model(runner)
    yield Part('the checkpoint is of another model, {}', checkpoint['state_dict'], model.state_dict())
    ours = None if average is None else average.state_dict()
    yield Part('averaged weights (EMAHook) {}', checkpoint.get('ema_state_dict'), ours)
    hub = dict.fromkeys(('log_scalars', 'runtime_info', 'resumed_keys'), TABLE)
    yield Part('message_hub {}', kinds(checkpoint['message_hub']), hub)
    yield Part(
        'param_scheduler {}', *({name: _scheduler(state) for name, state in side.items()} for side in (theirs, schedulers))
    )
    states = states_by_wrapper(checkpoint['optimizer'], runner)
    yield Part('optimizer {}', kinds(states), dict.fromkeys(wrappers(runner), TABLE))
    for name, wrapper in wrappers(runner).items():
        yield from _optimizer_parts(name, wrapper, states[name], checkpoint['meta'], record, dict(model.named_parameters()))
    parameters = dict(model.named_parameters())
    gradients = checkpoint.get(GRADIENTS) or {}
    yield Part(
        'accumulated gradients {}', gradients, {name: parameters.get(name) for name in record.get('gradients', gradients)}
    )
    counts = {name: wrapper._accumulative_counts for name, wrapper in wrappers(runner).items()}
    if gradients and 'accumulative counts' in record:
        yield Part('accumulative_counts {}', words(record['accumulative counts']), words(counts))


def _optimizer_parts(
    name: str, wrapper: OptimWrapper, state: Mapping, meta: Mapping, record: Mapping, parameters: dict[str, nn.Parameter]
) -> Iterator[Part]:
    what = f'optimizer {name}'.rstrip()
    groups = wrapper.optimizer.param_groups
    count = sum(len(group['params']) for group in groups)
    yield Part(f'{what}, groups (paramwise_cfg?) {{}}', [*map(_group, state['param_groups'])], [*map(_group, groups)])
    indices = [index for group in state['param_groups'] for index in group['params']]
    yield Part(
        f'{what}, numbers of its parameters', Kind('others' if indices != [*range(count)] else 'in order'), Kind('in order')
    )
    scaler, base = getattr(wrapper, 'loss_scaler', None), wrapper.base_param_settings
    yield Part(f'{what}, loss scaler (dtype?) {{}}', state.get('loss_scaler'), None if scaler is None else scaler.state_dict())
    yield Part(
        f'{what}, base_param_settings {{}}',
        *(_group(side) if isinstance(side, Mapping) else kind(side) for side in (state.get('base_param_settings'), base)),
    )

    own = [parameter for group in groups for parameter in group['params']]
    names = {id(parameter): name for name, parameter in parameters.items()}
    labels = [names.get(id(parameter), str(index)) for index, parameter in enumerate(own)]
    theirs = {
        labels[index] if is_whole(index, maximum=count - 1) else index: _without_nothing(values)
        for index, values in state['state'].items()
        if values != {}
    }
    with_state = (record.get('parameters with state') or {}).get(name)
    if with_state is None:  # of another version: some have none, as they never had a gradient, but not all that were stepped
        stepped = state.get('steps', meta['iter'] // wrapper._accumulative_counts)
        with_state = [i for i, parameter in enumerate(own) if labels[i] in theirs or (stepped and not theirs)]
    expected = _expected_state(wrapper, state['param_groups'], with_state)
    yield Part(
        f'{what}, state {{}}',
        theirs,
        {labels[i]: theirs.get(labels[i]) if e is None else e for i, e in expected.items() if e != {}},
    )


def _expected_state(
    wrapper: OptimWrapper, groups: list[Mapping], indices: Iterable[int]
) -> dict[int, dict[str, Tensor] | None]:
    """By a parameter's number, what a step leaves of it; None where that isn't known."""
    options = [group for group in groups for _ in group['params']]
    own = [parameter for group in wrapper.optimizer.param_groups for parameter in group['params']]
    known: dict[tuple, dict[str, Tensor] | None] = {}
    expected = {}
    for index in indices:
        if index >= len(own):
            continue
        key = (id(options[index]), own[index].shape, own[index].dtype)
        if key not in known:
            known[key] = state_of_a_step(wrapper.optimizer, options[index], own[index])
        expected[index] = known[key]
    return expected


def _changed_options(checkpoint: Mapping, runner: Runner, record: Mapping) -> Iterator[str]:
    """Numbers that the config has changed. What chooses an algorithm, and another order of schedulers, is refused.

    Yields:
        One line for each optimizer and scheduler that goes on as the checkpoint says, against the config.
    """
    states = states_by_wrapper(checkpoint['optimizer'], runner)
    for name, wrapper in wrappers(runner).items():
        changes = []
        for change in differences(_options(states[name]['param_groups']), _options(wrapper.optimizer.param_groups), plain):
            values = {change.theirs, change.ours}
            if values == {'True', 'False'}:
                raise CheckpointError(
                    f"cannot resume: the optimizer's {change.path.partition('.')[2]} is {change.theirs} in the checkpoint, "
                    f'{change.ours} in this config; {_REMEDY}'
                )
            if not values <= {'True', 'False', NOTHING}:  # else an option of another version of torch
                changes.append(
                    change._replace(path=f'{change.path.partition(".")[2]} of group {change.path.partition(".")[0]}')
                )
        yield from _note(f'optimizer {name}'.rstrip(), changes)
    theirs = {name: _config(state) for name, state in by_number(checkpoint.get('param_schedulers')).items()}
    ours = {name: _config(scheduler.state_dict()) for name, scheduler in by_number(runner.param_schedulers).items()}
    texts = [[repr(config) for config in side.values()] for side in (theirs, ours)]
    if texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1]):
        raise CheckpointError(
            f'cannot resume: the schedulers of param_scheduler have another order in the checkpoint; {_REMEDY}'
        )
    for name in ours:
        yield from _note(f'param_scheduler {name}', [*differences(theirs[name], ours[name], plain)])
    counts = {name: wrapper._accumulative_counts for name, wrapper in wrappers(runner).items()}
    if record.get('accumulative counts', counts) != counts:
        yield f'accumulative_counts was {record["accumulative counts"]}, and is {counts} from here on'


def _note(what: str, changes: list[Difference]) -> Iterator[str]:
    if changes:
        said = '; '.join(f'{path} {theirs} there, {ours} here' for path, theirs, ours in changes[:3])
        more = f' and {len(changes) - 3} more' if changes[3:] else ''
        yield (
            f'The {what} goes on as in the checkpoint, not as this config says: {said}{more}. To train with the new values, '
            'start a new run from its weights: load_from without resume'
        )


def _position_notes(meta: Mapping, record: Mapping, runner: Runner) -> Iterator[str]:
    """Check that a checkpoint's place in the data is one of this run.

    Yields:
        What the user should know of it.
    """
    loop, epoch, iteration = runner.train_loop, meta['epoch'], meta['iter']
    behind, end, option = (epoch, loop.max_epochs, 'max_epochs') if loop.by_epoch else (iteration, loop.max_iters, 'max_iters')
    if behind > end:
        raise CheckpointError(
            f'cannot resume: the checkpoint has {behind} {option.removeprefix("max_")} behind it, and train_cfg.{option} is '
            f'{end}: raise it, or resume from an earlier one'
        )
    if not record:
        yield 'The checkpoint was not saved by a loop of mmman: the resumed run will not be exactly the uninterrupted one'
        return
    if record['by epoch'] != loop.by_epoch:
        units = ['epochs' if by_epoch else 'iterations' for by_epoch in (record['by epoch'], loop.by_epoch)]
        raise CheckpointError(f'cannot resume: the checkpoint counts {units[0]}, train_cfg {units[1]}; {_REMEDY}')
    batch, ours = record['batch'], loop.data_facts()
    changed = [name for name, value in record['data'].items() if ours.get(name) != value]
    changes = '; '.join(f'{name} {record["data"][name]} there, {ours.get(name, NOTHING)} here' for name in changed)
    if changes and batch:
        raise CheckpointError(
            f'cannot resume after batch {batch} of other data: {changes}. Resume with the same data '
            'and processes, or from the end of an epoch, or start a new run from its weights: load_from without resume'
        )
    is_place = loop.is_possible if changes or not record.get('regular', True) else loop.is_regular
    if not is_place(epoch, iteration, batch):
        raise CheckpointError(
            f'cannot resume: no run is in epoch {epoch} at batch {batch} after {iteration} iterations, where an epoch has '
            f'{len(loop.dataloader)} batches; {DAMAGED}'
        )
    if changes:
        yield f'The run goes on with other data than it began: {changes}'


def _scheduler(state: object) -> object:
    return {**kinds(state), 'param_name': words(state.get('param_name'))} if isinstance(state, Mapping) else kind(state)


def _config(state: Mapping) -> dict:
    return {name: value for name, value in sorted(state.items()) if name not in _SCHEDULER_STATE}


def _group(group: Mapping) -> dict:
    """What a step needs of a group: options that another version of torch added are off where they are missing."""
    options = {name: kind(value) for name, value in group.items() if name not in IMPLEMENTATION}
    needed = {name: value for name, value in options.items() if value not in (NOTHING, FLAG)}
    return {**needed, 'params': Kind(f'{len(group["params"])} parameters')}


def _options(groups: list[Mapping]) -> list[dict]:
    """What the config says of groups: where schedulers change an option, what it began as."""
    unused = ('params', *IMPLEMENTATION)
    return [
        {name: group.get(f'initial_{name}', value) for name, value in group.items() if name not in unused} for group in groups
    ]


def _without_nothing(values: object) -> object:
    """A parameter's state; older versions of torch keep None for what an option switches off."""
    return {name: value for name, value in values.items() if value is not None} if isinstance(values, Mapping) else values
