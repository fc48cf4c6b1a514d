"""The scaling tool: from times, from measurements, from the paper's table, and against processes of this machine."""

import json

import pytest

from mmman import LocalLearningError
from mmman.experimental.scaling import BlockCost, StageProfile
from tests.conftest import ROOT
from tools.analysis_tools.simulate_scaling import main, parse_args, run

pytestmark = pytest.mark.whole_models

CONFIG = ROOT / 'configs' / 'paper' / 'resnet32_manpp_k16_cifar10.py'
SMALL = ('--shape', '32', '32', '--batch', '2', '--cfg-options', 'model.backbone.num_blocks=2')


def profile(blocks=4, seconds=0.1):
    part = BlockCost(0.3 * seconds, 0.1 * seconds, 0.6 * seconds, gradients=4e6, features=1e6, first_unit=1e5)
    return StageProfile(8, (part,) * blocks, (part,) * blocks)


def outcomes(tmp_path, *arguments, given=None):
    path = tmp_path / 'times.json'
    (given or profile()).save(path)
    return run(parse_args(['--times', str(path), *arguments]))


def test_a_table_of_systems_and_gpus(tmp_path, capsys):
    rows = outcomes(tmp_path, '--gpus', '2', '8', '16', '--bandwidth', '1000GB/s', '--latency', '0us')
    assert [row['gpus'] for row in rows] == [2] * 3 + [8] * 4 + [16] * 4
    pipelines = [row for row in rows if 'pipeline' in row['system']]
    assert [row['system'] for row in pipelines] == ['MAN++, pipeline 2x4', 'MAN++, pipeline 4x4']
    for row in rows:
        assert row['speed_up'] == pytest.approx(1, rel=0.01)  # equal work, next to no network
    assert 'No pipeline on 2 GPUs: 4 blocks need a multiple of 4' in capsys.readouterr().out


def test_links_between_machines_loading_and_flushes_count(tmp_path):
    def of(system, *arguments):
        rows = outcomes(tmp_path, '--gpus', '16', *arguments)
        return next(row for row in rows if system in row['system'])

    for system in ('E2E', 'stock', 'block-wise', 'pipeline'):
        fast = of(system)['iteration']
        assert of(system, '--inter-bandwidth', '10MB/s')['iteration'] > fast
        assert of(system, '--inter-latency', '5ms')['iteration'] > fast
        assert of(system, '--inter-bandwidth', '10MB/s', '--machine', '16')['iteration'] == fast
        assert of(system, '--loading', '2s')['iteration'] >= 2
    assert of('pipeline', '--iterations-per-flush', '3')['bubble'] == pytest.approx(3 / 6, rel=0.01)
    alternating = of('pipeline', '--staleness', '0')['iteration']
    assert alternating == pytest.approx(2 * of('pipeline')['iteration'], rel=0.02)


def test_rows_go_to_a_file(tmp_path, monkeypatch):
    profile().save(tmp_path / 'times.json')
    out = tmp_path / 'rows.json'
    arguments = ['simulate_scaling.py', '--times', str(tmp_path / 'times.json'), '--gpus', '4', '--out', str(out)]
    monkeypatch.setattr('sys.argv', arguments)
    main()
    assert {'system', 'gpus', 'iteration', 'images_per_second', 'bubble', 'link', 'speed_up'} == set(
        json.loads(out.read_text())[0]
    )


@pytest.mark.parametrize(
    'arguments, says',
    [
        (['--times', 'nowhere.json'], 'nowhere.json is not a profile'),
        (['--paper', '--bandwidth', '25'], "write bytes as '25GB/s'"),
        (['--paper', '--latency', 'quick'], 'with its unit'),
        (['--paper', '--machine', '0'], 'at least 1'),
    ],
)
def test_mistakes_end_the_program_with_a_line(arguments, says, monkeypatch):
    monkeypatch.setattr('sys.argv', ['simulate_scaling.py', *arguments])
    with pytest.raises(SystemExit, match=says) as caught:
        main()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('arguments', [['--measure'], ['nowhere.py', '--check'], []])
def test_what_is_missing_is_said(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert 'config' in capsys.readouterr().err or not arguments


def test_measuring_a_config(tmp_path):
    pytest.importorskip('mmpretrain')
    saved = tmp_path / 'times.json'
    arguments = [str(CONFIG), '--measure', *SMALL, '--iterations', '1', '--gpus', '2', '--save-times', str(saved)]
    rows = run(parse_args(arguments))
    given = StageProfile.load(saved)
    assert len(given.blocks) == 2 and given.batch == 2
    assert given.message(0) == given.blocks[0].features + given.labels
    one = next(row for row in rows if row['system'].startswith('E2E'))
    assert one['iteration'] >= sum(block.seconds for block in given.end_to_end)


def test_a_config_without_blocks_is_refused():
    pytest.importorskip('mmpretrain')
    with pytest.raises(LocalLearningError, match='num_blocks of at least 2'):
        run(parse_args([str(CONFIG), '--measure', '--shape', '32', '32', '--cfg-options', 'model.backbone.num_blocks=1']))


def test_the_check_runs():
    pytest.importorskip('mmpretrain')
    rows = run(parse_args([str(CONFIG), '--check', *SMALL, '--iterations', '1']))
    assert [row['processes'] for row in rows] == [1, 1, 2, 2, 2, 2, 2]
    assert all(row['predicted'] > 0 and row['measured'] > 0 for row in rows)
