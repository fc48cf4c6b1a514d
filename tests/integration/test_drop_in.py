"""Stock configs of the three libraries, localised by inheritance alone: they train, and what they ask for stays in force."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmman.planning.choice import Changes
from mmman.runtime.localized_child import localize
from mmman.runtime.stock_config import StockConfig
from tests.alive import without_gradient
from tests.conftest import ROOT

pytest.importorskip('mmpretrain')

# stock config, K; what the table of docs/supported_models.md says of it is made from here
STOCK = {
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': 4,
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': 4,
    'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': 4,
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': 4,
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 4,
    'mmdet::atss/atss_r50_fpn_1x_coco.py': 4,
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py': 4,
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': 4,
    'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py': 4,
    'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py': 4,
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': 4,
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': 4,
    'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py': 4,
    'mmdet::ssd/ssd300_coco.py': 4,
    'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py': 2,
    'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py': 2,
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py': 2,
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': 4,
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': 4,
    'mmseg::erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py': 4,
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': 4,
    'mmseg::twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py': 4,
    'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py': 4,
    'mmseg::vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py': 4,
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py': 4,
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py': 4,
    'mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py': 4,
    'mmseg::mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024.py': 4,
    'mmpretrain::resnet/resnet50_8xb32_in1k.py': 4,
    'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py': 4,
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py': 4,
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py': 4,
    'mmpretrain::vgg/vgg13_8xb32_in1k.py': 10,
    'mmpretrain::regnet/regnetx-400mf_8xb128_in1k.py': 4,
    'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py': 4,
    'mmpretrain::mobilenet_v3/mobilenet-v3-small-050_8xb128_in1k.py': 4,
    'mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py': 4,
    'mmpretrain::efficientnet_v2/efficientnetv2-b0_8xb32_in1k.py': 4,
    'mmpretrain::repvgg/repvgg-A0_8xb32_in1k.py': 4,
    'mmpretrain::mobileone/mobileone-s0_8xb32_in1k.py': 4,
    'mmpretrain::shufflenet_v1/shufflenet-v1-1x_16xb64_in1k.py': 4,
    'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py': 4,
    'mmpretrain::cspnet/cspresnet50_8xb32_in1k.py': 4,
    'mmpretrain::densenet/densenet121_4xb256_in1k.py': 4,
    'mmpretrain::mobilevit/mobilevit-xxsmall_8xb128_in1k.py': 4,
    'mmpretrain::convmixer/convmixer-768-32_10xb64_in1k.py': 4,
    'mmpretrain::hornet/hornet-tiny_8xb128_in1k.py': 4,
    'mmpretrain::poolformer/poolformer-s12_32xb128_in1k.py': 4,
    'mmpretrain::riformer/riformer-s12_8xb128_in1k.py': 4,
    'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py': 4,
    'mmpretrain::deit3/deit3-small-p16_64xb64_in1k.py': 4,
    'mmpretrain::t2t_vit/t2t-vit-t-14_8xb64_in1k.py': 4,
    'mmpretrain::eva02/eva02-tiny-p14_in1k.py': 4,
    'mmpretrain::swin_transformer_v2/swinv2-tiny-w8_16xb64_in1k-256px.py': 4,
    'mmpretrain::davit/davit-tiny_4xb256_in1k.py': 4,
    'mmpretrain::twins/twins-pcpvt-small_8xb128_in1k.py': 4,
    'mmpretrain::twins/twins-svt-small_8xb128_in1k.py': 4,
    'mmpretrain::van/van-tiny_8xb128_in1k.py': 4,
    'mmpretrain::vig/vig-tiny_8xb128_in1k.py': 4,
    'mmpretrain::vig/pvig-tiny_8xb128_in1k.py': 4,
}

SIDES = {
    **dict.fromkeys(('SwinTransformer', 'VGG', 'DaViT', 'Vig', 'PyramidVig'), 224),
    'SwinTransformerV2': 256,
    'ViTEVA02': 56,
}
"""Sides, in pixels, of the images of classifiers that need other than 64."""
SEGMENTATION_SIDES = {'MobileNetV3': 400}
"""The same for segmentors that need other than 128: LRASPP pools 49 x 49 pixels at stride 8."""
SMALL = 'img_size=(128, 128), num_layers=4, out_indices=[0, 1, 2, 3]'
BACKBONES = {
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py': SMALL,
    'mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py': SMALL,
    'mmpretrain::hornet/hornet-tiny_8xb128_in1k.py': 'use_layer_scale=False',
    'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py': 'img_size=64',
}
"""What is changed of a stock backbone: a scale of 1e-6 makes gradients of rounding; some take images of one size alone."""
SINGLE = {'LightHamHead', 'RTMDetSepBNHead', 'YOLOXHead', 'YOLOV3Head'}
"""Heads that make tensors of single precision, so that they fail in double."""


def child_of(stock, num_blocks, folder):
    """The localised child of a stock config, as a user keeps it, without weights to download; CPUs have no float16."""
    if stock in BACKBONES:
        (folder / 'stock.py').write_text(f'_base_ = {stock!r}\nmodel = dict(backbone=dict({BACKBONES[stock]}))\n')
        stock = str(folder / 'stock.py')
    path = folder / 'child.py'
    path.write_text(localize(StockConfig.read(stock), Changes(local={'num_blocks': num_blocks}), dry_run=False).text)
    cfg = Config.fromfile(path)
    cfg.model.pop('pretrained', None)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    cfg.model.backbone.backbone.pop('init_cfg', None)
    cfg.optim_wrapper.pop('dtype', None)
    cfg.optim_wrapper.pop('loss_scale', None)
    cfg.optim_wrapper.pop('update', None)  # a block's gradients stay after its step
    return cfg


def detection_batch(height=256, width=320, with_masks=False):
    """Two images with objects of all sizes."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[4.0, 4, 20, 24], [30, 40, 80, 90], [100, 20, 220, 140], [2, 3, 290, 250]])
    samples = []
    for _ in range(2):
        shape = (height, width)
        sample = DetDataSample(
            metainfo={'img_shape': shape, 'pad_shape': shape, 'ori_shape': shape, 'scale_factor': (1.0, 1.0)}
        )
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(len(boxes)))
        if with_masks:
            sample.gt_instances.masks = BitmapMasks(np.ones((len(boxes), height, width), np.uint8), height, width)
        samples.append(sample)
    return {'inputs': [*torch.randint(256, (2, 3, height, width), dtype=torch.uint8)], 'data_samples': samples}


