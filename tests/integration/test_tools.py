"""The measuring tools run as their documentation says, at the smallest size."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip('mmdet')


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_training_step_of_the_demo_configs(tmp_path):
    configs = [f'configs/demo/retinanet_r18_{kind}_shapes.py' for kind in ('e2e', 'manpp_k2')]
    out = tmp_path / 'rows.json'
    sizes = ('--shape', 64, 64, '--batch', 2, '--iterations', 1)
    table = run('tools/analysis_tools/measure_training.py', *configs, *sizes, '--out', out)
    end_to_end, local = json.loads(out.read_text())
    assert 'retinanet_r18_manpp_k2_shapes' in table
    for row in (end_to_end, local):
        assert row['parameters'] < row['floor'] < row['peak'] == sum(row['parts'].values())
    assert local['parameters'] > end_to_end['parameters'] and local['flops'] > end_to_end['flops']
