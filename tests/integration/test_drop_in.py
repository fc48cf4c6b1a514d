"""Stock configs of mmpretrain, localised by inheritance alone: what the stock config asks for stays in force."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

pytest.importorskip('mmpretrain')

CHILD = """
_base_ = 'mmpretrain::{stock}'
model = dict(backbone=dict(
    _delete_=True, type='mmman.LocalBackbone', backbone=_base_.model.backbone, num_blocks=4,
    local_head=dict(type='mmman.{head}', head=_base_.model.head)))
optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper')
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='mmman.EMABiasHook', momentum=0.995)]
"""


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


def child_config(tmp_path, images, stock, head, size):
    """The child of a stock config, with data and image sizes of its own."""
    path = tmp_path / 'child.py'
    path.write_text(CHILD.format(stock=stock, head=head))
    cfg = Config.fromfile(path)
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
    cfg = child_config(tmp_path, images, 'convnext/convnext-tiny_32xb128_in1k.py', 'DGLLocalHead', size=32)
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
    cfg = child_config(tmp_path, images, 'regnet/regnetx-400mf_8xb128_in1k.py', 'DGLLocalHead', size=32)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert any(type(hook).__name__ == 'PreciseBNHook' for hook in runner.hooks)
    assert local_losses(runner) == {f'train/local/{j}/loss' for j in (1, 2, 3)}
