"""The parts of the paper's row runner that need no training: schedules, subsets, curves, tables, what may be resumed."""

import math

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR

from tests.conftest import ROOT
from tools.benchmarks import paper_rows

BUDGET = {'epochs': 10, 'train_images': 2000, 'test_images': 1000, 'batch_size': 64, 'lr': None, 'images': None, 'options': []}


def result(row, seed=0, error=10.0, **budget):
    return {
        'row': row,
        'seed': seed,
        'error': error,
        'seconds': 60,
        'lr': 0.1,
        'budget': BUDGET | budget,
        'own': BUDGET | {'epochs': 400},
        'paper': {'error': 8.75},
        'curve': [],
    }


def learning_rates(epochs, iterations, *schedulers):
    """The learning rate of every iteration under scheduler configs, each of which steps by epoch or by iteration."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kinds = {'CosineAnnealingLR': CosineAnnealingLR, 'LinearLR': LinearLR}
    built = [kinds[config['type']](optimizer, **{key: config[key] for key in config if key != 'type'}) for config in schedulers]
    rates = []
    for i in range(epochs * iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in built:
            if not scheduler.by_epoch or (i + 1) % iterations == 0:
                scheduler.step()
    return rates


@pytest.mark.parametrize('total, count', [(50, 10), (50, 7), (50, 50), (50, 1)])
def test_subset_is_spread_over_the_dataset(total, count):
    indices = paper_rows.spread(total, count)
    assert len(set(indices)) == count
    assert set(indices) <= set(range(total))
    per_class = [sum(index // 10 == label for index in indices) for label in range(5)]
    assert max(per_class) - min(per_class) <= 1


def test_cosine_ends_with_the_budget():
    own = {'type': 'CosineAnnealingLR', 'T_max': 400, 'by_epoch': True, 'begin': 0, 'end': 400}
    scaled = paper_rows.scale_scheduler(own, 400, 10, iterations=4)
    assert scaled == own | {'T_max': 10, 'end': 10}
    rates = learning_rates(10, 4, scaled)
    assert rates[::4] == pytest.approx([(1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)])


def test_warmup_of_less_than_an_epoch():
    warmup = {'type': 'LinearLR', 'start_factor': 0.1, 'begin': 0, 'end': 5, 'convert_to_iter_based': True}
    cosine = {'type': 'CosineAnnealingLR', 'T_max': 95, 'begin': 5, 'end': 100, 'convert_to_iter_based': True}
    scaled = [paper_rows.scale_scheduler(scheduler, 100, 10, iterations=49) for scheduler in (warmup, cosine)]
    # half an epoch of 49 iterations; mmengine's own conversion would cut points off that are no whole epochs
    assert scaled[0] == {'type': 'LinearLR', 'start_factor': 0.1, 'begin': 0, 'end': 24, 'by_epoch': False}
    assert scaled[1] == {'type': 'CosineAnnealingLR', 'T_max': 490 - 24, 'begin': 24, 'end': 490, 'by_epoch': False}
    rates = learning_rates(10, 49, *scaled)
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 1e-4


def test_the_shortest_warmup_ends_at_the_whole_rate():
    warmup = {'type': 'LinearLR', 'start_factor': 0.1, 'begin': 0, 'end': 10, 'convert_to_iter_based': True}
    scaled = paper_rows.scale_scheduler(warmup, 400, 2, iterations=10)
    assert learning_rates(2, 10, scaled)[:3] == pytest.approx([0.1, 1.0, 1.0])


@pytest.mark.parametrize(
    'scheduler, message',
    [
        ({'type': 'ExponentialLR', 'gamma': 0.9}, 'cannot scale a ExponentialLR'),
        ({'type': 'LinearLR', 'by_epoch': False, 'end': 500}, 'counts iterations'),
        ({'type': 'CosineAnnealingLR', 'begin': 5, 'end': 100}, 'too few'),
    ],
)
def test_schedule_that_cannot_be_scaled(scheduler, message):
    with pytest.raises(SystemExit, match=message):
        paper_rows.scale_scheduler(scheduler, 100, 1, iterations=10)


def test_curve_of_an_interrupted_run():
    scalars = [
        {'loss': 2.0, 'epoch': 1, 'iter': 2, 'step': 2},
        {'accuracy/top1': 20.0, 'accuracy/top5': 60.0, 'step': 1},
        {'loss': 1.9, 'epoch': 2, 'iter': 3, 'step': 3},  # interrupted, and trained again
        {'loss': 1.7, 'epoch': 2, 'iter': 4, 'step': 4},
        {'accuracy/top1': 30.0, 'accuracy/top5': 70.0, 'step': 2},
        {'loss': 1.5, 'epoch': 3, 'iter': 5, 'step': 5},
    ]
    assert paper_rows.curve(scalars) == [
        {'epoch': 1, 'iteration': 2, 'loss': 2.0, 'error': 80.0, 'error_top5': 40.0},
        {'epoch': 2, 'iteration': 4, 'loss': 1.7, 'error': 70.0, 'error_top5': 30.0},
        {'epoch': 3, 'iteration': 5, 'loss': 1.5},
    ]


def test_half_written_line_is_left_for_later(tmp_path):
    for attempt, text in (('20260101_000000', '{"step": 1}\n{"st'), ('20260102_000000', '{"step": 2}\n')):
        folder = tmp_path / attempt / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text(text)
    assert paper_rows.read_scalars(tmp_path) == [{'step': 1}, {'step': 2}]


@pytest.mark.parametrize('last, wanted', [(None, None), (3, 3), (4, 4), (5, 4)])
def test_the_last_epoch_is_trained_again_for_its_test(tmp_path, last, wanted):
    for epoch in (3, 4, 5):
        (tmp_path / f'epoch_{epoch}.pth').touch()
    if last:
        (tmp_path / 'last_checkpoint').write_text(f'elsewhere/epoch_{last}.pth')
    assert paper_rows.resume_from(tmp_path, epochs=5) == (tmp_path / f'epoch_{wanted}.pth' if wanted else None)


def test_table_has_mean_and_deviation_beside_the_paper():
    table = paper_rows.markdown([result('dgl', 0, 20.0), result('dgl', 1, 22.0), result('e2e') | {'paper': {}}])
    assert "not the paper's budget" in table
    assert '| dgl | 8.75 | 400 epochs, batch 64 | 21.00 ± 1.41 (n=2) | 10 | 2000 | 64 | 0.1 | 60 |' in table
    assert '| e2e | - | 400 epochs, batch 64 | 10.00 (n=1) |' in table


def test_one_table_for_each_budget():
    table = paper_rows.markdown([result('dgl'), result('e2e', epochs=400), result('man'), result('ema', options=['a=1'])])
    parts = table.split('### ')[1:]
    assert [part.partition('\n')[0] for part in parts] == [
        "10 epochs, 2000 train and 1000 test images, batch 64: not the paper's budget",
        "400 epochs, 2000 train and 1000 test images, batch 64: the paper's budget",
        "10 epochs, 2000 train and 1000 test images, batch 64, a=1: not the paper's budget",
    ]
    assert ['| dgl' in part and '| man' in part for part in parts] == [True, False, False]


def test_image_files_go_through_the_rows_pipeline(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/paper/table1/cifar10_resnet32_e2e.py')
    pipeline = cfg.train_dataloader.dataset.pipeline
    paper_rows.use_images(cfg, tmp_path)
    assert cfg.train_dataloader.dataset.pipeline == [{'type': 'LoadImageFromFile'}, *pipeline]
    assert cfg.val_dataloader.dataset.data_prefix == str(tmp_path / 'val')
    assert cfg.data_preprocessor.to_rgb


def test_config_of_a_folder_cannot_change(tmp_path, capsys):
    cfg = Config({'model': {'depth': 32, 'size': (32, 32)}, 'indices': [*range(500)]})
    budget = paper_rows.Budget(1, 1, 1, 1)
    row = paper_rows.Row(cfg, {}, budget, budget, 1, tmp_path / 'row' / 'budget')
    paper_rows.store_config(row)
    paper_rows.store_config(row)
    assert Config.fromfile(row.folder / 'config.py').to_dict() == cfg.to_dict()
    cfg.model.depth = 20
    with pytest.raises(SystemExit, match='not what this command asks for'):
        paper_rows.store_config(row)
    assert "+model = {'depth': 20" in capsys.readouterr().out
