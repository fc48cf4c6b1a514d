"""The child of a stock config: which local head it has, what it keeps, what is refused."""

import re

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmman import LocalLearningError
from mmman.analysis.dummy_model import build_dummy_model, scope_of
from mmman.planning.choice import Changes
from mmman.runtime.localized_child import ChildConfig, child_text, localize
from mmman.runtime.recipes import check_source
from mmman.runtime.stock_config import StockConfig

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


def child_of(config, num_blocks, cuts=None, folder=None, backbone=(), **options) -> ChildConfig:
    local = {'num_blocks': num_blocks} | ({'partition': cuts} if cuts else {})
    return localize(StockConfig.read(str(config)), Changes(dict(backbone), local), folder, **options)


def test_mixed_precision_and_hooks_are_kept(tmp_path):
    stock = "optim_wrapper = dict(type='AmpOptimWrapper')\ncustom_hooks = [dict(type='EMAHook', momentum=1e-4)]\n"
    choice = child_of(stock_file(tmp_path, stock), 3)  # the trial itself is in full precision, which a CPU needs
    wrapper = choice.cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.get('update')) == ('mmman.LocalLearningOptimWrapper', 'float16', None)
    assert 'kept: EMAHook' in reasons(choice)
    assert 'tested: a training step' in reasons(choice)
    path = tmp_path / 'child.py'
    path.write_text(choice.text)
    assert [hook.type for hook in Config.fromfile(path).custom_hooks] == ['EMAHook', 'mmman.EMABiasHook']
    own = child_of(stock_file(tmp_path, "optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')\n"), 3, dry_run=False)
    assert 'dtype' not in own.text and own.cfg.optim_wrapper['update'] == 'immediate'  # the dtype is inherited


def test_it_says_what_is_frozen_and_where_it_cuts(tmp_path):
    choice = child_of(stock_file(tmp_path, 'model = dict(backbone=dict(frozen_stages=1))\n'), 2, dry_run=False)
    assert 'blocks: frozen stem..layer1.1 | layer2.0..layer2.1 | layer3.0..layer4.1' in reasons(choice)
    assert 'kept: frozen_stages=1' in reasons(choice)
    named = child_of(stock_file(tmp_path, ''), 2, ['layer2.0'], dry_run=False)
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
    choice = child_of(stock_file(tmp_path, SMALL_DETECTOR, f"_base_ = 'mmdet::{base}'\n"), num_blocks)
    assert {type(local.bbox_head).__name__ for local in choice.backbone.local.values()} == {head}
    assert re.search(reason, reasons(choice))
    assert 'no gradient reaches' not in reasons(choice)
    assert 'tested: ' in reasons(choice)


def test_detectors_that_predict_masks_alone(tmp_path):
    small = SMALL_DETECTOR.replace('bbox_head', 'mask_head')
    choice = child_of(stock_file(tmp_path, small, "_base_ = 'mmdet::solo/solo_r50_fpn_1x_coco.py'\n"), 3)
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
        child_of(model('TwiceClassifier'), 2)
    with pytest.raises(LocalLearningError, match="fails in a first step, where the stock model does not .KeyError: 'local'"):
        child_of(model('StockOnlyClassifier'), 2)
    assert 'the whole model was not run, because the stock model also fails' in reasons(child_of(model('TextClassifier'), 2))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('model = None\n', 'has no model.backbone'),
        (
            "model = dict(_delete_=True, type='SoftTeacher', detector=dict(backbone=dict(type='ResNet')))\n",
            'give the config of the detector without the wrapper',
        ),
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
def test_what_cannot_be_localised_is_refused(tmp_path, text, message):
    with pytest.raises(LocalLearningError, match=message):
        source = StockConfig.read(stock_file(tmp_path, text))
        check_source(source)
        localize(source, Changes(local={'num_blocks': 2}))


