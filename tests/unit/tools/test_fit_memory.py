"""The words of the tool that fits a config into a GPU: what it takes, and one line for what it refuses."""

import sys

import pytest

from tools import fit_memory
from tools.fit_memory import parse_args, size

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

CONFIG = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'


def test_sizes():
    assert size('8GB') == 8_000_000_000
    assert size('1.5 MiB') == 1_572_864
    for wrong in ('8', '8TB', '1.2.3GB', '-1GB'):
        with pytest.raises(Exception, match='such as 8GB'):
            size(wrong)


def test_cuts():
    assert parse_args([CONFIG, '--choose', '2', '--cuts', 'stage', '--blocks', '3']).partition == 'stage'
    assert parse_args([CONFIG, '--choose', '2', '--cuts', 'layer2.0', 'layer3.1']).partition == ['layer2.0', 'layer3.1']
    assert parse_args([CONFIG, '--memory', '8GB']).partition is None


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], 'say what to look for: --memory, --max-overhead, --max-slowdown, --as-small-as-possible or --choose'),
        (['--memory', '8'], "argument --memory: '8': give a size such as 8GB"),
        (['--memory', '8GB', '--as-small-as-possible'], 'give one of them'),
        (['--max-overhead', 'nan'], '--max-overhead nan: give at least 0'),
        (['--device', 'a100', '--max-slowdown', '-0.1'], '--max-slowdown -0.1: give at least 0'),
        (['--max-slowdown', '0.1'], 'say which by --device'),
        (['--device', 'a100', '--max-overhead', '0.1'], 'give --max-slowdown'),
        (['--memory', '8GB', '--device', 'a10'], "argument --device: invalid choice: 'a10'"),
        (['--memory', '8GB', '--blocks', '1'], '--blocks 1 is end-to-end training'),
        (['--memory', '8GB', '--batch', '0'], "argument --batch: '0': give an integer of at least 1"),
        (['--memory', '8GB', '--cuts', 'a', 'b', '--blocks', '2'], '--blocks would be 3'),
        (
            ['--memory', '8GB', '--cuts', 'stage', 'layer2.3'],
            "--cuts stage layer2.3: give 'stage', 'uniform' or names of units",
        ),
        (['--memory', '8GB', '-o', 'none/child.py'], 'give the name of a .py file in a folder that exists'),
        (['--memory', '8GB', '-o', 'child.txt'], 'give the name of a .py file in a folder that exists'),
        (['--memory', '8GB', '-o', __file__], 'exists: choose another name'),
    ],
)
def test_words_are_checked(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_args([CONFIG, *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('config', 'text', 'message'),
    [
        ('none.py', None, 'no config at '),
        ('mmdet::retinanet/retinanet_r50_fpn_1x_cocoo.py', None, 'did you mean mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
        ('mmdet::nothing like it', None, 'mmdet has no config'),
        ('mmlib::a/b.py', None, "no installed library 'mmlib'"),
        ('a b::c::d', None, 'no installed library'),
        ('stock.py', 'x = 1 / 0', 'cannot be read as a config: ZeroDivisionError'),
        ('stock.py', 'model = None', 'has no model.backbone'),
        ('stock.py', "_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'\ntrain_dataloader = None", '--batch'),
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', None, 'ResNet is frozen completely (frozen_stages?)'),
        ('mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py', None, '--frozen-stages: the backbone of'),
        ('mmpretrain::hrnet/hrnet-w18_4xb32_in1k.py', None, 'HRNet cannot be cut into blocks: its branches'),
    ],
)
def test_configs_are_checked(config, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / config).write_text(text)
    words = ['--frozen-stages', '4'] if 'frozen' in message else []
    monkeypatch.setattr(sys, 'argv', ['fit_memory.py', config, '--memory', '8GB', '--no-dry-run', *words])
    with pytest.raises(SystemExit) as error:
        fit_memory.main()
    assert message in str(error.value) and '\n' not in str(error.value)
