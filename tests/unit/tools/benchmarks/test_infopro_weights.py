"""The table of InfoPro's loss weights."""

import sys

import pytest

from tools.benchmarks import infopro_weights
from training_rows.paper_rows import expand, paper_rows

pytest.importorskip('mmpretrain')


def test_every_local_head_is_in_the_table(monkeypatch, capsys):
    rows = [f'table1/cifar10_resnet32_{row}' for row in ('k16_infopro_manpp', 'e2e', 'k16_dgl', 'k8_infopro')]
    monkeypatch.setattr(sys, 'argv', ['infopro_weights.py', *rows])
    infopro_weights.main()
    lines = [line.strip('│').split('│') for line in capsys.readouterr().out.splitlines() if line.startswith('│')]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ['table1/cifar10_resnet32_k16_infopro_manpp', '1', '5', '0.5'],
        ['', '2 to 5', '4.643', '0.4643'],
        ['', '6 to 10', '4.286', '0.4286'],
        ['', '11 to 15', '3.929', '0.3929'],
        ['table1/cifar10_resnet32_k8_infopro', '1 to 2', '4.167', '0.4167'],
        ['', '3 to 5', '3.333', '0.3333'],
        ['', '6 to 7', '2.5', '0.25'],
    ]


def test_the_default_rows_are_those_with_infopros_head():
    types = {name: expand(name).model.backbone.get('local_head', {}).get('type') for name in paper_rows()}
    expected = [name for name, kind in types.items() if kind in ('mmman.InfoProLocalHead', 'mmman.SegLocalHead')]
    assert infopro_weights.default_rows() == expected


def test_an_unknown_row_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['infopro_weights.py', 'cifar10_resnet32_k8_infopro'])
    with pytest.raises(SystemExit):
        infopro_weights.main()
    assert 'the nearest rows are table1/cifar10_resnet32_k8_infopro' in capsys.readouterr().err