def segmentation_batch(size):
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(19, (1, size, size)))) for _ in range(2)]
    return {'inputs': [*torch.randint(256, (2, 3, size, size), dtype=torch.uint8)], 'data_samples': samples}


def classification_batch(size):
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i) for i in range(2)]
    return {'inputs': torch.randint(256, (2, 3, size, size), dtype=torch.uint8), 'data_samples': samples}


def batch_of(cfg):
    if cfg.default_scope == 'mmdet':
        size = (300, 300) if cfg.model.backbone.backbone.type == 'SSDVGG' else (256, 320)
        return detection_batch(*size, with_masks='mask_head' in cfg.model.get('roi_head', {}))
    if cfg.default_scope == 'mmseg':
        return segmentation_batch(cfg.model.data_preprocessor.size[0])
    return classification_batch(SIDES.get(cfg.model.backbone.backbone.type, 64))


def table_row(stock, head):
    task = next(module for name in ('bbox_head', 'decode_head', 'head') if (module := getattr(head, name, None)))
    library, _, path = stock.partition('::')
    return f'| {library} | `{path}` | {STOCK[stock]} | `{type(head).__name__}`, {type(task).__name__} |'


@pytest.mark.parametrize('stock', STOCK)
def test_inheritance_alone_localises(stock, tmp_path):
    pytest.importorskip(stock.partition('::')[0])
    torch.manual_seed(0)
    cfg = child_of(stock, STOCK[stock], tmp_path)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = [SEGMENTATION_SIDES.get(cfg.model.backbone.backbone.type, 128)] * 2
    init_default_scope(cfg.default_scope)
    MessageHub.get_current_instance().update_info('iter', 0)  # YOLOX's preprocessor changes the size of images by it
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    heads = [cfg.model.get(name, {}).get('type') for name in ('decode_head', 'bbox_head')]
    # mmcv's NMS of proposals takes single precision alone, too
    is_double = not hasattr(model, 'roi_head') and SINGLE.isdisjoint(heads)
    model = model.double() if is_double else model
    backbone = model.backbone
    assert len(backbone.local) == STOCK[stock] - 1
    assert table_row(stock, next(iter(backbone.local.values()))) in (ROOT / 'docs' / 'supported_models.md').read_text()
    if is_double:  # a preprocessor without mean and std makes single precision of images
        backbone.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    backbone.local.init_weights()
    for module in backbone.local.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():  # a ViT's classifier passes no gradient on
            torch.nn.init.normal_(module.weight, std=0.1)
    for head in backbone.local.values():
        head.transfer.init_from_(head.source.of(backbone))
        for parameter in head.transfer.momentum.parameters():  # as after some steps: s has no gradient while E equals B
            parameter.add_(0.01 * torch.randn_like(parameter))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.initialize_count_status(model, 0, 10)
    wrapper.zero_grad = lambda: None
    wrapper.optimizer.step = lambda: None
    # a level's scale factor has a gradient only where an object is assigned to that level
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad and '.scales.' not in name}
    if type(backbone).__name__ == 'DeiT3':  # its layers run ln1 twice and never ln2, in the stock model too
        trained = {name: p for name, p in trained.items() if '.ln2.' not in name}
    for _ in range(4):  # drop path may drop a layer for the whole batch
        assert model.train_step(batch_of(cfg), wrapper)['loss'].isfinite()
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        # in single precision a small gradient can't be told from rounding: the same local heads are tried above in double
        zero = [name for name, grad in gradients.items() if grad is None or not grad.any()]
        still = without_gradient(gradients) if is_double else zero
        # a constant per channel has no gradient in front of BatchNorm, in stock models too (MobileNetV2, VGG with BN)
        still = [name for name in still if not name.endswith('.bias') or gradients[name] is None]
        if not still:
            return
    raise AssertionError(f'no gradient at {still}')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes of noise, four images each."""
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for name in ('a', 'b'):
        (root / name).mkdir()
        for i in range(4):
            cv2.imwrite(str(root / name / f'{i}.png'), generator.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    return root


def small_config(tmp_path, images, stock, size):
    """The child of a classifier's stock config, with data and image sizes of its own."""
    cfg = child_of(stock, 4, tmp_path)
    for name in ('train_dataloader', 'val_dataloader'):
        loader = cfg[name]
        pipeline = [resized(step, size) for step in loader.dataset.pipeline]
        dataset = {'type': 'CustomDataset', 'data_root': str(images), 'pipeline': pipeline}
        cfg[name] = {**loader, 'batch_size': 4, 'num_workers': 0, 'persistent_workers': False, 'dataset': dataset}
    cfg.merge_from_dict({'train_cfg.max_epochs': 1, 'work_dir': str(tmp_path / 'work'), 'experiment_name': tmp_path.name})
    cfg.param_scheduler = []
    cfg.val_evaluator = {'type': 'Accuracy', 'topk': (1,)}
    return cfg


