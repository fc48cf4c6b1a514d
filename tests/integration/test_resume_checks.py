"""What a checkpoint to resume is compared in: each case changes one thing of an honest checkpoint, or of the config."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmman.errors import CheckpointError
from mmman.runtime.resume_checks import check_fits
from tests.integration.test_resume import StoppedError, checkpoint_in, load, start

SCHEDULERS = [
    {'type': 'MultiStepLR', 'by_epoch': True, 'milestones': [1, 2], 'gamma': 0.5},
    {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.1, 'begin': 0, 'end': 7},
]


class StopBefore(Hook):
    """Ends a run when all is built and loaded."""

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        raise StoppedError


def options_of(
    optimizer: str = 'AdamW', ema: bool = True, schedulers: list | None = None, hooks: tuple = (), **options
) -> dict:
    """A run with everything that a checkpoint restores: averaged weights, schedulers, a loss scaler, accumulation."""
    wrapper = {
        'type': 'mmman.LocalLearningOptimWrapper',
        'dtype': 'bfloat16',
        'loss_scale': 'dynamic',
        'accumulative_counts': 4,
    }
    return {
        'optim_wrapper': {**wrapper, 'optimizer': {'type': optimizer, 'lr': 0.1}, **options.pop('wrapper', {})},
        'custom_hooks': [
            {'type': 'mmman.EMABiasHook', 'momentum': 0.9},
            *([{'type': 'EMAHook', 'priority': 49}] if ema else []),
            *hooks,
        ],
        'param_scheduler': SCHEDULERS if schedulers is None else schedulers,
        **options,
    }


class Fresh(NamedTuple):
    """A checkpoint after 6 of 12 iterations, and runs that could resume it."""

    checkpoint: dict
    run_of: Callable[..., Runner]


@pytest.fixture(scope='module')
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    folder, runs = tmp_path_factory.mktemp('run'), {}

    class StopAt6(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == 6:
                raise StoppedError

    start(folder, seed=0, stop=6, **options_of(hooks=(StopAt6(),)))

    def run_of(**options) -> Runner:
        if repr(options) not in runs:
            runs[repr(options)] = start(
                tmp_path_factory.mktemp('fresh'), stop=6, **options_of(hooks=(StopBefore(),), **options)
            )
        return runs[repr(options)]

    return Fresh(load(checkpoint_in(folder)), run_of)


def clone(value: Any) -> Any:
    """A copy in which tables and lists are new."""
    if type(value) is list:
        return [clone(item) for item in value]
    return (
        type(value)((key, clone(item)) for key, item in value.items())
        if type(value).__name__ in ('dict', 'OrderedDict')
        else value
    )


def put(path: str, value: Any) -> Callable[[dict], None]:
    """A change of a checkpoint: the entry at a path of keys, with ``/`` between them."""

    def change(checkpoint: dict) -> None:
        *above, last = path.split('/')
        for key in above:
            checkpoint = checkpoint[int(key) if key.isdigit() and key not in checkpoint else key]
        if value is REMOVED:
            del checkpoint[last]
        else:
            checkpoint[int(last) if isinstance(checkpoint, list) else last] = value

    return change


REMOVED = object()
RECORD, HUB, GROUP = 'meta/mmman_resume', 'message_hub/runtime_info', 'optimizer/param_groups/0'


def drop_state(*names: str) -> Callable[[dict], None]:
    def change(checkpoint: dict) -> None:
        for state in checkpoint['optimizer']['state'].values():
            for name in names:
                del state[name]

    return change


def forget(*names: str) -> Callable[[dict], None]:
    """Make a checkpoint one of an earlier version, or without names one of mmengine's loops."""

    def change(checkpoint: dict) -> None:
        for name in names or [None]:
            del (checkpoint['meta'] if name is None else checkpoint['meta']['mmman_resume'])[name or 'mmman_resume']

    return change


def older(change: Callable[[dict], None]) -> Callable[[dict], None]:
    """The same change of a checkpoint of an earlier version, which says less about itself."""

    def both(checkpoint: dict) -> None:
        forget('regular', 'batches', 'classes', 'accumulative counts', 'gradients', 'parameters with state')(checkpoint)
        change(checkpoint)

    return both


def swap_schedulers(checkpoint: dict) -> None:
    checkpoint['param_schedulers'].reverse()


