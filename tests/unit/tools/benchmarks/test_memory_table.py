"""The table of what the ways to train cost: its columns, its files, and one small model."""

import sys

import pytest

from mmman.planning.choice import AS_IT_IS, BY_CHUNK, LOCAL, SAME, WITH_CP
from mmman.runtime.stock_config import StockConfig
from tools.benchmarks import memory_table
from tools.benchmarks.memory_table import MIXED, MODELS, Cost, Entry, markdown


def cost(name, trains, peak, flops=1, operators=1):
    return Cost(name, trains, peak, flops, operators, '')


COSTS = (
    cost(AS_IT_IS, SAME, 1000, 100, 10),
    cost('recompute', SAME, 900),
    cost('recompute, 1 image a chunk', SAME, 700, 110, 15),
    cost('images in chunks', SAME, 0),
    cost(WITH_CP, SAME, 650, 105, 12),
    cost('1 image a chunk', BY_CHUNK, 720, 101, 14),
    cost(f'{MIXED} (float16)', 'not the same numbers', 0),
    cost('2 blocks, cut after layer2.1, recompute, 1 image a chunk', LOCAL, 500, 120, 20),
    cost('3 blocks, cut after layer1.0, layer2.1, 1 image a chunk', LOCAL, 400, 115, 30),
)
ENTRY = Entry('retinanet_r18', 2, 64, 96, COSTS, {AS_IT_IS: 800})


def test_a_column_is_the_smallest_row_of_its_kind():
    chosen = [None if one is None else one.peak for one in ENTRY.columns()]
    assert chosen == [1000, 650, 0, 700, 720, 400]


def test_the_table_is_relative_to_the_config_as_shipped():
    lines = markdown([ENTRY, Entry('vit-b', obstacle='it has no batch')]).splitlines()
    expected = [
        'retinanet_r18',
        '2 of 64x96',
        '0 MB, 0.00 T, 10',
        '-35% / +5% / 1.2x',
        '-',
        '-30% / +10% / 1.5x',
        '-28% / +1% / 1.4x',
        '-60% / +15% / 3.0x',
        'layer1.0, layer2.1',
    ]
    assert [cell.strip() for cell in lines[2].strip('|').split('|')] == expected
    assert 'it has no batch' in lines[3]
    assert lines[-1] == f'| retinanet_r18 | {AS_IT_IS} | +25.0% |'


def test_an_entry_is_read_as_it_was_written(tmp_path):
    ENTRY.write(tmp_path / 'folder' / 'one.json')
    assert Entry.read(tmp_path / 'folder' / 'one.json') == ENTRY


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['retinanet_r19'], "unknown models ['retinanet_r19']: see --list"),
        (['--batch', '0'], "--batch 0: give integers of at least 1, or 'stock'"),
        (['--batch', 'all'], "--batch all: give integers of at least 1, or 'stock'"),
        (['--shape', '0', '32'], '--shape 0 32: give pixels'),
        (['--max-overhead', '-1'], '--max-overhead -1.0: give at least 0'),
    ],
)
def test_bad_words_are_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['memory_table.py', *words])
    with pytest.raises(SystemExit):
        memory_table.main()
    assert message in capsys.readouterr().err


@pytest.mark.whole_models
@pytest.mark.parametrize('name', MODELS)
def test_every_config_exists(name):
    pytest.importorskip(MODELS[name].config.partition('::')[0])
    assert StockConfig.read(MODELS[name].config).cfg.model


@pytest.mark.whole_models
def test_a_model_is_predicted_measured_and_kept(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmpretrain')
    words = ['resnet50', '--batch', '2', '--shape', '64', '64', '--check', '--work-dir', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['memory_table.py', *words])
    memory_table.main()
    first = capsys.readouterr().out
    (path,) = tmp_path.glob('resnet50_*.json')
    entry, written = Entry.read(path), path.stat().st_mtime_ns
    stock, *_, local = entry.columns()
    assert (entry.batch, entry.height, entry.width) == (2, 64, 64) and local.trains == LOCAL
    assert {stock.name, local.name} == set(entry.measured)
    for one in (stock, local):
        assert abs(one.peak / entry.measured[one.name] - 1) < 0.03
    memory_table.main()
    assert capsys.readouterr().out == first == (tmp_path / 'table.md').read_text() + '\n'
    assert path.stat().st_mtime_ns == written


def test_a_model_that_failed_is_tried_again(tmp_path, monkeypatch, capsys):
    results = [Entry('resnet50', obstacle='out of memory'), Entry('resnet50', 2, 64, 96, COSTS)]
    monkeypatch.setattr(memory_table, 'predict', lambda *_: results.pop(0))
    monkeypatch.setattr(sys, 'argv', ['memory_table.py', 'resnet50', '--work-dir', str(tmp_path)])
    memory_table.main()
    assert 'out of memory' in capsys.readouterr().out
    for _ in range(2):
        memory_table.main()
        assert 'out of memory' not in capsys.readouterr().out
    assert not results
