"""One block a process trains what one process trains: bitwise without momentum copies, and with them as stale as stated."""

import copy
from pathlib import Path

import pytest
import torch

from tests.parity.lockstep import ROWS
from tests.parity.pipeline_runs import last_checkpoint, run_alone, run_in_processes, toy_run, with_epochs

STALENESS = (0, 1, 3)
RECOMPUTE = {'recompute': ['layer1', 'layer2.0'], 'selective_recompute': ['layer2.1', 'layer3']}
WITHOUT_MOMENTUM = {'transfer': ROWS['local']}
CLIPPED = {'accumulative_counts': 2, 'clip_grad': {'max_norm': 0.1}}


def stale_hook(staleness, flush_every=10**9):
    return {'type': 'StaleEMAHook', 'momentum': 0.9, 'staleness': staleness, 'flush_every': flush_every}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """All runs of four processes at once: starting processes takes longer than training."""
    root = tmp_path_factory.mktemp('stages')
    replicas = {'num_blocks': 2, **WITHOUT_MOMENTUM}
    scaled = {'batch_size': 2, 'model': replicas, 'auto_scale_lr': {'enable': True, 'base_batch_size': 8}}
    ddp = with_epochs(toy_run(root / 'ddp', **scaled), epochs=1)
    for key in ('runner_type', 'pipeline'):
        ddp.pop(key, None)
    epochs = with_epochs(toy_run(root / 'epochs', staleness=2), epochs=3)
    resumed = copy.deepcopy(epochs)
    resumed.merge_from_dict({'work_dir': str(root / 'resumed'), 'resume': True, 'load_from': str(root / 'epochs/epoch_1.pth')})
    cfgs = {
        'local': (toy_run(root / 'local', model=WITHOUT_MOMENTUM), 4),
        **{f'stale{s}': (toy_run(root / f'stale{s}', staleness=s), 4) for s in STALENESS},
        'again': (toy_run(root / 'again', staleness=0, model=RECOMPUTE), 4),
        'clipped': (toy_run(root / 'clipped', wrapper=CLIPPED), 4),
        'epochs': (epochs, 4),
        'resumed': (resumed, 4),
        'replicas': (with_epochs(toy_run(root / 'replicas', **scaled), epochs=1), 4),
        'ddp': (ddp, 2),
    }
    run_in_processes([*cfgs.values()])
    return {name: last_checkpoint(cfg.work_dir) for name, (cfg, _) in cfgs.items()} | {'root': root}


def assert_same(ours, theirs):
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()
    for name, value in theirs['state_dict'].items():
        assert torch.equal(ours['state_dict'][name], value), name
    assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    assert ours['optimizer']['state'].keys() == theirs['optimizer']['state'].keys()
    for i, state in theirs['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(ours['optimizer']['state'][i][key], value), (i, key)
    assert ours['param_schedulers'] == theirs['param_schedulers']
    for key in ('iter', 'epoch', 'seed'):
        assert ours['meta'][key] == theirs['meta'][key]


def test_without_momentum_bitwise_one_process(runs, tmp_path):
    assert_same(runs['local'], run_alone(toy_run(tmp_path / 'alone', model=WITHOUT_MOMENTUM)))


def test_without_staleness_bitwise_one_process(runs, tmp_path):
    assert_same(runs['stale0'], run_alone(toy_run(tmp_path / 'alone')))


@pytest.mark.parametrize('staleness', STALENESS)
def test_copies_as_stale_as_stated(runs, staleness, tmp_path):
    assert_same(runs[f'stale{staleness}'], run_alone(toy_run(tmp_path / 'alone', hook=stale_hook(staleness, flush_every=6))))


def test_recompute_bitwise_without(runs):
    assert_same(runs['again'], runs['stale0'])


def test_accumulation_and_clipping(runs, tmp_path):
    alone = toy_run(tmp_path / 'alone', wrapper=CLIPPED, hook=stale_hook(1, flush_every=6))
    assert_same(runs['clipped'], run_alone(alone))


def test_epochs_with_validation_and_checkpoints(runs, tmp_path):
    alone = run_alone(with_epochs(toy_run(tmp_path / 'alone', hook=stale_hook(2, flush_every=6)), epochs=3))
    assert_same(runs['epochs'], alone)
    best = [torch.load(next(Path(path).glob('best_*.pth'))) for path in (tmp_path / 'alone', runs['root'] / 'epochs')]
    assert best[0]['meta']['epoch'] == best[1]['meta']['epoch']
    scores = [run['message_hub']['runtime_info']['best_score'] for run in (alone, runs['epochs'])]
    assert scores[0] == scores[1]


def test_resumed_bitwise_uninterrupted(runs):
    assert_same(runs['resumed'], runs['epochs'])


def test_replicas_bitwise_data_parallel(runs):
    assert_same(runs['replicas'], runs['ddp'])
    hubs = [runs[name]['message_hub'] for name in ('replicas', 'ddp')]
    assert hubs[0]['runtime_info']['best_score'] == hubs[1]['runtime_info']['best_score']
    rates = [hub['log_scalars']['train/lr'].current() for hub in hubs]
    assert rates[0] == rates[1] == pytest.approx(0.05)  # as for two processes: 0.1 is for 8 images, they take 2 each


def test_first_stage_logs_every_loss(runs):
    scalars = runs['epochs']['message_hub']['log_scalars']
    for name in ('loss', 'loss_ce', 'local/1/loss', 'local/2/loss', 'local/3/loss', 'local/3/s', 'lr', 'time'):
        history = scalars[f'train/{name}']._log_history
        assert len(history) == 18, name
