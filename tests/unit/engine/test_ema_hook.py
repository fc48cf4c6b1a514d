import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mmman import EMABiasHook, delocalize_
from mmman.errors import CheckpointError, ConfigError
from tests.toy import toy_batches, toy_config


def runner_of(tmp_path, model=None, hook=None, iters=4, optim_wrapper=None, model_options=None, **options):
    torch.manual_seed(0)
    return Runner(
        model or MODELS.build(toy_config(**(model_options or {}))).double(),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(iters), collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': iters, 'val_interval': 99},
        optim_wrapper={
            'type': 'mmman.LocalLearningOptimWrapper',
            'optimizer': {'type': 'SGD', 'lr': 0.1},
            **(optim_wrapper or {}),
        },
        custom_hooks=[hook or {'type': 'mmman.EMABiasHook', 'momentum': 0.9}],
        default_hooks={'logger': None, 'checkpoint': {'type': 'CheckpointHook', 'interval': iters, 'by_epoch': False}},
        experiment_name=f'{tmp_path.name}-{len([*tmp_path.iterdir()])}',
        **options,
    )


def copies(model):
    return [
        (head.transfer.momentum.state_dict(), head.source.of(model.backbone).state_dict())
        for head in model.backbone.local.values()
    ]


def distance(model):
    return sum(float((ours[name].double() - theirs[name]).abs().sum()) for ours, theirs in copies(model) for name in ours)


class Watch(EMABiasHook):
    """Notes how often the copies moved, and where they stood when training began."""

    def before_train(self, runner):
        super().before_train(runner)
        self.at_start = distance(runner.model)
        self.moves = []

    def after_train_iter(self, runner, *args, **kwargs):
        before = distance(runner.model)
        super().after_train_iter(runner, *args, **kwargs)
        self.moves.append(distance(runner.model) != before)


def test_copies_start_exact_after_weight_initialisation(tmp_path):
    hook = Watch(0.9)
    runner = runner_of(tmp_path, hook=hook)
    assert distance(runner.model) == 0
    runner.train()
    assert hook.at_start == 0 and hook.moves == [True] * 4
    assert distance(runner.model) > 0


def test_zero_momentum_copies_the_source_and_one_never_moves(tmp_path):
    runner = runner_of(tmp_path, hook=EMABiasHook(0.0))
    runner.train()
    floats = [(a[n], b[n]) for a, b in copies(runner.model) for n in a if a[n].is_floating_point()]
    for ours, theirs in floats:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    still = Watch(1.0)
    runner_of(tmp_path, hook=still).train()
    assert still.moves == [False] * 4


def test_the_copies_move_only_where_the_optimizer_stepped(tmp_path):
    hook = Watch(0.9)
    runner_of(tmp_path, hook=hook, iters=6, optim_wrapper={'accumulative_counts': 2}).train()
    assert hook.moves == [False, True] * 3


def test_interval_counts_optimizer_steps_across_a_resume(tmp_path):
    hook = Watch(0.9, interval=2)
    runner_of(tmp_path, hook=hook, iters=3).train()
    assert hook.moves == [False, True, False]
    hook = Watch(0.9, interval=2)
    runner_of(tmp_path, hook=hook, iters=6, load_from=str(tmp_path / 'iter_3.pth'), resume=True).train()
    assert hook.moves == [True, False, True]


def test_resume_and_load_keep_copies_that_the_checkpoint_carries(tmp_path):
    runner = runner_of(tmp_path)
    runner.train()
    trained = distance(runner.model)
    for resume in (False, True):
        hook = Watch(0.9)
        other = runner_of(tmp_path, hook=hook, iters=5, load_from=str(tmp_path / 'iter_4.pth'), resume=resume)
        other.train()
        assert hook.at_start == trained


def test_copies_start_from_a_loaded_end_to_end_checkpoint(tmp_path):
    stock = MODELS.build(toy_config(num_blocks=1)).double()
    delocalize_(stock.backbone)
    torch.manual_seed(7)
    stock.init_weights()
    torch.save({'state_dict': stock.state_dict(), 'meta': {}}, tmp_path / 'e2e.pth')
    hook = Watch(0.9)
    runner = runner_of(
        tmp_path,
        hook=hook,
        iters=1,
        load_from=str(tmp_path / 'e2e.pth'),
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.0}},
    )
    runner.train()
    assert hook.at_start == 0
    assert torch.equal(runner.model.backbone.layer2[0].conv.weight, stock.backbone.layer2[0].conv.weight)


