"""The console line of an iteration: one number a block, while the backends get every value."""

import json

import pytest
import torch
from mmengine.runner import Runner

from tests.toy import toy_batches
from tests.unit.local.test_session import toy

pytestmark = pytest.mark.usefixtures('fresh_hub')


def train(folder, num_blocks, with_hierarchy=False):
    """Train for two iterations; returns the console lines and what the backend got."""
    runner = Runner(
        toy(num_blocks=num_blocks),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(toy_batches(2), collate_fn=lambda batch: batch[0]),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=9),
        optim_wrapper=dict(type='mmman.LocalLearningOptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='mmman.EMABiasHook')],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=None),
        log_processor=dict(type='mmman.LocalLogProcessor', by_epoch=False, window_size=1, log_with_hierarchy=with_hierarchy),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        experiment_name=folder.name,
    )
    runner.train()
    text = next(folder.rglob('*.log')).read_text().splitlines()
    scalars = next(folder.rglob('scalars.json')).read_text().splitlines()
    return [line for line in text if 'Iter(train)' in line], [json.loads(line) for line in scalars]


@pytest.mark.parametrize('with_hierarchy', [False, True])
def test_one_number_a_block(with_hierarchy, tmp_path):
    text, scalars = train(tmp_path, 3, with_hierarchy)
    prefix = 'train/' if with_hierarchy else ''
    for line, values in zip(text, scalars, strict=True):
        sums = [values[f'{prefix}local/{block}/loss'] for block in (1, 2)]
        assert line.endswith(f'  local losses: {sums[0]:.4f} {sums[1]:.4f}')
        assert 'local/' not in line and '  loss: ' in line and '  loss_ce: ' in line and '  time: ' in line
        assert {f'{prefix}local/2/{name}' for name in ('loss', 'loss_ce', 'acc', 's')} <= values.keys()


def test_without_local_heads_the_line_is_the_stock_one(tmp_path):
    text, _ = train(tmp_path, 1)
    assert len(text) == 2 and 'local losses' not in ''.join(text) and '  loss: ' in text[0]