def test_options_and_comments_of_a_child(tmp_path):
    """A child says in a comment above each option what it does."""
    stock = stock_file(tmp_path, '')
    choice = child_of(stock, 2, backbone={'frozen_stages': 1}, dry_run=False)
    assert 'backbone=dict(_base_.model.backbone, frozen_stages=1),' in choice.text
    assert choice.cfg.model.backbone.backbone.frozen_stages == 1
    assert 'kept: frozen_stages=1' in reasons(choice)
    for line in ('# a light bias', '# gradient-isolated blocks', '# a block takes its optimizer step'):
        assert line in choice.text
    light = choice.cfg.model.backbone
    assert (light.transfer.bias, light.local_head.type) == ('depthwise', 'mmman.DGLLocalHead')

    source = StockConfig.read(stock)
    changes = Changes({'with_cp': True}, {}, {'type': 'AmpOptimWrapper', 'dtype': 'bfloat16'})
    text = child_text(source, None, changes, batch=7, header=['as asked'])
    assert text.startswith('# as asked\n\n_base_ = ')
    path = tmp_path / 'child.py'
    path.write_text(text)
    cfg = Config.fromfile(path)
    assert (cfg.model.backbone.with_cp, cfg.model.backbone.type, cfg.train_dataloader.batch_size) == (True, 'ResNet', 7)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.optimizer.type) == ('AmpOptimWrapper', 'SGD')
    path.write_text(child_text(source, None, Changes(local={'num_blocks': 1, 'recompute': ['stem', 'layer1']})))
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.type == 'mmman.LocalBackbone' and 'type' not in cfg.optim_wrapper
    assert cfg.get('custom_hooks') is None


def test_a_child_of_a_child_keeps_its_local_heads(tmp_path):
    local = tmp_path / 'local.py'
    local.write_text(child_of(stock_file(tmp_path, ''), 2, dry_run=False).text)
    changes = Changes({'frozen_stages': 1}, {'num_blocks': 3, 'partition': ['layer2.0', 'layer3.1']})
    path = tmp_path / 'child.py'
    path.write_text(child_text(StockConfig.read(str(local)), tmp_path, changes))
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.local_head.type == 'mmman.DGLLocalHead' and cfg.model.backbone.num_blocks == 3
    assert (cfg.model.backbone.backbone.type, cfg.model.backbone.backbone.frozen_stages) == ('ResNet', 1)
    assert [hook.type for hook in cfg.custom_hooks] == ['mmman.EMABiasHook']


def test_a_child_of_a_file_moves_with_it(tmp_path, monkeypatch):
    """Also where names have spaces and signs, and where the config is named from another folder."""
    folder = tmp_path / "my configs+'x'"
    (folder / 'the children').mkdir(parents=True)
    (folder / 'stock a+b.py').write_text(RESNET)
    monkeypatch.chdir(folder / 'the children')
    choice = child_of('../stock a+b.py', 4, folder=folder / 'the children', dry_run=False)
    (folder / 'the children' / 'man pp.py').write_text(choice.text)
    monkeypatch.chdir(tmp_path)
    folder = folder.rename(tmp_path / 'moved')
    out = folder / 'the children' / 'man pp.py'
    assert out.read_text().startswith("_base_ = '../stock a+b.py'\n")
    assert Config.fromfile(out).model.backbone.num_blocks == 4


def test_a_folder_with_a_plus_in_its_name(tmp_path):
    """mmengine takes none for the first folder of ``library::``."""
    stock = 'mmdet::gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py'
    choice = child_of(stock, 2, folder=tmp_path, dry_run=False)
    assert str(tmp_path) not in choice.text and 'site-packages' not in choice.text  # it holds on any machine
    assert choice.cfg.model.backbone.backbone.conv_cfg.type == 'ConvWS'


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