def spoil(part: str, name: str, value: float) -> Callable[[dict], None]:
    def change(checkpoint: dict) -> None:
        tensor = checkpoint[part][name].clone()
        tensor.view(-1)[-1] = value
        checkpoint[part][name] = tensor

    return change


WEIGHT, NAN = 'backbone.stem.weight', float('nan')
CHANGED_CHECKPOINTS = {
    # optimizer
    'emptied state': (put('optimizer/state', {}), r'state backbone\.\S+: missing in the checkpoint, a dict in this run \('),
    'emptied state, older': (older(put('optimizer/state', {})), r'state backbone\.\S+: missing in the checkpoint, a dict'),
    'no exp_avg': (drop_state('exp_avg'), r'state backbone\.\S+\.exp_avg: missing in the checkpoint, float64 \('),
    'no exp_avg, older': (older(drop_state('exp_avg')), r'\.exp_avg: missing in the checkpoint, float64 \('),
    'SGD state': (older(drop_state('exp_avg', 'exp_avg_sq', 'step')), r'state backbone\.\S+'),
    'one parameter without state': (
        lambda c: c['optimizer']['state'].pop(3),
        'missing in the checkpoint, a dict in this run;',
    ),
    'state of no parameter': (lambda c: c['optimizer']['state'].update({999: {}, 998: {'step': 1}}), 'state 998: a dict'),
    'state of another shape': (lambda c: c['optimizer']['state'][3].update(exp_avg=torch.zeros(1, 2)), r'float32 \(1, 2\) in'),
    'state that is no tensor': (
        lambda c: c['optimizer']['state'][3].update(exp_avg=0.5),
        'exp_avg: a number in the checkpoint',
    ),
    'state with NaN': (
        lambda c: c['optimizer']['state'][0].update(exp_avg=torch.full_like(c['optimizer']['state'][0]['exp_avg'], NAN)),
        r'optimizer.state.0.exp_avg of .* not finite',
    ),
    'count of steps': (
        lambda c: c['optimizer']['state'][0].update(step=torch.tensor(7.0)),
        'at most the number of steps of the run',
    ),
    'numbers of parameters': (
        lambda c: c['optimizer']['param_groups'][0]['params'].reverse(),
        'others in the checkpoint, in order',
    ),
    'other groups': (lambda c: c['optimizer']['param_groups'].append({'params': []}), 'groups .*: a list of 2 .* a list of 1'),
    'learning rate NaN': (put(f'{GROUP}/lr', NAN), 'lr: a non-finite number in the checkpoint'),
    'learning rate negative': (put(f'{GROUP}/lr', -0.1), 'param_groups.0.lr of the checkpoint is -0.1, not a number >= 0'),
    'no learning rate': (put(f'{GROUP}/lr', REMOVED), 'lr: missing in the checkpoint, a number'),
    'another algorithm': (put(f'{GROUP}/amsgrad', True), 'max_exp_avg_sq: missing in the checkpoint'),
    'maximize': (put(f'{GROUP}/maximize', True), "the optimizer's maximize is True in the checkpoint, False in this config"),
    'steps beyond the iterations': (put('optimizer/steps', 7), 'optimizer.steps of the checkpoint is 7, not at most'),
    'negative steps': (put('optimizer/steps', -1), 'optimizer.steps of the checkpoint is -1, not an integer >= 0'),
    'no steps': (put('optimizer/steps', REMOVED), 'optimizer, steps: missing in the checkpoint, a number in this run'),
    # loss scaler
    'no scaler': (
        older(put('optimizer/loss_scaler', REMOVED)),
        'loss scaler .*: missing in the checkpoint, a dict in this run',
    ),
    **{
        f'scale {scale}': (
            put('optimizer/loss_scaler/scale', scale),
            f'loss_scaler.scale of .* is {scale}, not a positive number',
        )
        for scale in (0.0, NAN, -2.0, float('inf'))
    },
    'growth': (put('optimizer/loss_scaler/growth_factor', 0.5), 'growth_factor of .* is 0.5, not a number above 1'),
    # schedulers
    'swapped schedulers': (swap_schedulers, 'param_scheduler 0.end_factor: a number in the checkpoint, missing'),
    'one scheduler less': (lambda c: c['param_schedulers'].pop(), 'parameter schedulers: 1 in the checkpoint, 2 in this run'),
    'scheduler of momentum': (
        put('param_schedulers/1/param_name', 'momentum'),
        'param_name: momentum in the checkpoint, lr in',
    ),
    'scheduler with a method': (
        put('param_schedulers/1/step', 5),
        'param_scheduler 1.step: a number in the checkpoint, missing',
    ),
    'scheduler step': (
        put('param_schedulers/1/last_step', -2),
        'param_schedulers.1.last_step of the checkpoint is -2, not an integer',
    ),
    # place
    'batch beyond the epoch': (
        put(f'{RECORD}/batch', 5),
        'batch 5 of epoch 1 after 6 iterations is impossible with this data: an epoch has 4',
    ),
    'batch beyond the epoch, older': (
        older(put(f'{RECORD}/batch', 5)),
        'batch 5 of epoch 1 after 6 iterations is impossible',
    ),
    'negative batch': (put(f'{RECORD}/batch', -1), 'batch of the checkpoint is -1, not an integer >= 0'),
    'epoch and iteration differ': (put('meta/epoch', 2), 'batch 2 of epoch 2 after 6 iterations is impossible'),
    'iteration too high': (put('meta/iter', 7), 'batch 2 of epoch 1 after 7 iterations is impossible'),
    'negative iteration': (put('meta/iter', -6), 'meta.iter of the checkpoint is -6, not an integer >= 0'),
    'epoch is no number': (put('meta/epoch', '1'), "meta.epoch of the checkpoint is '1', not an integer"),
    'epoch beyond the end': (older(put('meta/epoch', 4)), 'was saved after 4 epochs, but train_cfg.max_epochs is 3: raise it'),
    'seed': (put('meta/seed', -1), 'meta.seed of the checkpoint is -1, not'),
    'no sampler seed': (put(f'{RECORD}/sampler seed', None), 'sampler seed is missing in the checkpoint, a number in this run'),
    # weights
    'another dtype': (lambda c: c['state_dict'].update({WEIGHT: c['state_dict'][WEIGHT].float()}), f'model, {WEIGHT}: float32'),
    'weight that is no tensor': (put(f'state_dict/{WEIGHT}', 'x'), f'a different model, {WEIGHT}: a string in the checkpoint'),
    'weight with NaN': (spoil('state_dict', WEIGHT, NAN), f'state_dict.{WEIGHT} of the checkpoint is not finite'),
    'weight with infinity': (spoil('state_dict', WEIGHT, float('inf')), f'state_dict.{WEIGHT} of the checkpoint is not finite'),
    'no average': (
        put('ema_state_dict', REMOVED),
        r'averaged weights \(EMAHook\): missing in the checkpoint, a dict in this run',
    ),
    'average of another shape': (
        lambda c: c['ema_state_dict'].update(steps=torch.zeros(2)),
        r'\(EMAHook\) steps: float32 \(2,\)',
    ),
    'average with NaN': (spoil('ema_state_dict', f'module.{WEIGHT}', NAN), f'ema_state_dict.module.{WEIGHT} of .* not finite'),
    # gradients
    'no gradients': (
        put('mmman_gradients', REMOVED),
        r'accumulated gradients backbone\.\S+: missing in the checkpoint, float64',
    ),
    'gradient of another shape': (
        lambda c: c['mmman_gradients'].update({WEIGHT: torch.zeros(2)}),
        r'gradients \S+: float32 \(2,\)',
    ),
    'gradient of nothing': (lambda c: c['mmman_gradients'].update(x=torch.zeros(2)), 'gradients x: float32'),
    'gradient of nothing, older': (older(lambda c: c['mmman_gradients'].update(x=torch.zeros(2))), 'gradients x: float32'),
    # message hub
    'hub without a part': (put('message_hub/log_scalars', REMOVED), 'message_hub log_scalars: missing in the checkpoint'),
    'log that is none': (
        lambda c: c['message_hub']['log_scalars'].update(x=1),
        'log_scalars of the checkpoint is a dict, not a dict of log',
    ),
    'files that are no names': (
        put(f'{HUB}/superseded_ckpts', [1]),
        'superseded_ckpts of the checkpoint is a list of 1, not a list of',
    ),
    'numbers of files': (
        put(f'{HUB}/keep_ckpt_ids', ['../x']),
        'keep_ckpt_ids of the checkpoint is a list of 1, not a list of integers',
    ),
    'best score': (put(f'{HUB}/best_score', 'good'), "best_score of the checkpoint is 'good', not a number"),
    'best file': (put(f'{HUB}/best_ckpt', 5), 'best_ckpt of the checkpoint is 5, not a string'),
    'resumed keys': (
        put('message_hub/resumed_keys/keep_ckpt_ids', False),
        'resumed_keys.keep_ckpt_ids of the checkpoint is False',
    ),
}


