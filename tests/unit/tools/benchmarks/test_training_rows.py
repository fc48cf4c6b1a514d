"""The parts of the row runner that need no training: rows, budgets, schedules, curves, tables, what may be resumed."""

import json
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR

from tests.conftest import ROOT
from tools.benchmarks import accuracy
from training_rows import detection, segmentation
from training_rows.budget import Budget, scale_scheduler, spread
from training_rows.paper_rows import paper_rows
from training_rows.progress import closing_words
from training_rows.report import RowResults, collect, draw, markdown
from training_rows.rows import Row, check_equal_budgets, merge, store_config
from training_rows.runs import Run, curve_of, read_scalars, resume_from
from training_rows.task import Metric

METRICS = (Metric('top1', 'accuracy, %'),)
BUDGET = Budget(10, 'epochs', 2000, 1000, 64, 0.1)
CONFIG = {
    'model': {'backbone': {'type': 'ResNet', 'size': (32, 32)}},
    'train_cfg': {'max_epochs': 10},
    'optim_wrapper': {'optimizer': {'lr': 0.1}},
}


def make_row(folder, name='e2e', **changes):
    cfg = Config(CONFIG)
    cfg.merge_from_dict(changes)
    return Row(name, cfg, {}, BUDGET, 40, [20, 40], folder / name)


