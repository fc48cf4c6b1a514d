"""The inspection of a run against its checkpoint and a step computed here."""

import json

import pytest
import torch

from mmman.errors import ConfigError
from tests.trained import ORDER, ToyImages
from tools.analysis_tools.inspect_blocks import parse_args, run


def blocks(*words):
    return run(parse_args([*map(str, words)]))['blocks']


def test_scales_and_distances_are_those_of_the_checkpoint(manpp, tmp_path):
    rows = blocks(manpp, '--out', tmp_path / 'out.json')
    state = torch.load(manpp / 'iter_4.pth')['state_dict']
    prefix = 'backbone.local.stem.transfer.'
    assert [row['units'] for row in rows] == ['stem', 'layer1.0..layer1.1', 'layer2.0..layer2.1', 'layer3.0..layer3.1']
    assert rows[0]['s'] == pytest.approx(1 + float(state[f'{prefix}delta']))
    names = [name.removeprefix(f'{prefix}momentum.') for name in state if name.startswith(f'{prefix}momentum.')]
    names = [name for name in names if 'running' not in name and 'num_batches' not in name]
    ours = torch.cat([state[f'{prefix}momentum.{name}'].flatten() for name in names])
    theirs = torch.cat([state[f'backbone.layer1.0.{name}'].flatten() for name in names])
    assert rows[0]['distance'] == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-5)
    assert (rows[-1]['s'], rows[-1]['distance']) == (None, None)
    assert json.loads((tmp_path / 'out.json').read_text())['blocks'] == rows


def test_losses_gradients_and_dead_channels_are_the_last_ones_of_the_log(manpp):
    last = json.loads(next(manpp.rglob('scalars.json')).read_text().splitlines()[1])
    rows = blocks(manpp)
    assert [row['loss'] for row in rows] == [*(last[f'local/{j}/loss'] for j in (1, 2, 3)), last['loss']]
    for name in ('gradient', 'dead'):
        assert [row[name] for row in rows] == [last[f'local/{j}/{name}'] for j in (1, 2, 3, 4)]
    assert [row['distance'] for row in rows[:3]] == pytest.approx([last[f'local/{j}/distance'] for j in (1, 2, 3)], rel=1e-5)


def test_norms_before_clipping_stand_in_for_a_missing_inspector(manpp, tmp_path, capsys):
    lines = {'local/1/grad_norm': 2.0, 'local/2/grad_norm': 3.0, 'grad_norm': 4.0, 'loss': 5.0, 'iter': 2, 'step': 2}
    for path in (next(manpp.glob('*.py')), manpp / 'iter_4.pth'):
        (tmp_path / path.name).symlink_to(path)
    assert [row['loss'] for row in blocks(tmp_path)] == [None] * 4
    assert 'measure them with --images' in capsys.readouterr().out
    (tmp_path / '1' / 'vis_data').mkdir(parents=True)
    (tmp_path / '1' / 'vis_data' / 'scalars.json').write_text(json.dumps(lines))
    rows = blocks(tmp_path)
    assert [row['gradient'] for row in rows] == [2, 3, None, 4] and rows[3]['loss'] == 5


def test_a_step_on_training_images(manpp):
    """The last block's loss and the first block's dead channels, computed from the stock model in training mode."""
    rows = blocks(manpp / 'iter_4.pth', '--images', 6)
    from mmman.runtime.trained_model import TrainedModel

    model = TrainedModel.load(manpp).model
    model.train()
    data, drawn = ToyImages(), ORDER[:6]
    loss = model(data.images[drawn], data.labels[drawn], mode='loss')['loss_ce']
    assert rows[3]['loss'] == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, [*model.head.parameters(), *model.backbone.layer3.parameters()])
    assert rows[3]['gradient'] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-4)
    assert all(row['loss'] > 0 and row['gradient'] > 0 and 0 <= row['dead'] < 1 for row in rows)


def test_a_model_without_local_heads_is_refused(e2e):
    with pytest.raises(ConfigError, match='one block'):
        blocks(e2e)