def test_copies_that_weight_initialisation_brings_are_not_kept(tmp_path):
    runner_of(tmp_path).train()
    model = MODELS.build(toy_config()).double()
    saved = str(tmp_path / 'iter_4.pth')
    model.backbone.init_cfg = {'type': 'Pretrained', 'checkpoint': saved, 'prefix': 'backbone.'}
    hook = Watch(0.9)
    runner_of(tmp_path, model=model, hook=hook, iters=1, optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.0}}).train()
    assert hook.at_start == 0
    assert torch.equal(model.backbone.stem.weight, torch.load(saved)['state_dict']['backbone.stem.weight'])


def test_heads_of_the_same_cut_are_taken_over_from_another_k(tmp_path):
    runner_of(tmp_path, model_options={'num_blocks': 3, 'partition': 'stage'}).train()
    hook = Watch(0.9)
    runner = runner_of(
        tmp_path,
        hook=hook,
        iters=1,
        load_from=str(tmp_path / 'iter_4.pth'),
        model_options={'partition': ['layer1.1', 'layer3.0'], 'num_blocks': 3},
    )
    saved = torch.load(tmp_path / 'iter_4.pth')['state_dict']
    runner.load_or_resume()
    kept, new = runner.model.backbone.local.values()
    assert torch.equal(kept.fc[3].weight, saved['backbone.local.layer1_1.fc.3.weight'])
    assert kept.transfer.is_loaded and not new.transfer.is_loaded


def test_resume_with_other_cuts_is_refused(tmp_path):
    runner_of(tmp_path).train()
    options = {'num_blocks': 3, 'partition': 'stage'}
    with pytest.raises(
        CheckpointError, match=r'on \[layer1_1, layer2_1, stem\], this config on \[layer1_1, layer2_1\].*load_from'
    ):
        runner_of(tmp_path, model_options=options, load_from=str(tmp_path / 'iter_4.pth'), resume=True).train()


def test_the_log_has_every_scale(tmp_path):
    runner = runner_of(tmp_path)
    runner.train()
    scalars = runner.message_hub.log_scalars
    for head in runner.model.backbone.local.values():
        assert scalars[f'train/local/{head.block}/s'].current() == pytest.approx(head.transfer.s.item())
        assert len(scalars[f'train/local/{head.block}/s'].data[0]) == 4
    plain = runner_of(tmp_path, model_options={'transfer': {'scale': False}})
    plain.train()
    assert not any(name.endswith('/s') for name in plain.message_hub.log_scalars)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'momentum': 1.5}, 'a finite number >= 0 and <= 1'),
        ({'interval': 0}, 'an integer >= 1'),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        EMABiasHook(**options)


def test_runs_that_are_not_local_learning_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='requires optim_wrapper = .*LocalLearningOptimWrapper.* not OptimWrapper'):
        runner_of(tmp_path, optim_wrapper={'type': 'OptimWrapper'}).train()
    with pytest.raises(ConfigError, match='cfg.compile'):
        runner_of(tmp_path, cfg={'compile': True}).train()
    stock = MODELS.build(toy_config(num_blocks=1)).double()
    delocalize_(stock.backbone)
    with pytest.raises(ConfigError, match='0 localised backbones'):
        runner_of(tmp_path, model=stock).train()


def test_a_forgotten_hook_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='EMABiasHook'):
        runner_of(tmp_path, hook={'type': 'EmptyCacheHook'}).train()
    runner_of(tmp_path).train()
    with pytest.raises(ConfigError, match='EMABiasHook'):  # also where a checkpoint brought the copies
        runner_of(tmp_path, hook={'type': 'EmptyCacheHook'}, load_from=str(tmp_path / 'iter_4.pth')).train()


def test_resume_with_another_transfer_names_a_key(tmp_path):
    runner_of(tmp_path).train()
    options = {'transfer': {'scale': False}}
    with pytest.raises(CheckpointError, match=r'3 keys differ, the first is backbone.local.layer1_1.transfer.delta'):
        runner_of(tmp_path, model_options=options, load_from=str(tmp_path / 'iter_4.pth'), resume=True).train()
