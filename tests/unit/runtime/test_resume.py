"""What ``use_exact_resume`` makes of a config, and where the data of a resumed run goes on.

Runs that are stopped and resumed are in tests/integration/test_resume.py.
"""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from mmman.runtime.resume import ExactResumeHook, use_exact_resume
from mmman.runtime.resume_record import GRADIENTS, RECORD


@pytest.mark.parametrize('loop', ['EpochBasedTrainLoop', 'mmengine.EpochBasedTrainLoop', EpochBasedTrainLoop, None])
def test_stock_loops_and_hooks_are_replaced(loop):
    cfg = Config({'train_cfg': {'max_epochs': 3, **({'type': loop} if loop else {'by_epoch': True})}})
    use_exact_resume(cfg)
    assert cfg.train_cfg == {'type': 'mmman.EpochBasedTrainLoop', 'max_epochs': 3}
    assert cfg.default_hooks.checkpoint == {'type': 'mmman.CheckpointHook', 'interval': 1}
    again = cfg.copy()
    use_exact_resume(again)
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize('kind', ['CheckpointHook', CheckpointHook])
def test_options_of_loop_and_hook_are_kept(kind):
    cfg = Config(
        {'train_cfg': {'by_epoch': False, 'max_iters': 9}, 'default_hooks': {'checkpoint': {'type': kind, 'max_keep_ckpts': 2}}}
    )
    use_exact_resume(cfg)
    assert cfg.train_cfg == {'type': 'mmman.IterBasedTrainLoop', 'max_iters': 9}
    assert cfg.default_hooks.checkpoint == {'type': 'mmman.CheckpointHook', 'max_keep_ckpts': 2}


def test_custom_classes_are_kept_with_a_warning(monkeypatch):
    messages = []
    monkeypatch.setattr('mmman.runtime.resume.print_log', lambda message, **_: messages.append(message))
    options = {'train_cfg': {'type': 'MyLoop'}, 'default_hooks': {'checkpoint': {'type': 'MyHook'}}}
    cfg = Config(options)
    use_exact_resume(cfg)
    assert cfg.to_dict() == options
    assert messages == [
        'train_cfg.type=MyLoop is not an mmengine loop: a resumed run will not be exact',
        'default_hooks.checkpoint.type=MyHook is not the hook of mmengine: a killed run may lose checkpoints',
    ]
    loop = type('EpochBasedTrainLoop', (EpochBasedTrainLoop,), {'__module__': 'library.loops'})
    cfg = Config({'train_cfg': {'type': loop}, 'default_hooks': {'checkpoint': None}})
    use_exact_resume(cfg)
    assert cfg.train_cfg.type is loop and cfg.default_hooks.checkpoint is None


def resumed(loop, checkpoint, model=None):
    """The loop, after the hook has seen a checkpoint that fits."""
    runner = SimpleNamespace(_resume=False, train_loop=SimpleNamespace(**loop), model=model or nn.Identity())
    hook = ExactResumeHook()
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    return runner.train_loop


def test_the_recorded_batch_seed_and_gradients_are_restored():
    sampler, model = SimpleNamespace(seed=1), nn.Linear(1, 1)
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(sampler=sampler))
    record = {'batch': 7, 'sampler seed': 5}
    checkpoint = {'meta': {RECORD: record}, GRADIENTS: {'bias': torch.full((1,), 3.0)}}
    loop = resumed({'iter': 9, 'dataloader': loader}, checkpoint, model)
    assert (loop.resumed_batch, sampler.seed) == (7, 5)
    assert model.bias.grad.item() == 3 and model.weight.grad is None
    resumed({'iter': 9, 'dataloader': loader}, {'meta': {RECORD: {**record, 'sampler seed': None}}}, model)
    assert sampler.seed == 5


@pytest.mark.parametrize(
    ('loop', 'batch'),
    [
        ({'by_epoch': True, 'epoch': 2, 'iter': 23}, 3),
        ({'by_epoch': True, 'epoch': 2, 'iter': 20}, 0),
        ({'by_epoch': True, 'epoch': 0, 'iter': 99}, 10),  # epochs of another length: not beyond the end
        ({'by_epoch': True, 'epoch': 5, 'iter': 9}, 0),
        ({'by_epoch': False, 'epoch': 0, 'iter': 23}, 23),
    ],
)
def test_without_a_record_the_batch_follows_from_the_iteration(loop, batch):
    assert resumed({**loop, 'dataloader': range(10)}, {'meta': {}}).resumed_batch == batch


def test_a_new_run_begins_at_its_first_batch():
    """Also from weights that a checkpoint with a record holds."""
    assert not hasattr(resumed({'iter': 0}, {'meta': {RECORD: {'batch': 7}}}), 'resumed_batch')
