"""A batch of one image: what the stock model trains on, its local heads train on."""

import copy

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmman import LocalLearningOptimWrapper
from mmman.batch_of_one import use_running_stats_for_batch_of_one
from mmman.errors import ConfigError
from mmman.heads import SegLocalHead
from mmman.heads.infopro import supervised_contrast
from mmman.registry import MODELS

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample

HEAD = {'type': 'LinearClsHead', 'num_classes': 3, 'in_channels': 64, 'loss': {'type': 'CrossEntropyLoss'}}
NET = {'type': 'ResNet', 'depth': 18, 'base_channels': 8, 'out_indices': (3,), 'zero_init_residual': False}
SEGMENTATION = {
    'type': 'mmseg.FCNHead',
    'num_classes': 3,
    'in_channels': 1,
    'channels': 4,
    'loss_decode': {'type': 'mmseg.CrossEntropyLoss'},
}
HEADS = {
    'dgl': {'type': 'mmman.DGLLocalHead', 'head': HEAD},
    'infopro': {'type': 'mmman.InfoProLocalHead', 'head': HEAD},
    'infopro imagenet': {'type': 'mmman.InfoProLocalHead', 'head': HEAD, 'classifier': 'imagenet'},
    'contrast': {'type': 'mmman.InfoProLocalHead', 'head': HEAD, 'contrast': True},
    'contrast imagenet': {'type': 'mmman.InfoProLocalHead', 'head': HEAD, 'contrast': True, 'classifier': 'imagenet'},
    'predsim': {'type': 'mmman.PredSimLocalHead', 'head': HEAD},
    'auglocal': {'type': 'mmman.AugLocalHead', 'head': HEAD, 'depth': 2},
    'fcn': {'type': 'mmman.SegLocalHead', 'decode_head': SEGMENTATION, 'lambda_rec': 1.0},
    'aspp': {
        'type': 'mmman.SegLocalHead',
        'decode_head': SEGMENTATION,
        'network': {'type': 'mmseg.ASPPHead', 'channels': 4, 'norm_cfg': {'type': 'BN'}},
    },
    'psp': {
        'type': 'mmman.SegLocalHead',
        'decode_head': SEGMENTATION,
        'network': {'type': 'mmseg.PSPHead', 'channels': 4, 'norm_cfg': {'type': 'BN'}},
    },
}


def classifier(local_head, **options):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    backbone = {'type': 'mmman.LocalBackbone', 'backbone': NET, 'num_blocks': 4, 'local_head': local_head, **options}
    model = {'type': 'ImageClassifier', 'backbone': backbone, 'neck': {'type': 'GlobalAveragePooling'}, 'head': HEAD}
    model = MODELS.build({**model, 'data_preprocessor': {'type': 'ClsDataPreprocessor'}})
    model.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return model.train()


def batch(size, side):
    from mmengine.structures import PixelData

    generator = torch.Generator().manual_seed(size)
    samples = []
    for i in range(size):
        sample = DataSample().set_gt_label(i % 3)
        sample.set_data({'gt_sem_seg': PixelData(data=torch.full((1, side, side), i % 3))})
        samples.append(sample)
    return {
        'inputs': torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        'data_samples': samples,
    }


def gradients(model, data):
    wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    wrapper.zero_grad = lambda: None
    model.train_step(data, wrapper)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers() if 'running' in name or 'tracked' in name}


@pytest.mark.parametrize('kind', HEADS)
def test_a_single_image_trains_every_head(kind, monkeypatch):
    if 'decode_head' in HEADS[kind]:
        pytest.importorskip('mmseg')
        monkeypatch.setattr(SegLocalHead, 'task', None)  # here it is part of a classifier
    model = classifier(HEADS[kind])
    modes = [module.training for module in model.modules()]
    for side in (64, 96):  # in the third block's head 2x2 pixels remain, and 3x3
        found = gradients(model, batch(1, side))
        assert all(grad is None or grad.isfinite().all() for grad in found.values())
        assert sum(bool(grad is not None and grad.any()) for grad in found.values()) > len(found) / 2
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.backbone.local.modules() if isinstance(module, nn.BatchNorm2d))


def test_the_block_is_trained_through_running_statistics():
    model = classifier(HEADS['dgl'])
    gradients(model, batch(4, 64))
    before = statistics(model)
    model.zero_grad()
    found = gradients(model, batch(1, 64))
    after = statistics(model)
    of_heads = {name: not torch.equal(before[name], value) for name, value in after.items() if '.local.' in name}
    assert all(moved != ('.fcs.' in name) for name, moved in of_heads.items() if '.transfer.momentum' not in name)
    for name in ('backbone.conv1.weight', 'backbone.local.layer1_1.fcs.0.0.weight', 'backbone.local.layer1_1.fcs.0.1.weight'):
        assert found[name].abs().sum() > 0


