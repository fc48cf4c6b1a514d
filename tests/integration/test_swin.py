"""Swin of mmdet and mmseg: its ``init_weights`` leaves its children out, and it freezes in ``train()``."""

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmman import LocalDistributedDataParallel, LocalLearningOptimWrapper
from tests.integration.test_drop_in import STOCK, batch_of, child_of, segmentation_batch
from tests.parity.ranks import assert_same_on_all_ranks, run_ranks

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

SWINS = [stock for stock in STOCK if 'swin' in stock and not stock.startswith('mmpretrain')]


def start(model):
    model.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return model.train()


@pytest.mark.parametrize('stock', SWINS)
def test_first_local_losses(stock, tmp_path):
    """The configs of the table in docs/supported_models.md."""
    torch.manual_seed(0)
    cfg = child_of(stock, STOCK[stock], tmp_path)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    init_default_scope(cfg.default_scope)
    model = start(revert_sync_batchnorm(MODELS.build(cfg.model)))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.initialize_count_status(model, 0, 10)
    model.train_step(segmentation_batch(64) if cfg.default_scope == 'mmseg' else top_left(batch_of(cfg), 96, 128), wrapper)
    scalars = wrapper.message_hub.log_scalars
    losses = [float(scalars[f'train/local/{block}/loss'].current()) for block in range(1, STOCK[stock])]
    if cfg.default_scope == 'mmseg':  # 150 classes start at their logarithm, 5.01
        losses = [loss / torch.tensor(150.0).log().item() for loss in losses]
    assert all(0.1 < loss < 3 for loss in losses), losses


def top_left(data, height, width):
    """A part of the first image of a detector's batch, with the objects that reach into it."""
    sample = data['data_samples'][0]
    sample.set_metainfo({'img_shape': (height, width), 'pad_shape': (height, width), 'ori_shape': (height, width)})
    objects = sample.gt_instances
    objects.bboxes = objects.bboxes.minimum(torch.tensor([width, height, width, height]))
    objects.masks = objects.masks.crop(torch.tensor([0, 0, width, height]).numpy())
    sample.gt_instances = objects[(objects.bboxes[:, 2:] > objects.bboxes[:, :2] + 4).all(1)]
    return {'inputs': [data['inputs'][0][:, :height, :width]], 'data_samples': [sample]}


def small(library):
    """A detector or segmentor on a small Swin with a frozen first stage, and its batches."""
    init_default_scope(library)
    torch.manual_seed(0)
    swin = {'type': 'SwinTransformer', 'embed_dims': 8, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2)}
    swin |= {'frozen_stages': 1, 'drop_path_rate': 0.0, 'window_size': 4}
    if library == 'mmdet':
        from tests.parity.test_ddp_models import detections as batches

        swin['out_indices'] = (1, 2, 3)
        neck = {'type': 'FPN', 'in_channels': [16, 32, 64], 'out_channels': 16, 'num_outs': 5, 'add_extra_convs': 'on_input'}
        cfg = small_retinanet()
        local_head = {'type': 'mmman.DetLocalHead', 'bbox_head': cfg.bbox_head, 'train_cfg': cfg.train_cfg}
        model = {**cfg, 'neck': neck}
    else:
        from tests.parity.test_segmentors import CLASSES, SIZE
        from tests.parity.test_segmentors import images as batches

        own = {'type': 'FCNHead', 'in_channels': 64, 'in_index': 0, 'channels': 8, 'num_classes': CLASSES, 'dropout_ratio': 0}
        own |= {'num_convs': 1, 'concat_input': False, 'norm_cfg': {'type': 'BN'}}
        local_head = {'type': 'mmman.SegLocalHead', 'decode_head': own}
        preprocessor = {'type': 'SegDataPreProcessor', 'size': (SIZE, SIZE), 'seg_pad_val': 255}
        swin['out_indices'] = (3,)
        model = {'type': 'EncoderDecoder', 'decode_head': own, 'data_preprocessor': preprocessor}
    model['backbone'] = {'type': 'mmman.LocalBackbone', 'backbone': swin, 'num_blocks': 3, 'local_head': local_head}
    return start(MODELS.build(model)), batches


def small_retinanet():
    from mmengine.hub import get_config

    cfg = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model
    cfg.bbox_head.update(num_classes=5, in_channels=16, feat_channels=16, stacked_convs=1)
    return cfg


def check_frozen(rank, world):
    for library in ('mmdet', 'mmseg'):
        model, batches = small(library)
        assert [unit.name for unit in model.backbone.local.plan.frozen] == ['stem', 'stages.0.blocks.0']
        assert [*model.backbone.local] == ['stages_1_blocks_0', 'stages_2_blocks_0']
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        parallel = LocalDistributedDataParallel(model, broadcast_buffers=False)
        wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.05))
        for step in range(2):
            parallel.train()
            parallel.train_step(batches(world * step + rank), wrapper)
        assert_same_on_all_ranks(dict(model.named_parameters()))
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert {'backbone.stages.0.blocks.0.ffn.layers.1.weight', 'backbone.patch_embed.projection.weight'}.isdisjoint(moved)
        for stage in (1, 2, 3):
            assert f'backbone.stages.{stage}.blocks.0.ffn.layers.1.weight' in moved, (library, stage)
        frozen = model.backbone.stages[0].downsample
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_two_processes_train_behind_a_frozen_stage(tmp_path):
    run_ranks(check_frozen, 2, tmp_path)
