"""The measuring tool: its words, its rows, and systems side by side."""

import json
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

from tests.conftest import ROOT
from tools.analysis_tools.measure_training import (
    in_order,
    main,
    median_and_quartiles,
    parse_args,
    read_configs,
    run,
    timed,
)

pytestmark = pytest.mark.whole_models

CONFIG = str(ROOT / 'configs' / 'paper' / 'resnet32_manpp_k16_cifar10.py')
K = 'model.backbone.num_blocks'
UNIFORM = 'model.backbone.partition=uniform'
TRANSFER = 'model.backbone.transfer'
SMALL = ['--shape', '32', '32', '--batch', '8']


def test_overrides_belong_to_the_config_in_front():
    first, second, third = read_configs([CONFIG, CONFIG, f'{K}=2', 'a.b=[1,2]', CONFIG])
    assert [one.options for one in (first, second, third)] == [{}, {K: 2, 'a.b': [1, 2]}, {}]
    assert second.name == 'resnet32_manpp_k16_cifar10 num_blocks=2 b=[1,2]' and first.name == Path(CONFIG).stem
    assert [one.name for one in read_configs([CONFIG, CONFIG], ['x', 'y'])] == ['x', 'y']


@pytest.mark.parametrize(
    'words, says',
    [
        ([f'{K}=2', CONFIG], 'there is none'),
        ([CONFIG, 'nowhere.py'], 'no config at nowhere.py; give the path of a file'),
        ([CONFIG, '--names', 'x', 'y'], '2 names for 1 configs'),
    ],
)
def test_mistakes_are_told(words, says, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert says in capsys.readouterr().err


def test_a_config_that_cannot_be_built_ends_the_program_with_a_line(monkeypatch):
    monkeypatch.setattr('sys.argv', ['measure_training.py', CONFIG, f'{K}=99', UNIFORM, *SMALL])
    with pytest.raises(SystemExit, match='PartitionError') as caught:
        main()
    assert '\n' not in str(caught.value)


def test_steps_are_timed_by_turns():
    taken = []

    class Meter:
        def __init__(self, name):
            self.name = name

        def seconds(self):
            taken.append(self.name)
            return len(taken)

    assert timed([Meter('a'), Meter('b')], 2) == [[1, 4], [2, 3]]
    assert taken == ['a', 'b', 'b', 'a']
    assert median_and_quartiles([1, 2, 3, 4, 5]) == [3, 2, 4] and median_and_quartiles([7]) == [7, 7, 7]


def test_order_of_parts():
    parts = ['rest', 'local head 2', 'block 10', 'neck, head, loss', 'block 2', 'input', 'parameters']
    assert in_order(parts) == ['parameters', 'input', 'block 2', 'block 10', 'local head 2', 'neck, head, loss', 'rest']


def test_side_by_side(tmp_path, capsys):
    out, picture = tmp_path / 'rows.json', tmp_path / 'memory.png'
    whole, local = [CONFIG, f'{K}=1', UNIFORM], [CONFIG, f'{K}=2', UNIFORM]
    systems = [
        whole,
        [*whole, 'optim_wrapper.dtype=bfloat16'],
        [*local, *(f'{TRANSFER}.{name}=False' for name in ('ema', 'bias', 'scale'))],
        [*local, f'{TRANSFER}.scale=False'],
        local,
    ]
    names = ['E2E', 'bf16', 'InfoPro', 'MAN', 'MAN++']
    words = [word for system in systems for word in system]
    rows = run(
        parse_args([*words, '--names', *names, *SMALL, '--iterations', '1', '--out', str(out), '--picture', str(picture)])
    )
    assert json.loads(out.read_text()) == rows and [row['config'] for row in rows] == names
    assert picture.read_bytes().startswith(b'\x89PNG')
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*names, 'operators', 'neck, head, loss'))
    whole, autocast, plain, man, manpp = rows
    for row in rows:
        assert sum(row['parts'].values()) == row['peak'] > row['floor'] > row['parameters']
        assert row['ratio'][0] == pytest.approx(row['seconds'][0] / whole['seconds'][0])
    # End to end the blocks are those of the first local config; the output of a convolution takes two bytes for four.
    assert autocast['parts']['block 1'] < 0.8 * whole['parts']['block 1'] and autocast['flops'] == whole['flops']
    assert whole['parts']['block 2'] > 0
    assert whole['operators'] < plain['operators'] < man['operators'] < manpp['operators']
    assert whole['flops'] < plain['flops'] < man['flops'] == manpp['flops']
    assert 'momentum copies' not in plain['parts'] and man['parts']['momentum copies'] > 0
    assert 0 <= manpp['parameters'] - man['parameters'] <= 4  # the scale


def test_sizes_only(capsys):
    words = [CONFIG, f'{K}=2', UNIFORM, *SMALL]
    ((with_data,), (without,)) = run(parse_args([*words, '--iterations', '0'])), run(parse_args([*words, '--sizes-only']))
    launches = [{part: work['launches'] for part, work in row.pop('gpu').items()} for row in (with_data, without)]
    read = without.pop('operators') - with_data.pop('operators')  # tolist is an operator for each number
    assert without == {**with_data, 'sizes_only': True}
    assert read == 1 and sum(launches[1].values()) - sum(launches[0].values()) == read
    assert all(0 <= launches[1][part] - own <= read for part, own in launches[0].items())


def test_the_time_on_a_gpu_is_predicted(capsys):
    words = [CONFIG, f'{K}=1', 'model.backbone.partition=stage', CONFIG, f'{K}=2', UNIFORM, *SMALL, '--names', 'E2E', 'local']
    rows = run(parse_args([*words, '--sizes-only', '--device', 'a100', 'rtx3090']))
    whole, local = (row['predicted']['a100'] for row in rows)
    assert 0 < whole['kernels'] < whole['step'] < local['step']
    assert rows[0]['predicted']['rtx3090']['kernels'] > whole['kernels']
    text = capsys.readouterr().out
    assert f'{1e3 * local["step"]:.1f} ms, {local["step"] / whole["step"]:.2f}' in text
    capsys.readouterr()


def test_the_focal_loss_of_a_gpu_holds_for_all_that_is_measured(tmp_path, capsys):
    pytest.importorskip('mmdet')
    out = tmp_path / 'rows.json'
    config = [str(ROOT / 'configs' / 'paper' / 'retinanet_r18_e2e.py'), 'model.backbone.base_channels=4']
    config += ['model.neck.in_channels=[4,8,16,32]', 'model.neck.out_channels=16']
    config += ['model.bbox_head.in_channels=16', 'model.bbox_head.feat_channels=16']
    words = [*config, '--shape', '128', '128', '--batch', '1', '--iterations', '0', '--out', str(out)]
    (python,), (fused,) = run(parse_args(words)), run(parse_args([*words, '--fused-focal-loss']))
    first, second = capsys.readouterr().out.split('parts of the peak')[:2]
    assert 'fused focal loss' not in first and 'fused focal loss' in second
    assert json.loads(out.read_text())[0]['fused_focal_loss'] and not python['fused_focal_loss']
    scores = 4 * 80 * 9 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1)
    for size in ('peak', 'floor', 'floor_at_once'):
        assert fused[size] < python[size] - 3 * scores
    assert fused['peak'] == sum(fused['parts'].values()) and fused['flops'] == python['flops']