def test_an_honest_checkpoint_fits_and_nothing_is_said(fresh):
    assert check_fits(fresh.checkpoint, fresh.run_of()) == []
    assert fresh.checkpoint['optimizer']['steps'] == 1 and len(fresh.checkpoint['mmman_gradients']) > 10


@pytest.mark.parametrize('change', CHANGED_CHECKPOINTS)
def test_a_changed_checkpoint_is_refused(change, fresh):
    checkpoint = clone(fresh.checkpoint)
    alter, message = CHANGED_CHECKPOINTS[change]
    alter(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        check_fits(checkpoint, fresh.run_of())
    assert str(error.value).startswith('cannot resume') and '\n' not in str(error.value)
    assert 'start a new run from its weights' in str(error.value) or 'raise it' in str(error.value)


CHANGED_CONFIGS = {
    'another optimizer': ({'optimizer': 'Adam'}, 'the class of the optimizer: AdamW in the checkpoint, Adam in this run'),
    'other schedulers': (
        {'schedulers': [{**SCHEDULERS[0], 'type': 'StepLR', 'step_size': 1, 'milestones': None}, SCHEDULERS[1]]},
        'the class of the param_scheduler 0: MultiStepLR in the checkpoint, StepLR in this run',
    ),
    'schedulers swapped': ({'schedulers': SCHEDULERS[::-1]}, 'the class of the param_scheduler 0: MultiStepLR .* LinearLR in'),
    'no average': ({'ema': False}, 'the class of the averaged weights: ExponentialMovingAverage in the checkpoint, missing in'),
    'no scaler': (
        {'wrapper': {'loss_scale': None}},
        r'loss scaler \(does dtype or loss_scale differ\?\): a dict in the checkpoint, missing in this run',
    ),
    'accumulation': ({'wrapper': {'accumulative_counts': 3}}, 'accumulative_counts: 4 in the checkpoint, 3 in this run'),
    'groups': (
        {'wrapper': {'paramwise_cfg': {'bias_lr_mult': 2.0}}},
        'param_scheduler 0.base_values: a list of 1 in the checkpoint',
    ),
}


@pytest.mark.parametrize('change', CHANGED_CONFIGS)
def test_a_changed_config_is_refused(change, fresh):
    options, message = CHANGED_CONFIGS[change]
    options = {**options, 'schedulers': [clean(own) for own in options['schedulers']]} if 'schedulers' in options else options
    with pytest.raises(CheckpointError, match=message):
        check_fits(fresh.checkpoint, fresh.run_of(**options))


def clean(scheduler: dict) -> dict:
    kept = {key: value for key, value in scheduler.items() if value is not None}
    return kept


def test_numbers_that_the_config_changes_stay_the_checkpoints_and_the_log_says_so(fresh):
    wrapper = {'optimizer': {'type': 'AdamW', 'lr': 0.2, 'weight_decay': 0.5, 'betas': (0.8, 0.999)}}
    schedulers = [{**SCHEDULERS[0], 'milestones': [1, 3]}, SCHEDULERS[1]]
    optimizer, *rest = check_fits(fresh.checkpoint, fresh.run_of(wrapper=wrapper, schedulers=schedulers))
    assert 'optimizer continues with the values of the checkpoint' in optimizer and 'load_from without resume' in optimizer
    for change in (
        'betas.0 of group 0 is 0.9 in the checkpoint, 0.8 in the config',
        'lr of group 0 is 0.1 in the checkpoint, 0.2 in the config',
    ):
        assert change in optimizer
    assert any(
        'param_scheduler 0 continues with the values of the checkpoint' in note and 'milestones.3' in note for note in rest
    )


@pytest.mark.parametrize(
    ('names', 'note'),
    [
        (
            ('regular', 'batches', 'classes', 'accumulative counts', 'gradients', 'parameters with state'),
            'by an earlier version, which did not record',
        ),
        ((), 'was not saved by a loop of mmman: the resumed run will not be exact'),
    ],
)
def test_a_checkpoint_that_says_less_about_itself_fits_with_a_note(names, note, fresh):
    checkpoint = clone(fresh.checkpoint)
    forget(*names)(checkpoint)
    (said,) = check_fits(checkpoint, fresh.run_of())
    assert note in said


def test_an_older_checkpoint_of_another_optimizer_is_refused_by_what_it_holds(fresh):
    checkpoint = clone(fresh.checkpoint)
    forget('regular', 'batches', 'classes', 'accumulative counts', 'gradients', 'parameters with state')(checkpoint)
    with pytest.raises(
        CheckpointError, match="the optimizer's decoupled_weight_decay is True in the checkpoint, False in this"
    ):
        check_fits(
            checkpoint, fresh.run_of(optimizer='Adam', wrapper={'optimizer': {'type': 'Adam', 'lr': 0.1, 'weight_decay': 0.01}})
        )
    with pytest.raises(CheckpointError, match='groups .*betas: a list of 2 in the checkpoint, missing in'):
        check_fits(checkpoint, fresh.run_of(wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9}}))


