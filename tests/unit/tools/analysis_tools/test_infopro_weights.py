"""The table of InfoPro's loss weights."""

import sys

import pytest

from tests.conftest import ROOT
from tools.analysis_tools import infopro_weights

pytest.importorskip('mmpretrain')
TABLE = ROOT / 'configs' / 'paper' / 'table1'


def test_every_local_head_is_in_the_table(monkeypatch, capsys):
    rows = [str(TABLE / f'cifar10_resnet32_{row}.py') for row in ('k16_infopro_manpp', 'e2e', 'k16_dgl', 'k8_infopro')]
    monkeypatch.setattr(sys, 'argv', ['infopro_weights.py', *rows])
    infopro_weights.main()
    lines = [line.strip('│').split('│') for line in capsys.readouterr().out.splitlines() if line.startswith('│')]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ['paper/table1/cifar10_resnet32_k16_infopro_manpp.py', '1', '5', '0.5'],
        ['', '2 to 5', '4.643', '0.4643'],
        ['', '6 to 10', '4.286', '0.4286'],
        ['', '11 to 15', '3.929', '0.3929'],
        ['paper/table1/cifar10_resnet32_k8_infopro.py', '1 to 2', '4.167', '0.4167'],
        ['', '3 to 5', '3.333', '0.3333'],
        ['', '6 to 7', '2.5', '0.25'],
    ]


def test_the_default_rows_are_those_with_infopros_head():
    """A row that has the head by its base, not by its name, would be left out."""

    def mentions(path):
        text = path.read_text()
        bases = [line.split("'")[1] for line in text.splitlines() if line.startswith("_base_ = '.")]
        return 'InfoPro' in text or 'SegLocalHead' in text or any(mentions(path.parent / base) for base in bases)

    assert infopro_weights.default_rows() == sorted(
        path for path in (ROOT / 'configs' / 'paper').rglob('*.py') if mentions(path)
    )
