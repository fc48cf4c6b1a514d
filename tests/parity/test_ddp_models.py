"""Detectors, segmentors and classifiers on several ranks: gradients against one process and against stock DDP."""

import pytest
import torch
from mmengine.hub import get_config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope

from mmman import LocalDistributedDataParallel, LocalLearningOptimWrapper
from tests.parity.ranks import assert_same_on_all_ranks, run_ranks

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')


def retinanet():
    return detector('retinanet/retinanet_r18_fpn_1x_coco.py', with_train_cfg=True)


def fcos():
    """Its losses take the mean of their normalisers over ranks."""
    return detector('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')


def detector(config, with_train_cfg=False):
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    model = get_config(f'mmdet::{config}').model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False, style='pytorch')
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=64)
    model.bbox_head.update(num_classes=5, in_channels=64, feat_channels=64, stacked_convs=1)
    local_head = {'type': 'mmman.DetLocalHead', 'bbox_head': model.bbox_head}
    if with_train_cfg:
        local_head['train_cfg'] = model.train_cfg
    model.backbone = {
        'type': 'mmman.LocalBackbone',
        'backbone': model.backbone,
        'num_blocks': 4,
        'local_head': local_head,
    }
    return sync(MODELS.build(model).double()), detections


def detections(seed):
    from tests.parity.test_retinanet import images

    (sample,) = images(1, 64, 96, seed)
    sample['data_samples'].gt_instances.bboxes.clamp_(max=64 + 8 * (seed % 3))
    return {'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}


def deeplab():
    from tests.parity import test_segmentors as case

    return case.deeplab('deeplabv3plus', 'manpp', ['layer3.0'], **case.INFOPRO).double(), case.images


def resnet32():
    from tests.parity import test_classifiers as case

    case.FAMILIES['cifar_resnet'].config['depth'] = 32
    return case.classifier('cifar_resnet', 'infopro', num_blocks=16), lambda seed: case.images(2, seed)


def vit():
    from tests.parity import test_classifiers as case

    return case.classifier('vit', 'vit', num_blocks=4), lambda seed: case.images(2, seed)


def sync(model):
    model.backbone.local.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return model.train()


def one_step(model, optim_wrapper, batch):
    """A training step; the gradients that the optimizer saw, by name."""
    seen = {}

    def look(*_):
        seen.update({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    module = getattr(model, 'module', model)
    hook = optim_wrapper.optimizer.register_step_pre_hook(look)
    model.train_step(batch, optim_wrapper)
    hook.remove()
    return seen


def optim_wrapper_of(model, lr=0.01, **options):
    return LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **options)


def assert_close(ours, theirs, about, rtol=1e-12):
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        largest = theirs[name].abs().max()
        assert torch.allclose(value, theirs[name], rtol=rtol, atol=float(rtol * largest)), f'{about}: {name}'


def update_copies(model):
    for head in model.backbone.local.values():
        head.transfer.ema_update_(head.source.of(model.backbone), 0.9)


MODELS_ = {'retinanet': retinanet, 'fcos': fcos, 'deeplab': deeplab, 'resnet32': resnet32, 'vit': vit}


def check_model(rank, world, name, steps):
    built = []
    for _ in range(4):
        torch.manual_seed(0)
        built.append(MODELS_[name]()[0])
    batch = MODELS_[name]()[1]
    model, other, third, alone = built
    ours = LocalDistributedDataParallel(model, broadcast_buffers=False)
    stock = MMDistributedDataParallel(other, broadcast_buffers=False, find_unused_parameters=True)
    immediate = LocalDistributedDataParallel(third, broadcast_buffers=False)
    wrappers = [optim_wrapper_of(model), optim_wrapper_of(other), optim_wrapper_of(third, update='immediate')]
    for step in range(steps):
        batches = [step * world + r for r in range(world)]
        for same in (other, alone):  # rounding differs with the order of four numbers in a sum; steps would amplify it
            same.load_state_dict(model.state_dict())
        gradients = one_step(ours, wrappers[0], batch(batches[rank]))
        assert_close(gradients, one_step(stock, wrappers[1], batch(batches[rank])), f'{name}, stock DDP, step {step}')
        immediate.train_step(batch(batches[rank]), wrappers[2])
        if name != 'fcos':
            by_rank = [one_step(alone, optim_wrapper_of(alone, lr=0.0), batch(i)) for i in batches]
            mean = {key: sum(g[key] for g in by_rank) / world for key in by_rank[0]}
            assert_close(gradients, mean, f'{name}, one process, step {step}')
        for localised in (model, other, third):
            update_copies(localised)
        assert_same_on_all_ranks(dict(model.named_parameters()))
        for (key, a), b in zip(model.named_parameters(), third.parameters(), strict=True):
            assert torch.equal(a, b), f'{name}, immediate, step {step}: {key}'


def check_one_large_batch(rank, world):
    """A ViT has no batch statistics and its loss is a mean over images: ranks with b images are one with all of them."""
    from tests.parity.test_classifiers import images

    torch.manual_seed(0)
    model, alone = (vit()[0] for _ in range(2))
    alone.load_state_dict(model.state_dict())
    whole = images(2 * world)
    mine = {key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}
    gradients = one_step(LocalDistributedDataParallel(model), optim_wrapper_of(model), mine)
    assert_close(gradients, one_step(alone, optim_wrapper_of(alone), whole), 'one large batch')


def check_all(rank, world, steps):
    for name in MODELS_:
        check_model(rank, world, name, steps)
    check_one_large_batch(rank, world)


@pytest.mark.parametrize(('world', 'steps'), [(2, 2), (4, 1)])
def test_models(world, steps, tmp_path):
    run_ranks(check_all, world, tmp_path, steps)