def test_schedulers_of_one_class_in_another_order_are_refused(fresh):
    linear = {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.1, 'begin': 0}
    checkpoint, run = clone(fresh.checkpoint), fresh.run_of(schedulers=[{**linear, 'end': 7}, {**linear, 'end': 9}])
    states = [{**fresh.checkpoint['param_schedulers'][1], **dict.fromkeys(['end', 'total_iters'], end)} for end in (7, 9)]
    for state in states:
        state['total_iters'] -= 1
    checkpoint['param_schedulers'] = states
    checkpoint['meta']['mmman_resume']['classes']['param_scheduler 0'] = 'LinearLR'
    assert check_fits(checkpoint, run) == []
    checkpoint['param_schedulers'] = states[::-1]
    with pytest.raises(CheckpointError, match='the schedulers of param_scheduler are in a different order in the checkpoint'):
        check_fits(checkpoint, run)


# Text that a run only shows, and what every run writes anew.
FREE = {'cfg', 'experiment_name', 'time', 'mmengine_version', 'dataset_meta', 'seed', 'loop_stage', 'epoch', 'iter', 'eta'}
FREE |= {'max_epochs', 'max_iters', 'last_ckpt', 'superseded_ckpts'}


def test_no_value_of_another_kind_gets_through_or_ends_in_a_foreign_error(fresh):
    runner, passed = fresh.run_of(), []
    for path in {shape(path): path for path in paths(fresh.checkpoint) if path[0] != 'mmman_gradients'}.values():
        for value in ('x', -1.5, NAN, [[1]], torch.zeros(3, 3)):
            checkpoint = clone(fresh.checkpoint)
            above = checkpoint
            for key in path[:-1]:
                above = above[key]
            above[path[-1]] = value
            try:
                check_fits(checkpoint, runner)
            except CheckpointError as error:
                assert '\n' not in str(error)
            else:
                passed.append((path, value))
    unexpected = [
        (path, value)
        for path, value in passed
        if not (path[:2] in (('meta', path[1]), ('message_hub', 'runtime_info')) and FREE & {*path})
        and not (isinstance(value, float) and path[0] == 'param_schedulers')  # noted: the checkpoint's numbers count
    ]
    assert unexpected == []


def paths(value: Any, above: tuple = ()) -> Iterator[tuple]:
    if type(value) in (list, dict) or type(value).__name__ == 'OrderedDict':
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*above, key)
            yield from paths(item, (*above, key))


def shape(path: tuple) -> tuple:
    """One place replaces all that are alike: the tensors of a model, the parameters of an optimizer, the logs."""
    if path[0] in ('state_dict', 'ema_state_dict') or path[1:2] in (('log_scalars',), ('resumed_keys',)):
        return (*path[:2], len(path)) if path[0] == 'message_hub' else (path[0], path[-1] in ('steps',) or str(path[-1])[-5:])
    return tuple('n' if isinstance(key, int) and path[0] == 'optimizer' else key for key in path)


def test_resuming_for_real_goes_through_the_checks(tmp_path):
    start(tmp_path, seed=0, stop=6)
    path = checkpoint_in(tmp_path)
    checkpoint = load(path)
    checkpoint['optimizer']['state'] = {}
    torch.save(checkpoint, path)
    before = Path(path).read_bytes()
    with pytest.raises(CheckpointError, match='momentum_buffer|state .*: missing in the checkpoint'):
        start(tmp_path, resume=path)
    assert Path(path).read_bytes() == before
