"""The rows of the paper: every row expands to the config that was recorded, and is written as a file that reads back."""

import sys

import pytest
from mmengine.config import Config

from tests.configs import digest, recorded, versions
from tools.benchmarks import accuracy
from tools.benchmarks.training_rows.paper_rows import expand, paper_rows

for library in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(library)

WRITTEN = (
    'table1/cifar10_resnet110_k32_infopro_man',
    'table2/vgg13_k10_dgl',
    'table4/retinanet_r18_manpp_k4_scratch',
    'table5/deeplabv3plus_r101_k2_infopro_manpp_pretrained',
    'release/retinanet_r50_manpp_k4_scratch',
)


def test_every_row_is_what_was_recorded():
    with_versions, hashes = recorded()
    if versions() != with_versions:
        pytest.skip(f'recorded with {with_versions}, not {versions()}')
    assert {name: digest(expand(name)) for name in paper_rows()} == hashes


def test_a_changed_config_has_another_hash():
    cfg = expand('table1/cifar10_resnet110_k32_infopro_man')
    before = digest(cfg)
    cfg.model.backbone.local_head.lambda_rec = [*cfg.model.backbone.local_head.lambda_rec]
    assert digest(cfg) != before
    assert digest(expand('table1/cifar10_resnet110_k32_infopro_man')) == before


def run(arguments, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['accuracy.py', 'paper', *arguments])
    accuracy.main()


@pytest.mark.parametrize('name', WRITTEN)
def test_a_written_row_reads_back(name, tmp_path, monkeypatch):
    file = tmp_path / 'row.py'
    run(['--write', name, str(file)], monkeypatch)
    assert '_base_ =' not in file.read_text()
    assert digest(Config.fromfile(file)) == digest(expand(name))


def test_a_row_is_written_to_its_name_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(['--write', 'table1/svhn_resnet32_e2e'], monkeypatch)
    first = (tmp_path / 'svhn_resnet32_e2e.py').read_text().splitlines()[0]
    assert first == '# table1/svhn_resnet32_e2e of configs/paper/rows.py. Table I of the paper: error 2.99.'


def test_the_list_has_every_row(monkeypatch, capsys):
    run(['--list'], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if '/' in line] == [*paper_rows()]
    assert {'Table I', 'Table VII a', "The authors' code"} < {*lines}
