"""Local losses in the log, and what happens if one of them isn't finite."""

import pytest
import torch

from mmman.engine.local_losses import NON_FINITE_STEPS, LocalLossLog
from mmman.errors import NonFiniteLossError
from tests.toy import toy_batches
from tests.unit.engine.test_optim_wrapper import scalars
from tests.unit.local.test_session import step, toy, wrapper

pytestmark = pytest.mark.usefixtures('fresh_hub')


def test_local_losses_are_logged_once_and_not_summed():
    model = toy(num_blocks=3)
    optim_wrapper = wrapper(model)
    log = step(model, optim_wrapper)
    assert set(log) == {'loss', 'loss_ce', 'acc'}
    assert log['loss'] == log['loss_ce']
    logged = scalars(optim_wrapper)
    assert set(logged) == {f'train/local/{j}/{name}' for j in (1, 2) for name in ('loss', 'loss_ce', 'acc')}
    assert logged['train/local/1/loss'] == logged['train/local/1/loss_ce'] != 0


def test_local_losses_reach_every_visualizer_smoothed_as_the_stock_losses(tmp_path):
    import json

    from mmengine.runner import Runner

    runner = Runner(
        toy(num_blocks=2),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(4), collate_fn=lambda batch: batch[0]),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 4, 'val_interval': 9},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}},
        custom_hooks=[{'type': 'mmman.EMABiasHook'}],
        default_hooks={'logger': {'type': 'LoggerHook', 'interval': 4}, 'checkpoint': None},
        log_processor={'by_epoch': False, 'window_size': 4},
        visualizer={'type': 'Visualizer', 'vis_backends': [{'type': 'LocalVisBackend'}]},
        experiment_name=tmp_path.name,
    )
    runner.train()
    last = json.loads(next(tmp_path.rglob('scalars.json')).read_text().splitlines()[-1])
    history = runner.message_hub.log_scalars['train/local/1/loss'].data[0]
    assert len(history) == 4 and last['local/1/loss'] == pytest.approx(history.mean())
    assert {'loss', 'local/1/loss_ce', 'local/1/s'} <= set(last)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_local_loss_that_is_not_finite_names_its_block_and_stops_before_the_step(value):
    model = toy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    head = [*model.backbone.local.values()][1]
    loss = head.loss
    head.loss = lambda *args: {name: part * value for name, part in loss(*args).items()}
    with pytest.raises(NonFiniteLossError, match=f'local/2/loss = {value}'):
        step(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_under_a_loss_scaler_only_a_run_of_non_finite_steps_is_an_error(fresh_hub):
    log, hub = LocalLossLog(is_scaled=True), fresh_hub
    bad, good = ({'local/1/loss': torch.tensor(value)} for value in (float('inf'), 0.5))
    for _ in range(NON_FINITE_STEPS - 1):
        log.report(bad, hub)
    log.report(good, hub)
    for _ in range(NON_FINITE_STEPS - 1):
        log.report(bad, hub)
    with pytest.raises(NonFiniteLossError, match=rf'local/1/loss = inf.* {NON_FINITE_STEPS} steps in a row; lower'):
        log.report(bad, hub)


def test_half_precision_losses_are_logged_in_single_precision(fresh_hub):
    LocalLossLog(is_scaled=False).report({'local/1/loss': torch.tensor(1 / 3, dtype=torch.bfloat16)}, fresh_hub)
    assert fresh_hub.get_scalar('train/local/1/loss').current() == float(torch.tensor(1 / 3, dtype=torch.bfloat16))
