"""The tool that fits a config into a GPU: predictions, the choice, and a step of what it writes."""

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmman import LocalLearningError
from mmman.analysis.dummy_model import random_batch
from mmman.engine.config_check import check_config
from mmman.planning.choice import BY_CHUNK, END_TO_END, LOCAL, SAME, Limits, choose_row
from mmman.planning.chunk_support import chunk_support
from tests.conftest import ROOT
from tools.fit_memory import parse_args, run

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.whole_models

CIFAR = str(ROOT / 'configs' / 'paper' / 'resnet32_manpp_k16_cifar10.py')
RETINANET = """
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
model = dict(
    backbone=dict(init_cfg=None, base_channels=16), neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3),
)
"""
MASK_RCNN = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(init_cfg=None, depth=18),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32), bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=3),
        mask_roi_extractor=dict(out_channels=32), mask_head=dict(in_channels=32, conv_out_channels=32, num_classes=3)),
)
"""
RESNET = """
_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
model = dict(backbone=dict(base_channels=8), head=dict(in_channels=64))
"""


def fit(*words):
    return run(parse_args([*map(str, words)]))


def off(text):
    """The largest difference between predicted and measured peaks that the tool printed, in per cent."""
    return max(abs(float(part.partition('%')[0])) for part in text.split('the prediction is ')[1:])


def stepped(path, height, width):
    """Build the model as the stock runner does, and take a training step of two images."""
    cfg = Config.fromfile(path)
    check_config(cfg)
    init_default_scope(cfg.default_scope)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = model.train_step(random_batch(model, cfg.default_scope, 2, height, width), wrapper)
    assert losses['loss'].isfinite()
    return model, cfg


def test_a_small_retinanet(tmp_path, capsys):
    stock, out = tmp_path / 'stock.py', tmp_path / 'child.py'
    stock.write_text(RETINANET)
    words = [stock, '--as-small-as-possible', '--shape', 160, 224, '--blocks', 2, '--frozen-stages', 0]
    rows, chosen = fit(*words, '--choose', 11, '--check', 'all', '-o', out)
    text = capsys.readouterr().out
    assert [row.trains for row in rows] == [SAME] * 8 + ['not the same numbers', LOCAL, LOCAL]
    assert rows[9].name.startswith('2 blocks, all outputs in the last, cut after layer2.0')
    names = [row.name for row in rows[1:8]]
    assert {'1 image a chunk', 'recompute', 'recompute, 1 image a chunk', "the stock backbone's with_cp"} <= {*names}
    assert [row.flops for row in rows[:8]] == sorted(row.flops for row in rows[:8])
    together = rows[names.index('all images in one chunk') + 1]
    assert together.operators < 0.7 * rows[0].operators and together.peak.total <= rows[0].peak.total
    assert together.changes.optim_wrapper['images_per_chunk'] == 2
    assert chosen is rows[-1] and f'mmman train {out}' in text
    assert off(text) < 3
    model, cfg = stepped(out, 160, 224)
    assert len(model.backbone.local) == 1 and cfg.optim_wrapper.images_per_chunk == 1
    assert cfg.model.backbone.backbone.frozen_stages == 0 and cfg.train_dataloader.batch_size == 2


@pytest.mark.parametrize(
    ('text', 'trains', 'obstacle'),
    [
        (RETINANET, SAME, ''),
        (MASK_RCNN, BY_CHUNK, ''),
        (f'{RETINANET}model["neck"]["norm_cfg"] = dict(type="BN")', SAME, 'RetinaNet has BatchNorm in training mode behind'),
    ],
)
def test_how_chunks_train(tmp_path, text, trains, obstacle):
    path = tmp_path / 'stock.py'
    path.write_text(text)
    cfg = Config.fromfile(path)
    local_head = {'type': 'mmman.DetLocalHead', 'num_classes': 3}
    cfg.model.backbone = {'type': 'mmman.LocalBackbone', 'backbone': cfg.model.backbone, 'local_head': local_head}
    found = chunk_support(cfg, 64, 64)
    assert found.trains == trains and found.obstacle.startswith(obstacle) and bool(found.obstacle) == bool(obstacle)


def test_a_classifier(tmp_path, capsys):
    """Batch and image size are those of the config."""
    stock, out = tmp_path / 'stock.py', tmp_path / 'child.py'
    stock.write_text(RESNET)
    words = [stock, '--blocks', 2, '--no-dry-run']
    rows, smallest = fit(*words, '--as-small-as-possible')
    assert 'with 16 images of 32x32' in capsys.readouterr().out
    exact = [row.peak.total for row in rows if row.trains == SAME]
    memory = (exact[0] + min(exact)) // 2
    _, chosen = fit(*words, '--memory', f'{memory / 1e3:.3f}kB', '-o', out)
    assert chosen.trains == SAME and chosen.peak.total <= memory < exact[0]
    model, cfg = stepped(out, 32, 32)
    assert not [*model.backbone.local] and any('forward' in vars(part) for part in model.backbone.modules())
    assert 'batch_size' not in out.read_text() and cfg.train_dataloader.batch_size == 16
    with pytest.raises(LocalLearningError, match=r'nothing fits: the smallest peak is .* MB too much; about \d+ of 16 images'):
        choose_row(rows, Limits(memory=int(smallest.peak.total * 0.9)), 16)


def test_a_localised_config_keeps_its_local_heads(tmp_path, capsys):
    out = tmp_path / 'child.py'
    words = [CIFAR, '--shape', 32, 32, '--batch', 16, '--blocks', 3]
    rows, chosen = fit(*words, '--choose', 2, '--check', 'all', '-o', out)
    assert rows[0].trains == SAME and chosen.trains == LOCAL and {row.trains for row in rows[2:]} == {END_TO_END}
    assert off(capsys.readouterr().out) < 1
    cfg = Config.fromfile(out)
    assert (cfg.model.backbone.num_blocks, cfg.model.backbone.local_head.type) == (3, 'mmman.DGLLocalHead')
    assert cfg.train_dataloader.batch_size == 16
    stepped(out, 32, 32)


def test_cuts_that_are_asked_for(tmp_path):
    words = [CIFAR, '--shape', 32, 32, '--batch', 8, '--choose', 2]
    _, chosen = fit(*words, '--cuts', 'stage', '--blocks', 3)
    assert chosen.changes.local['partition'] == ['layer1.4', 'layer2.4']
    _, chosen = fit(*words, '--cuts', 'layer1.2', 'layer3.0')
    assert chosen.changes.local['partition'] == ['layer1.2', 'layer3.0'] and chosen.changes.num_blocks == 3
    with pytest.raises(LocalLearningError, match="--cuts: cannot cut after 'layer9'"):
        fit(*words, '--cuts', 'layer9')


def test_a_mistyped_cut_is_found_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr('mmman.planning.fit.profile_step', lambda *args, **kwargs: pytest.fail('measured'))
    with pytest.raises(LocalLearningError, match="--cuts: cannot cut after 'layer1.9'; choose from the units stem, layer1.0"):
        fit(CIFAR, '--shape', 32, 32, '--batch', 8, '--choose', 2, '--cuts', 'layer1.9')


def test_overhead_and_memory():
    words = [CIFAR, '--shape', 32, 32, '--batch', 16, '--blocks', 2]
    rows, free = fit(*words, '--choose', 2, '--max-overhead', '9')
    rows, tight = fit(*words, '--choose', 2, '--max-overhead', '0.0')
    assert tight.flops <= rows[0].flops and free.peak.total <= tight.peak.total


def test_the_time_on_a_gpu_is_a_limit(tmp_path, capsys):
    stock = tmp_path / 'stock.py'
    stock.write_text(RESNET)
    words = [stock, '--blocks', 2, '--no-dry-run', '--device', 'rtx3090']
    rows, chosen = fit(*words, '--max-slowdown', 1.0)
    text = capsys.readouterr().out
    base, local = rows[0], rows[-1]
    assert 0 < chosen.time <= 2 * base.time and chosen.peak.total < base.peak.total
    assert local.trains == LOCAL and (local.note or local.time <= 2 * base.time)
    assert 'estimated time on rtx3090' in text and f'Estimated time on rtx3090: {chosen.time / base.time - 1:+.0%}.' in text
    exact = [row.time for row in rows[1:] if row.trains == SAME]
    assert exact == sorted(exact) and choose_row(rows, Limits(slowdown=0.0), 16).time <= base.time < max(exact)