def test_pure_python_configs(tmp_path):
    """They are inherited by an import alone, so the child is one too."""
    for folder in ('_base_', 'mine', 'odd-name', 'children'):
        (tmp_path / folder).mkdir()
    (tmp_path / '_base_' / 'resnet.py').write_text(PURE_PYTHON)
    for folder in ('mine', 'odd-name'):
        (tmp_path / folder / 'stock.py').write_text(PURE_PYTHON_CHILD)
    choice = child_of(tmp_path / 'mine' / 'stock.py', 3, folder=tmp_path / 'children', backbone={'frozen_stages': 1})
    assert 'tested: a training step' in reasons(choice)
    assert [hook.type for hook in choice.cfg.custom_hooks] == ['EMAHook', 'mmman.EMABiasHook']
    assert choice.cfg.model.backbone.backbone.frozen_stages == 1
    init_default_scope('mmpretrain')
    model = MODELS.build(choice.cfg.model)
    assert {head.num_classes for head in model.backbone.local.values()} == {7}

    source = StockConfig.read(str(tmp_path / 'mine' / 'stock.py'))
    changes = Changes({'with_cp': True}, {}, {'type': 'AmpOptimWrapper', 'dtype': 'bfloat16'})
    text = child_text(source, tmp_path / 'children', changes)
    assert "model['backbone'].update(" in text and 'optim_wrapper.update(' in text
    (tmp_path / 'children' / 'child.py').write_text(text)
    assert Config.fromfile(tmp_path / 'children' / 'child.py').model.backbone.with_cp

    stock = tmp_path / 'odd-name' / 'stock.py'
    with pytest.raises(LocalLearningError, match="'odd-name' in the path is not a Python name"):
        child_of(stock, 2, folder=tmp_path)
    with pytest.raises(LocalLearningError, match='set the path of the child .-o.'):
        child_of(stock, 2)
    child_of(stock, 2, folder=tmp_path / 'odd-name', dry_run=False)
    assert [*(tmp_path / 'odd-name').glob('localized_*')] == []


PURE_PYTHON_DETECTOR = """
from mmdet.models import FPN, DetDataPreprocessor, FocalLoss, L1Loss, ResNet, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler
from mmengine.model import PretrainedInit
from mmengine.optim import OptimWrapper
from torch.optim import SGD

default_scope = None
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(type=ResNet, depth=18, init_cfg=dict(type=PretrainedInit, checkpoint='none.pth')),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=32, start_level=1, add_extra_convs=True, num_outs=5),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=3,
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3, ratios=[1.0], strides=[8, 16, 32, 64, 128]
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
"""
PURE_PYTHON_SEGMENTOR = """
from mmengine.optim import OptimWrapper
from mmseg.models import CrossEntropyLoss, EncoderDecoder, FCNHead, ResNetV1c, SegDataPreProcessor
from torch.nn import SyncBatchNorm
from torch.optim import SGD

default_scope = None
model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(512, 512)),
    pretrained='none.pth',
    backbone=dict(type=ResNetV1c, depth=18, norm_cfg=dict(type=SyncBatchNorm)),
    decode_head=dict(
        type=FCNHead, in_channels=512, channels=16, num_classes=4, align_corners=False, loss_decode=dict(type=CrossEntropyLoss)
    ),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
"""


@pytest.mark.parametrize(
    ('text', 'library', 'head'),
    [(PURE_PYTHON_DETECTOR, 'mmdet', 'RetinaHead'), (PURE_PYTHON_SEGMENTOR, 'mmseg', 'FCNHead')],
)
def test_pure_python_configs_without_a_default_scope(text, library, head, tmp_path):
    """Classes stand for names, so stock ones set default_scope=None: what they leave to defaults is the library's own."""
    (tmp_path / 'stock.py').write_text(text)
    choice = child_of(tmp_path / 'stock.py', 2, folder=tmp_path)
    assert 'tested: a training step' in reasons(choice)
    assert {
        type(getattr(one, 'bbox_head', getattr(one, 'decode_head', None))).__name__ for one in choice.backbone.local.values()
    } == {head}
    assert scope_of(choice.cfg) == library
    (tmp_path / 'child.py').write_text(choice.text)
    cfg = Config.fromfile(tmp_path / 'child.py')
    model, _ = build_dummy_model(cfg, 64, 64)  # as the measuring tools do
    assert cfg.default_scope == library and len(model.backbone.local) == 1
