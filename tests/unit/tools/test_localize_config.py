"""The tool that writes the child of a stock config: what it chooses, what it keeps, what it refuses."""

import re
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmman import LocalLearningError
from mmman.runtime.localized_child import localize
from tools import localize_config

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')
from mmpretrain.models import ImageClassifier

pytestmark = pytest.mark.whole_models

RESNET = "_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'\n"
SMALL_DETECTOR = """
model = dict(
    backbone=dict(depth=18, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3),
)
"""


def stock_file(tmp_path, text, base=RESNET):
    path = tmp_path / 'stock.py'
    path.write_text(base + text)
    return str(path)


def reasons(choice):
    return '\n'.join(choice.reasons)


def tool(capsys, monkeypatch, *args):
    """What the tool prints, and, if it refuses, its message."""
    monkeypatch.setattr(sys, 'argv', ['localize_config.py', *map(str, args)])
    try:
        localize_config.main()
    except SystemExit as error:
        assert '\n' not in str(error)
        return str(error)
    return ''.join(capsys.readouterr())


def test_mixed_precision_and_hooks_are_kept(tmp_path):
    stock = "optim_wrapper = dict(type='AmpOptimWrapper')\ncustom_hooks = [dict(type='EMAHook', momentum=1e-4)]\n"
    choice = localize(stock_file(tmp_path, stock), 3)  # the trial itself is in full precision, which a CPU needs
    assert "optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', dtype='float16')" in choice.text
    assert 'kept: EMAHook' in reasons(choice)
    assert 'tested: a training step' in reasons(choice)
    path = tmp_path / 'child.py'
    path.write_text(choice.text)
    assert [hook.type for hook in Config.fromfile(path).custom_hooks] == ['EMAHook', 'mmman.EMABiasHook']
    own = localize(stock_file(tmp_path, "optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')\n"), 3, dry_run=False)
    assert 'dtype' not in own.text  # inherited


def test_it_says_what_is_frozen_and_where_it_cuts(tmp_path):
    choice = localize(stock_file(tmp_path, 'model = dict(backbone=dict(frozen_stages=1))\n'), 2, dry_run=False)
    assert 'blocks: frozen stem..layer1.1 | layer2.0..layer2.1 | layer3.0..layer4.1' in reasons(choice)
    assert 'kept: frozen_stages=1' in reasons(choice)
    named = localize(stock_file(tmp_path, ''), 2, ['layer2.0'], dry_run=False)
    assert "partition=['layer2.0']" in named.text


@pytest.mark.parametrize(
    ('base', 'num_blocks', 'head', 'reason'),
    [
        ('reppoints/reppoints-moment_r50_fpn_1x_coco.py', 4, 'RetinaHead', "RetinaNet's, because RepPointsHead cannot be one"),
        ('vfnet/vfnet_r50_fpn_1x_coco.py', 4, 'RetinaHead', 'not chosen: VFNetHead .* of strides'),
        ('ld/ld_r18-gflv1-r101_fpn_1x_coco.py', 2, 'GFLHead', 'GFLHead replaces LDHead'),
        ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', 2, 'FCOSHead', 'FCOSHead replaces CondInstBboxHead'),
    ],
)
def test_a_dense_head_that_cannot_serve_is_replaced(base, num_blocks, head, reason, tmp_path):
    choice = localize(stock_file(tmp_path, SMALL_DETECTOR, f"_base_ = 'mmdet::{base}'\n"), num_blocks)
    assert {type(local.bbox_head).__name__ for local in choice.backbone.local.values()} == {head}
    assert re.search(reason, reasons(choice))
    assert 'no gradient reaches' not in reasons(choice)
    assert 'tested: ' in reasons(choice)


def test_detectors_that_predict_masks_alone(tmp_path):
    small = SMALL_DETECTOR.replace('bbox_head', 'mask_head')
    choice = localize(stock_file(tmp_path, small, "_base_ = 'mmdet::solo/solo_r50_fpn_1x_coco.py'\n"), 3)
    assert 'num_classes=_base_.model.mask_head.num_classes' in choice.text
    assert 'tested: a training step' in reasons(choice)


@MODELS.register_module()
class TwiceClassifier(ImageClassifier):
    """Its backbone runs twice a step, which local learning can't train."""

    def loss(self, inputs, data_samples):
        self.backbone(inputs)
        return super().loss(inputs, data_samples)


@MODELS.register_module()
class StockOnlyClassifier(ImageClassifier):
    """It trains with its own backbone alone."""

    def loss(self, inputs, data_samples):
        if hasattr(self.backbone, 'local'):
            raise KeyError('local')
        return super().loss(inputs, data_samples)


@MODELS.register_module()
class TextClassifier(ImageClassifier):
    """It takes more than images."""

    def loss(self, inputs, data_samples):
        return super().loss(inputs, [sample.text for sample in data_samples])