def resized(step, size):
    changes = {'RandomResizedCrop': {'scale': size}, 'ResizeEdge': {'scale': size}, 'CenterCrop': {'crop_size': size}}
    return {**step, **changes.get(step['type'], {})}


def local_losses(runner):
    return {name for name in runner.message_hub.log_scalars if name.startswith('train/local/') and name.endswith('loss')}


def test_ema_and_batch_augmentation_of_convnext_stay(tmp_path, images):
    cfg = small_config(tmp_path, images, 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py', size=32)
    runner = Runner.from_cfg(cfg)
    seen = []

    def see(model, args, kwargs):
        if kwargs['mode'] == 'loss':
            seen.append('gt_score' in kwargs['data_samples'][0])

    runner.model.register_forward_pre_hook(see, with_kwargs=True)
    runner.train()
    assert seen == [True, True]  # Mixup and CutMix reached the local heads' targets
    assert local_losses(runner) == {f'train/local/{j}/loss' for j in (1, 2, 3)}
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    averaged, trained = ema.ema_model.module.state_dict(), runner.model.state_dict()
    assert averaged.keys() == trained.keys()
    moved = [name for name, value in trained.items() if value.is_floating_point() and not torch.equal(averaged[name], value)]
    assert any('.local.' in name for name in moved)
    assert any('.stages.3.' in name for name in moved)


def test_precise_bn_of_regnet_stays(tmp_path, images):
    cfg = small_config(tmp_path, images, 'mmpretrain::regnet/regnetx-400mf_8xb128_in1k.py', size=32)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert any(type(hook).__name__ == 'PreciseBNHook' for hook in runner.hooks)
    assert local_losses(runner) == {f'train/local/{j}/loss' for j in (1, 2, 3)}
