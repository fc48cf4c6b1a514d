"""Finds differences between a checkpoint and the run that resumes it, and reports or rejects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmengine.runner import Runner

from mmman.errors import CheckpointError
from mmman.runtime.compare import MISSING, Difference, differences, kind, plain
from mmman.runtime.resume_record import by_number, scaler_state, states_by_wrapper, wrappers

REMEDY = 'resume with the config that it was trained with, or start a new run from its weights: load_from without resume'

# The state that a scheduler changes; its other entries are its config. The last three belong to ReduceOnPlateau.
SCHEDULER_STATE = ('last_step', '_global_step', '_last_value', 'best', 'num_bad_epochs', 'cooldown_counter')


def changed_options(checkpoint: Mapping, runner: Runner, record: Mapping) -> Iterator[str]:
    """Find numeric options that the config changes. Changed flags of an algorithm or order of schedulers are rejected.

    Yields:
        One line for each optimizer and scheduler that continues with the checkpoint's values instead of the config's.

    Raises:
        CheckpointError: A flag of an optimizer, or the order of the schedulers, has changed.
    """
    states = states_by_wrapper(checkpoint['optimizer'], runner)
    for name, wrapper in wrappers(runner).items():
        changes = []
        for change in differences(_options(states[name]['param_groups']), _options(wrapper.optimizer.param_groups), plain):
            values = {change.theirs, change.ours}
            if values == {'True', 'False'}:
                raise CheckpointError(
                    f"cannot resume: the optimizer's {change.path.partition('.')[2]} is {change.theirs} in the checkpoint, "
                    f'{change.ours} in this config; {REMEDY}'
                )
            if not values <= {'True', 'False', MISSING}:  # otherwise an option of another torch version
                changes.append(
                    change._replace(path=f'{change.path.partition(".")[2]} of group {change.path.partition(".")[0]}')
                )
        scales = [
            {option: value for option, value in (own or {}).items() if option not in ('scale', '_growth_tracker')}
            for own in (states[name].get('loss_scaler'), scaler_state(wrapper))
        ]
        yield from _note(f'optimizer {name}'.rstrip(), [*changes, *differences(*scales, plain)])
    theirs = {name: _config(state) for name, state in by_number(checkpoint.get('param_schedulers')).items()}
    ours = {name: _config(scheduler.state_dict()) for name, scheduler in by_number(runner.param_schedulers).items()}
    texts = [[repr(config) for config in side.values()] for side in (theirs, ours)]
    if texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1]):
        raise CheckpointError(
            f'cannot resume: the schedulers of param_scheduler are in a different order in the checkpoint; {REMEDY}'
        )
    for name, scheduler in by_number(runner.param_schedulers).items():
        yield from _note(f'param_scheduler {name}', [*differences(theirs[name], ours[name], plain)])
        expected_steps = checkpoint['meta']['epoch' if scheduler.by_epoch else 'iter']
        steps = by_number(checkpoint['param_schedulers'])[name]['_global_step']
        if 'monitor' not in ours[name] and steps != expected_steps:  # a scheduler with a monitor steps only after an evaluation
            yield f'param_scheduler {name} has made {steps} steps, but the run was at {expected_steps}'
    counts = {name: wrapper._accumulative_counts for name, wrapper in wrappers(runner).items()}
    if record.get('accumulative counts', counts) != counts:
        yield f'accumulative_counts changes from {record["accumulative counts"]} to {counts}'


def _note(what: str, changes: list[Difference]) -> Iterator[str]:
    if changes:
        details = '; '.join(f'{path} is {theirs} in the checkpoint, {ours} in the config' for path, theirs, ours in changes[:3])
        more = f' and {len(changes) - 3} more' if changes[3:] else ''
        yield (
            f'The {what} continues with the values of the checkpoint: {details}{more}. To train with the values of the '
            'config, start a new run from its weights: load_from without resume'
        )


def changed_position(meta: Mapping, record: Mapping, runner: Runner) -> Iterator[str]:
    """Check that a checkpoint's position in the data is possible in this run.

    Yields:
        Messages for the user about the position.

    Raises:
        CheckpointError: The position is not possible, or the data has changed in the middle of an epoch.
    """
    loop, epoch, iteration = runner.train_loop, meta['epoch'], meta['iter']
    if record.get('by epoch', loop.by_epoch) != loop.by_epoch:
        units = ['epochs' if by_epoch else 'iterations' for by_epoch in (record['by epoch'], loop.by_epoch)]
        raise CheckpointError(f'cannot resume: the checkpoint counts {units[0]}, train_cfg {units[1]}; {REMEDY}')
    done, end, option = (epoch, loop.max_epochs, 'max_epochs') if loop.by_epoch else (iteration, loop.max_iters, 'max_iters')
    if done > end:
        raise CheckpointError(
            f'cannot resume: the checkpoint was saved after {done} {option.removeprefix("max_")}, but train_cfg.{option} is '
            f'{end}: raise it, or resume from an earlier checkpoint'
        )
    if not record:
        yield 'The checkpoint was not saved by a loop of mmman: the resumed run will not be exact'
        return
    batch, ours = record['batch'], loop.data_signature()
    signatures = [
        {**record['data'], 'sampler seed': kind(record.get('sampler seed'))},
        {**ours, 'sampler seed': kind(loop.sampler_seed)},
    ]
    if signatures[0] == signatures[1]:  # otherwise the changed values explain a different number of batches
        signatures = [{'batches': record.get('batches', loop.batches)}, {'batches': loop.batches}]
    changes = '; '.join(
        f'{name} is {theirs} in the checkpoint, {ours} in this run' for name, theirs, ours in differences(*signatures, plain)
    )
    if changes and batch:
        raise CheckpointError(
            f'cannot resume at batch {batch} of an epoch with other data: {changes}. Resume with the same data '
            'and processes, or from the end of an epoch, or start a new run from its weights: load_from without resume'
        )
    is_valid_position = loop.is_possible if changes or not record.get('regular', True) else loop.is_regular
    if not is_valid_position(epoch, iteration, batch):
        raise CheckpointError(
            f'cannot resume: batch {batch} of epoch {epoch} after {iteration} iterations is impossible with this data: an '
            f'epoch has {loop.batches} batches; {REMEDY}'
        )
    if changes:
        yield f'The run continues with other data: {changes}'


def _config(state: Mapping) -> dict:
    return {name: value for name, value in sorted(state.items()) if name not in SCHEDULER_STATE}


def _options(groups: list[Mapping]) -> list[dict]:
    """Return the configured options of parameter groups: the initial value if a scheduler changes an option."""
    unused = ('params', 'foreach', 'fused')
    return [
        {name: group.get(f'initial_{name}', value) for name, value in group.items() if name not in unused} for group in groups
    ]