def test_larger_batches_train_as_before(monkeypatch):
    plain, ours = ({}, {})
    for into in (ours, plain):
        for kind in ('dgl', 'contrast', 'infopro imagenet'):
            model = classifier(HEADS[kind])
            into.update({f'{kind} {name}': grad for name, grad in gradients(model, batch(2, 64)).items()})
        monkeypatch.setattr('mmman.local.session.use_running_stats_for_batch_of_one', lambda head: torch.enable_grad())
    for name, grad in plain.items():
        assert (grad is None) == (ours[name] is None) and (grad is None or torch.equal(grad, ours[name])), name


def test_one_layer_may_get_one_value_and_then_several():
    layer = nn.BatchNorm2d(2)
    with use_running_stats_for_batch_of_one(layer):
        single = layer(torch.ones(1, 2, 1, 1))
        assert layer.training and layer.num_batches_tracked == 0
        layer(torch.randn(1, 2, 3, 3))
        assert layer.num_batches_tracked == 1
    assert torch.allclose(single, torch.ones(1, 2, 1, 1), atol=1e-4)  # (1 - 0) / sqrt(1 + eps)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        layer(torch.ones(1, 2, 1, 1))


def test_modes_return_where_the_layer_or_what_follows_fails():
    head = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(3, 1))
    with pytest.raises(RuntimeError), use_running_stats_for_batch_of_one(head):
        head(torch.ones(1, 2))
    assert head[0].training and not head[0]._forward_pre_hooks


def test_a_layer_without_running_statistics_is_refused():
    layer = nn.BatchNorm1d(2, track_running_stats=False)
    with (
        pytest.raises(ConfigError, match='keeps no running statistics .*drop_last=True'),
        use_running_stats_for_batch_of_one(layer),
    ):
        layer(torch.ones(1, 2))
    assert layer.training


def test_contrast_of_one_image_is_nothing():
    for labels in ([1], [0, 1, 2], [0, 0, 1]):
        features = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = supervised_contrast(features, torch.tensor(labels), 0.07)
        loss.backward()
        assert features.grad.isfinite().all()
        assert bool(features.grad.any()) == (len(set(labels)) < len(labels)) == bool(loss)


def test_images_of_several_labels():
    head = {**HEAD, 'type': 'MultiLabelLinearClsHead'}
    data = [DataSample().set_gt_label(labels) for labels in ([0, 2], [])]
    model = classifier({'type': 'mmman.PredSimLocalHead', 'head': head})
    local = next(iter(model.backbone.local.values()))
    assert local._targets(data).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert local._targets([DataSample().set_gt_label(1)]).tolist() == [[0, 1, 0]]
    contrast = classifier({**HEADS['contrast'], 'head': head})
    samples = batch(2, 64)
    samples['data_samples'] = data
    with pytest.raises(ConfigError, match='requires one label per image: .*several labels, set contrast=False'):
        gradients(contrast, samples)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {key: value[0] for key, value in batch(1, 64).items()}


def test_an_epoch_whose_last_batch_is_one_image(tmp_path):
    """A stock config of mmpretrain with the heads that ``tools/fit_memory.py`` gives it."""
    from mmengine.config import Config
    from mmengine.hub import get_config

    cfg = get_config('mmpretrain::resnet/resnet18_8xb32_in1k.py')
    init_default_scope('mmpretrain')
    stock = copy.deepcopy(cfg.model)
    stock.backbone.base_channels = 8
    stock.head.update(num_classes=3, in_channels=64, topk=(1,))
    local = copy.deepcopy(stock)
    local.backbone = {'type': 'mmman.LocalBackbone', 'backbone': stock.backbone, 'num_blocks': 4}
    local.backbone['local_head'] = {'type': 'mmman.DGLLocalHead', 'head': stock.head}
    for name, model in (('stock', stock), ('local', local)):
        runner = Runner(
            Config({'model': model}).model,
            work_dir=str(tmp_path / name),
            train_dataloader={
                'dataset': Images(),
                'batch_size': 4,
                'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                'collate_fn': {'type': 'default_collate'},
            },
            train_cfg={'by_epoch': True, 'max_epochs': 2, 'val_interval': 9},
            optim_wrapper={
                'type': 'OptimWrapper' if name == 'stock' else 'mmman.LocalLearningOptimWrapper',
                'optimizer': cfg.optim_wrapper.optimizer,
            },
            custom_hooks=[] if name == 'stock' else [{'type': 'mmman.EMABiasHook'}],
            default_hooks={'checkpoint': None, 'logger': None},
            default_scope='mmpretrain',
            experiment_name=f'single image {name}',
            log_level='WARNING',
            cfg=Config({'data_preprocessor': {'type': 'ClsDataPreprocessor'}}),
        )
        runner.train()
        assert runner.iter == 4
        assert all(value.isfinite().all() for value in runner.model.state_dict().values())
