"""One block a process trains what one process trains: bitwise without momentum copies, and with them as stale as stated."""

import pytest
import torch

from tests.parity.lockstep import ROWS
from tests.parity.pipeline_runs import last_checkpoint, run_alone, run_in_stages, toy_run

STALENESS = (0, 1, 3)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """All runs of four processes at once: starting processes takes longer than training."""
    root = tmp_path_factory.mktemp('stages')
    cfgs = {
        'man': toy_run(root / 'local', model={'transfer': ROWS['local']}),
        **{f'stale{s}': toy_run(root / f'stale{s}', staleness=s) for s in STALENESS},
    }
    run_in_stages([cfg.to_dict() for cfg in cfgs.values()], 4)
    return {name: last_checkpoint(cfg.work_dir) for name, cfg in cfgs.items()}


def assert_same(ours, theirs):
    assert ours['state_dict'].keys() == theirs['state_dict'].keys()
    for name, value in theirs['state_dict'].items():
        assert torch.equal(ours['state_dict'][name], value), name
    assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    assert ours['optimizer']['state'].keys() == theirs['optimizer']['state'].keys()
    for i, state in theirs['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(ours['optimizer']['state'][i][key], value), (i, key)
    assert ours['meta']['iter'] == theirs['meta']['iter']
    assert ours['meta']['epoch'] == theirs['meta']['epoch']
    assert ours['param_schedulers'] == theirs['param_schedulers']


def test_without_momentum_bitwise_one_process(runs, tmp_path):
    assert_same(runs['man'], run_alone(toy_run(tmp_path / 'alone', model={'transfer': ROWS['local']})))


@pytest.mark.parametrize('staleness', STALENESS)
def test_copies_as_stale_as_stated(runs, staleness, tmp_path):
    hook = {'type': 'StaleEMAHook', 'momentum': 0.9, 'staleness': staleness, 'flush_every': 6}
    assert_same(runs[f'stale{staleness}'], run_alone(toy_run(tmp_path / 'alone', hook=hook)))