def results(name, *values, seconds=20.0, cost=None, paper=None, is_e2e=False):
    curve = [{'iteration': 40, 'top1': values[0]}]
    budget = BUDGET.__dict__ | {'options': []}
    runs = [{'top1': value, 'seconds': seconds, 'budget': budget, 'commit': 'abc', 'curve': curve} for value in values]
    return RowResults(name, runs, cost or {}, paper or {}, is_e2e)


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
    indices = spread(total, count)
    assert len(set(indices)) == count
    assert set(indices) <= set(range(total))
    per_class = [sum(index // 10 == label for index in indices) for label in range(5)]
    assert max(per_class) - min(per_class) <= 1


def test_cosine_ends_with_the_budget():
    own = {'type': 'CosineAnnealingLR', 'T_max': 400, 'by_epoch': True, 'begin': 0, 'end': 400}
    scaled = scale_scheduler(own, 400, 10, iterations=4)
    assert scaled == own | {'T_max': 10, 'end': 10}
    rates = learning_rates(10, 4, scaled)
    assert rates[::4] == pytest.approx([(1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)])


def test_the_shortest_warmup_ends_at_the_whole_rate():
    warmup = {'type': 'LinearLR', 'start_factor': 0.1, 'begin': 0, 'end': 10, 'convert_to_iter_based': True}
    scaled = scale_scheduler(warmup, 400, 2, iterations=10)
    assert learning_rates(2, 10, scaled)[:3] == pytest.approx([0.1, 1.0, 1.0])


def test_warmup_of_less_than_an_epoch():
    warmup = {'type': 'LinearLR', 'start_factor': 0.1, 'begin': 0, 'end': 5, 'convert_to_iter_based': True}
    cosine = {'type': 'CosineAnnealingLR', 'T_max': 95, 'begin': 5, 'end': 100, 'convert_to_iter_based': True}
    scaled = [scale_scheduler(scheduler, 100, 10, iterations=49) for scheduler in (warmup, cosine)]
    # half an epoch of 49 iterations; mmengine's own conversion would cut points off that are no whole epochs
    assert scaled[0] == {'type': 'LinearLR', 'start_factor': 0.1, 'begin': 0, 'end': 24, 'by_epoch': False}
    assert scaled[1] == {'type': 'CosineAnnealingLR', 'T_max': 490 - 24, 'begin': 24, 'end': 490, 'by_epoch': False}
    rates = learning_rates(10, 49, *scaled)
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize('iterations', [3, 40, 750])
def test_schedule_of_a_task_ends_at_its_length(iterations):
    rates = learning_rates(1, iterations, *detection.TASK.recipe.schedule(iterations))
    assert max(rates) == pytest.approx(1.0)
    assert (
        rates[-1] < 0.5
        and rates == sorted(rates[: min(50, iterations // 10)]) + sorted(rates[min(50, iterations // 10) :])[::-1]
    )


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
        scale_scheduler(scheduler, 100, 1, iterations=10)


def test_curve_of_an_interrupted_run():
    scalars = [
        {'loss': 2.0, 'step': 2, 'time': 0.5, 'data_time': 0.01},
        {'top1': 20.0, 'step': 2, 'time': 0.1, 'data_time': 0.05},
        {'loss': 1.9, 'step': 4, 'time': 9.0, 'data_time': 0.01},  # interrupted, and trained again
        {'loss': 1.7, 'step': 4, 'time': 0.5, 'data_time': 0.01},
        {'step': 4, 'time': 0.1, 'data_time': 0.05},  # nothing was found
    ]
    assert curve_of(scalars, METRICS) == [
        {'iteration': 2, 'loss': 2.0, 'top1': 20.0, 'seconds': 1.0, 'loading': 0.02},
        {'iteration': 4, 'loss': 1.7, 'top1': 0.0, 'seconds': 2.0, 'loading': 0.02},
    ]


def test_half_written_line_is_left_for_later(tmp_path):
    for attempt, text in (('20260101_000000', '{"step": 1}\n{"st'), ('20260102_000000', '{"step": 2}\n')):
        folder = tmp_path / attempt / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text(text)
    assert read_scalars(tmp_path) == [{'step': 1}, {'step': 2}]


@pytest.mark.parametrize(
    'checkpoints, validated, wanted',
    [
        ([], [], None),
        (['iter_10'], [], 'iter_10'),
        (['iter_10', 'iter_20'], [], 'iter_10'),  # the validation at 20 was interrupted
        (['iter_10', 'iter_20'], [20], 'iter_20'),
        (['iter_30', 'iter_40'], [20], 'iter_30'),
        (['epoch_4', 'epoch_5'], [], 'epoch_4'),  # 4 iterations an epoch
    ],
)
def test_no_validation_is_missed_on_resume(tmp_path, checkpoints, validated, wanted):
    run = Run(make_row(tmp_path), 0, METRICS)
    run.folder.mkdir(parents=True)
    for name in checkpoints:
        (run.folder / f'{name}.pth').touch()
    run.curve = [{'iteration': i, 'top1': 50.0} for i in validated]
    assert resume_from(run) == (run.folder / f'{wanted}.pth' if wanted else None)


def test_result_is_that_of_the_end(tmp_path):
    run = Run(make_row(tmp_path), 0, METRICS)
    folder = run.folder / '20260101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    lines = [{'step': i, 'loss': 1.0, 'time': 0.5, 'data_time': 0.0} for i in (20, 40)] + [{'step': 20, 'top1': 60.0}]
    for end, is_finished in (({'step': 40, 'top1': 55.0}, True), (None, False)):
        written = [*lines, *([end] if end else [])]
        (folder / 'scalars.json').write_text(''.join(f'{json.dumps(line)}\n' for line in written))
        run.read()
        assert run.finish() == is_finished
    found = json.loads(run.result.read_text())
    assert found['top1'] == 55.0 and found['seconds'] == 20.0 and found['budget']['length'] == 10


def test_table_has_mean_standard_error_and_cost():
    e2e = results('e2e', 80.0, cost={'peak_bytes': 2e8, 'flops_per_image': 1e9}, is_e2e=True)
    light = results('light', 79.0, 81.0, seconds=30.0, cost={'peak_bytes': 1e8, 'flops_per_image': 1.1e9})
    table = markdown([light, e2e], METRICS)
    assert '| light | 80.00 ± 1.00 (2) | 1.000 | 100.0 | -50.0% | +10.0% | 0.750 | 1.50 |' in table
    assert '| e2e | 80.00 (1) | 1.000 | 200.0 | +0.0% | +0.0% | 0.500 | 1.00 |' in table
    assert table.count(str(BUDGET)) == 2 and 'paper' not in table
    table = markdown([results('dgl', 80.0, paper={'value': '85.92', 'budget': '400 epochs, batch 1024'})], METRICS)
    assert '| 85.92 (400 epochs, batch 1024) |' in table


def test_curves_are_drawn(tmp_path):
    draw([results('e2e', 80.0), results('light', 79.0, 81.0)], METRICS[0], tmp_path / 'curves.png', 'title')
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_rows_without_results_are_left_out(tmp_path):
    for name in ('b', 'a', 'c'):
        row = make_row(tmp_path, name)
        store_config(row)
        if name != 'c':
            (row.folder / 'seed0').mkdir()
            (row.folder / 'seed0' / 'result.json').write_text('{}')
    found = collect(tmp_path, ['b'])
    assert [row.name for row in found] == ['b', 'a'] and all(row.is_e2e for row in found)


def test_config_of_a_folder_cannot_change(tmp_path, capsys):
    row = make_row(tmp_path)
    store_config(row)
    store_config(row)
    assert Config.fromfile(row.folder / 'config.py').to_dict() == row.cfg.to_dict()
    with pytest.raises(SystemExit, match='not what this command asks for'):
        store_config(make_row(tmp_path, **{'model.backbone.type': 'VGG'}))
    assert "+model = {'backbone': {'type': 'VGG'" in capsys.readouterr().out


def test_budgets_are_not_mixed(tmp_path):
    first, other = make_row(tmp_path), make_row(tmp_path, 'light', **{'train_cfg.max_epochs': 5})
    with pytest.raises(SystemExit, match=r'light has another budget than e2e: train_cfg\.max_epochs is 5, not 10'):
        check_equal_budgets([first, other])
    store_config(first)
    with pytest.raises(SystemExit, match=r'trainings of another budget: train_cfg\.max_epochs is 5, not 10'):
        store_config(other)
    store_config(make_row(tmp_path, 'man', **{'model.backbone.type': 'VGG'}))


def test_overrides_need_a_section():
    cfg = Config(CONFIG)
    merge(cfg, {'model.backbone.type': 'VGG'}, '--ablation a')
    assert cfg.model.backbone.type == 'VGG'
    with pytest.raises(SystemExit, match='--ablation a: the config has no modle; did you mean model'):
        merge(cfg, {'modle.backbone.type': 'VGG'}, '--ablation a')


def test_a_failed_run_shows_the_end_of_its_log(tmp_path):
    run = Run(make_row(tmp_path), 0, METRICS)
    run.folder.mkdir(parents=True)
    run.log.write_text('\n'.join(f'line {i}' for i in range(20)))
    run.state, run.process = 'failed', type('Process', (), {'returncode': 1})
    assert closing_words(run).splitlines()[0].startswith('e2e seed 0 failed with exit status 1')
    assert closing_words(run).splitlines()[1:] == [f'line {i}' for i in range(5, 20)]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--rows', 'lihgt'], 'there is no row or file lihgt; the nearest rows of detection are light,'),
        ([], '--rows: none given; detection knows e2e'),
        (['--rows', 'e2e', 'e2e'], 'several rows are called e2e'),
        (['--ablation', 'a', 'light'], 'give NAME ROW KEY=VALUE'),
        (['--ablation', 'a', 'lihgt', 'b=1'], 'there is no row or file lihgt'),
        (['--rows', 'e2e', '--data-root', '/nowhere'], '/nowhere has no annotations/instances_train.json'),
        (['--rows', 'e2e'], "--data-root: give the folder of detection's data"),
    ],
)
def test_misuse_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        accuracy.parse_args(['detection', *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--rows', 'cifar10_resnet32_k8_infpro'], 'the nearest rows of paper are table1/cifar10_resnet32_k8_infopro,'),
        ([], '--rows: none given; paper knows table1/cifar10_resnet32_e2e,'),
        (['--rows', 'table[17]/cifar10_*_k16_*'], 'several rows are called cifar10_resnet32_k16_dgl'),
        (['--write', 'table1/cifar10'], 'there is no row or file table1/cifar10;'),
        (['--write', 'table1/cifar10_resnet32_e2e', 'a.yml'], 'a.yml is not a .py file'),
        (['--write', 'table1/cifar10_resnet32_e2e', str(ROOT / 'setup.py')], 'setup.py exists; give another file'),
        (['--write', 'table1/cifar10_resnet32_e2e', 'a.py', 'b.py'], '--write takes a row and a file'),
        (['--write', 'table1/cifar10_resnet32_e2e', '/nowhere/a.py'], '--write: there is no folder /nowhere'),
        (['--list', '--rows', 'table1/*'], '--list and --write train nothing'),
    ],
)
def test_misuse_of_the_papers_rows_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        accuracy.parse_args(['paper', *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_papers_rows_are_those_of_its_task_alone(capsys):
    with pytest.raises(SystemExit):
        accuracy.parse_args(['detection', '--list'])
    assert '--list and --write are for the task paper' in capsys.readouterr().err


def test_rows_are_chosen_by_patterns():
    chosen = accuracy.read_rows(['table7/imagenet_*', 'table1/svhn_resnet32_e2e'], [], accuracy.TASKS['paper'])
    ends = ('k4_infopro', 'k4_ema', 'k4_man', 'k4_manpp')
    assert [request.name for request in chosen] == [*(f'imagenet_resnet101_{end}' for end in ends), 'svhn_resnet32_e2e']


def test_ablation_is_a_row_with_overrides():
    rows = accuracy.read_rows(['e2e'], [['m999', 'light', 'custom_hooks.0.momentum=0.999', 'a.b=[1,2]']], detection.TASK)
    assert [row.name for row in rows] == ['e2e', 'm999']
    assert rows[1].source == detection.TASK.rows['light']
    assert rows[1].ablation == {'custom_hooks.0.momentum': 0.999, 'a.b': [1, 2]}
    path = str(ROOT / 'configs/paper/retinanet_r18_e2e.py')
    assert accuracy.read_rows([path], [], detection.TASK)[0].name == 'retinanet_r18_e2e'


def test_rows_of_tasks_exist():
    for task in accuracy.TASKS.values():
        for config in (source.config for source in task.rows.values()):
            assert config in paper_rows() if isinstance(config, str) else config.is_file()
    assert len({*segmentation.CLASSES}) == 11
