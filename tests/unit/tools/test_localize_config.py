"""The tool that writes the child of a stock config: what it chooses, what it keeps, what it refuses."""

import subprocess
import sys

import pytest
from mmengine.config import Config

from mmman import LocalLearningError
from tests.conftest import ROOT
from tools.localize_config import localize

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

RESNET = "_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'\n"


def stock_file(tmp_path, text):
    path = tmp_path / 'stock.py'
    path.write_text(RESNET + text)
    return str(path)


def reasons(choice):
    return '\n'.join(choice.reasons)


def test_mixed_precision_and_hooks_are_kept(tmp_path):
    stock = "optim_wrapper = dict(type='AmpOptimWrapper')\ncustom_hooks = [dict(type='EMAHook', momentum=1e-4)]\n"
    choice = localize(stock_file(tmp_path, stock), 3)
    assert "optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', dtype='float16')" in choice.text
    assert 'kept: EMAHook' in reasons(choice)
    path = tmp_path / 'child.py'
    path.write_text(choice.text)
    assert [hook.type for hook in Config.fromfile(path).custom_hooks] == ['EMAHook', 'mmman.EMABiasHook']
    own = localize(stock_file(tmp_path, "optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')\n"), 3)
    assert 'dtype' not in own.text  # inherited


def test_it_says_what_is_frozen_and_where_it_cuts(tmp_path):
    choice = localize(stock_file(tmp_path, 'model = dict(backbone=dict(frozen_stages=1))\n'), 2)
    assert 'blocks: frozen stem..layer1.1 | layer2.0..layer2.1 | layer3.0..layer4.1' in reasons(choice)
    assert 'kept: frozen_stages=1' in reasons(choice)
    named = localize(stock_file(tmp_path, ''), 2, ['layer2.0'])
    assert "partition=['layer2.0']" in named.text


def test_a_dense_head_that_cannot_serve_is_replaced():
    choice = localize('mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco.py', 4)
    assert 'num_classes=_base_.model.bbox_head.num_classes' in choice.text
    assert "RetinaNet's, because RepPointsHead" in reasons(choice)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = None\n', 'has no model.backbone'),
        ("model = dict(backbone=dict(type='mmman.LocalBackbone'))\n", 'is localised already'),
        ("optim_wrapper = dict(type='ApexOptimWrapper')\n", 'ApexOptimWrapper cannot be replaced'),
        ("model = dict(backbone=dict(_delete_=True, type='HRNet', arch='w18'))\n", 'HRNet cannot be cut'),
    ],
)
def test_what_cannot_be_localised_is_refused(tmp_path, text, message):
    with pytest.raises(LocalLearningError, match=message):
        localize(stock_file(tmp_path, text), 2)
    with pytest.raises(LocalLearningError, match='num_blocks=99'):
        localize(stock_file(tmp_path, ''), 99)


def test_a_child_of_a_file_moves_with_it(tmp_path):
    stock = stock_file(tmp_path, '')
    (tmp_path / 'children').mkdir()
    out = tmp_path / 'children' / 'manpp.py'
    command = [sys.executable, str(ROOT / 'tools/localize_config.py'), stock, '-k', '4', '-o', str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'blocks: stem..layer1.1 | layer2.0' in done.stderr
    assert out.read_text().startswith("_base_ = '../stock.py'\n")
    assert Config.fromfile(out).model.backbone.num_blocks == 4
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode != 0
    assert 'exists' in again.stderr