def test_what_does_not_train_is_not_written(tmp_path):
    """The local heads are fine, and the model dies in its first step with them; if it also does without, that says nothing."""

    def model(kind):
        return stock_file(tmp_path, f"model = dict(type='mmengine.{kind}')\n")

    with pytest.raises(LocalLearningError, match='was reached twice in one step'):
        localize(model('TwiceClassifier'), 2)
    with pytest.raises(LocalLearningError, match="fails in a first step, where the stock model does not .KeyError: 'local'"):
        localize(model('StockOnlyClassifier'), 2)
    assert 'the whole model was not run, because the stock model also fails' in reasons(localize(model('TextClassifier'), 2))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = None\n', 'has no model.backbone'),
        (
            "model = dict(_delete_=True, type='SoftTeacher', detector=dict(backbone=dict(type='ResNet')))\n",
            'give the config of the detector without the wrapper',
        ),
        ("model = dict(backbone=dict(type='mmman.LocalBackbone'))\n", 'is already localised'),
        ("model = dict(head=dict(_delete_=True, type='ContrastiveHead'))\n", 'ContrastiveHead cannot be a local'),
        ('optim_wrapper = dict(_delete_=True)\n', 'no optim_wrapper with an optimizer'),
        ("optim_wrapper = dict(type='ApexOptimWrapper')\n", 'ApexOptimWrapper cannot be replaced'),
        ("model = dict(backbone=dict(_delete_=True, type='HRNet', arch='w18'))\n", 'HRNet cannot be cut'),
        ("model = dict(backbone=dict(norm_cfg=dict(type='BN', eps=0)))\n", 'ResNet cannot be cut .* failed on .*eps'),
        ('model = dict(backbone=dict(frozen_stages=4))\n', 'ResNet is frozen completely .*freeze fewer stages'),
        ('x = 1 / 0\n', 'stock.py cannot be read as a config: ZeroDivisionError'),
        ('model = dict(backbone=\n', 'stock.py cannot be read as a config: '),
    ],
)
def test_what_cannot_be_localised_is_refused(tmp_path, text, message, capsys, monkeypatch):
    assert re.search(message, tool(capsys, monkeypatch, stock_file(tmp_path, text), '-k', 2))


def test_names_are_checked(tmp_path, capsys, monkeypatch):
    stock = stock_file(tmp_path, '')
    existing = tmp_path / 'there.py'
    existing.touch()
    cases = {
        (stock, '-k', 99): 'num_blocks=99',
        (tmp_path / 'none.py',): 'no config at ',
        (tmp_path,): 'no config at ',
        ('mmdet::retinanet/retinanet_r50_fpn_1x_cocoo.py',): 'did you mean mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        ('mmdet::nothing like it',): 'mmdet has no config',
        ('mmlib::a/b.py',): "no installed library 'mmlib'",
        ('a b::c::d',): 'no installed library',
        (stock, '-o', existing): 'exists; choose another name',
        (stock, '-o', tmp_path / 'child.txt'): 'give the name of a .py file in a folder that exists',
        (stock, '-o', tmp_path / 'none' / 'child.py'): 'give the name of a .py file in a folder that exists',
    }
    for args, message in cases.items():
        assert message in tool(capsys, monkeypatch, *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['stock.py', 'there.py']


def test_a_child_of_a_file_moves_with_it(tmp_path, capsys, monkeypatch):
    """Also where names have spaces and signs, and where the command is given in another folder."""
    folder = tmp_path / "my configs+'x'"
    (folder / 'the children').mkdir(parents=True)
    (folder / 'stock a+b.py').write_text(RESNET)
    monkeypatch.chdir(folder / 'the children')
    args = ['../stock a+b.py', '-k', 4, '--no-dry-run', '-o', 'man pp.py']
    assert 'blocks: stem..layer1.1 | layer2.0' in tool(capsys, monkeypatch, *args)
    monkeypatch.chdir(tmp_path)
    folder = folder.rename(tmp_path / 'moved')
    out = folder / 'the children' / 'man pp.py'
    assert out.read_text().startswith("_base_ = '../stock a+b.py'\n")
    assert Config.fromfile(out).model.backbone.num_blocks == 4


def test_a_folder_with_a_plus_in_its_name(tmp_path, capsys, monkeypatch):
    """mmengine takes none for the first folder of ``library::``."""
    out = tmp_path / 'child.py'
    stock = 'mmdet::gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py'
    assert 'is written' in tool(capsys, monkeypatch, stock, '-k', 2, '--no-trial', '-o', out)
    assert str(tmp_path) not in out.read_text() and 'site-packages' not in out.read_text()  # it holds on any machine
    assert Config.fromfile(out).model.backbone.backbone.conv_cfg.type == 'ConvWS'


PURE_PYTHON = """
from mmengine.optim import OptimWrapper
from mmpretrain.models import CrossEntropyLoss, GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet
from torch.optim import SGD

model = dict(
    type=ImageClassifier,
    backbone=dict(type=ResNet, depth=18),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=10, in_channels=512, loss=dict(type=CrossEntropyLoss)),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
"""
PURE_PYTHON_CHILD = """
from mmengine.config import read_base

with read_base():
    from .._base_.resnet import *

model.head.num_classes = 7
custom_hooks = [dict(type='EMAHook')]
"""


def test_pure_python_configs(tmp_path, capsys, monkeypatch):
    """They are inherited by an import alone, so the child is one too."""
    for folder in ('_base_', 'mine', 'odd-name', 'children'):
        (tmp_path / folder).mkdir()
    (tmp_path / '_base_' / 'resnet.py').write_text(PURE_PYTHON)
    for folder in ('mine', 'odd-name'):
        (tmp_path / folder / 'stock.py').write_text(PURE_PYTHON_CHILD)
    out = tmp_path / 'children' / 'manpp.py'
    assert 'tested: a training step' in tool(capsys, monkeypatch, tmp_path / 'mine' / 'stock.py', '-k', 3, '-o', out)
    cfg = Config.fromfile(out)
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'mmman.EMABiasHook']
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    assert {head.num_classes for head in model.backbone.local.values()} == {7}

    stock = tmp_path / 'odd-name' / 'stock.py'
    assert "'odd-name' in the path is not a Python name" in tool(capsys, monkeypatch, stock, '-o', tmp_path / 'child.py')
    assert 'set the path of the child (-o)' in tool(capsys, monkeypatch, stock)
    beside = tmp_path / 'odd-name' / 'child.py'
    assert 'is written' in tool(capsys, monkeypatch, stock, '--no-dry-run', '-o', beside)
    assert [*(tmp_path / 'odd-name').glob('localized_*')] == []
