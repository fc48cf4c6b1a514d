"""The inspector's scalars in a run, against what the run's own model gives."""

import pytest
import torch
from mmengine.runner import Runner

from mmman.analysis.inspection import copy_distance
from mmman.engine import LocalInspectorHook
from mmman.errors import ConfigError
from tests.toy import toy_batches
from tests.unit.local.test_session import toy

pytestmark = pytest.mark.usefixtures('fresh_hub')


def train(folder, interval=2, iters=4, hooks=True, **optim_wrapper):
    torch.manual_seed(0)
    inspector = [{'type': 'mmman.LocalInspectorHook', 'interval': interval}] if hooks else []
    runner = Runner(
        toy(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(iters), collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': iters, 'val_interval': 99},
        optim_wrapper={
            'type': 'mmman.LocalLearningOptimWrapper',
            'optimizer': {'type': 'SGD', 'lr': 0.1},
            **optim_wrapper,
        },
        custom_hooks=[*inspector, {'type': 'mmman.EMABiasHook', 'momentum': 0.9}],
        default_hooks={'logger': {'type': 'LoggerHook', 'interval': 1}, 'checkpoint': None},
        experiment_name=f'{folder.name}-{hooks}',
    )
    runner.train()
    return runner


def logged(runner, name):
    return {key: log for key, log in runner.message_hub.log_scalars.items() if key.endswith(f'/{name}')}


@pytest.mark.parametrize('options', [{}, {'update': 'immediate'}])
def test_values_of_the_last_iteration(tmp_path, options):
    runner = train(tmp_path, **options)
    backbone = runner.model.backbone
    for name, blocks in (('gradient', 4), ('dead', 4), ('distance', 3)):
        found = logged(runner, name)
        assert sorted(found) == [f'train/local/{j}/{name}' for j in range(1, blocks + 1)]
        assert all(len(log.data[0]) == 2 for log in found.values())  # iterations 2 and 4
    distances = [log.current() for log in logged(runner, 'distance').values()]
    assert distances == [copy_distance(head, backbone) for head in backbone.local.values()]
    assert min(distances) > 0
    assert all(log.current() > 0 for log in logged(runner, 'gradient').values())
    assert '"local/4/gradient": ' in next(tmp_path.rglob('scalars.json')).read_text()


def test_training_does_not_change(tmp_path):
    with_hook, without = (train(tmp_path / str(on), hooks=on).model.state_dict() for on in (True, False))
    assert all(torch.equal(value, without[name]) for name, value in with_hook.items())


def test_it_waits_for_the_optimizer_to_step(tmp_path):
    runner = train(tmp_path, interval=3, iters=4, accumulative_counts=2)
    assert {len(log.data[0]) for log in logged(runner, 'gradient').values()} == {1}  # from iteration 3, by that of 4


def test_a_run_that_ends_before_the_step_leaves_nothing_behind(tmp_path):
    runner = train(tmp_path, iters=1, hooks=False)
    hooks = [len(module._forward_hooks) for module in runner.model.modules()]
    inspector = LocalInspectorHook(interval=1)
    inspector.before_train_iter(runner, 0)
    inspector.after_train_iter(runner, 0)
    assert [len(module._forward_hooks) for module in runner.model.modules()] != hooks
    inspector.after_train(runner)
    assert [len(module._forward_hooks) for module in runner.model.modules()] == hooks


@pytest.mark.parametrize(
    'attribute, value, says',
    [('optim_wrapper', None, 'not NoneType'), ('comm', 1, 'PipelineRunner'), ('cuda_graphs', True, 'False')],
)
def test_runs_that_cannot_be_inspected_are_refused(tmp_path, attribute, value, says):
    runner = train(tmp_path, iters=1)
    owner = {'optim_wrapper': runner, 'comm': runner.model, 'cuda_graphs': runner.optim_wrapper}[attribute]
    object.__setattr__(owner, attribute, value)
    with pytest.raises(ConfigError, match=says):
        LocalInspectorHook().before_train(runner)
