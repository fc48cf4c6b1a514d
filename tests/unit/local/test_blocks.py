"""Local heads are initialised once, whatever ``init_weights`` of backbone and model do; a head that isn't is refused."""

import copy
import pickle

import pytest
import torch
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import Runner
from torch import nn

from mmman import LocalHead, LocalLearningOptimWrapper, localize_
from mmman.errors import ConfigError
from mmman.registry import MODELS
from tests.toy import ToyNet, toy_batches
from tests.unit.partition.off import SWIN, VIT, build

WEIGHT, BIAS = 7.0, 3.0


@MODELS.register_module()
class MarkedHead(LocalHead):
    """A head whose initialisation shows, with a part that has one of its own, as a RetinaHead's."""

    inits = 0

    def __init__(self, boundary, transfer, loss_weight=1.0):
        super().__init__(boundary, transfer, loss_weight, {'type': 'Constant', 'layer': 'Conv2d', 'val': WEIGHT, 'bias': BIAS})
        self.conv, self.norm = nn.Conv2d(boundary.channels, 2, 1), nn.BatchNorm2d(2)
        self.own = OwnInit()

    def init_weights(self):
        type(self).inits += 1
        super().init_weights()

    def loss(self, y, inputs, data_samples):
        y = self.norm(self.conv(self.as_map(y, inputs)) / 1000)
        return {'loss': y.square().mean() + self.own.linear(y.mean((2, 3))).square().mean()}


class OwnInit(BaseModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def init_weights(self):
        nn.init.constant_(self.linear.weight, -WEIGHT)


class Model(BaseModel):
    def __init__(self, backbone, **options):
        super().__init__()
        self.backbone = localize_(backbone, **{'num_blocks': 3, 'local_head': {'type': 'mmman.MarkedHead'}, **options})

    def forward(self, inputs, data_samples=None, mode='loss'):
        outputs = self.backbone(inputs)
        return {'loss': sum(x.square().mean() for x in outputs)} if mode == 'loss' else outputs


def assert_initialised(model, scale=1.0):
    for head in model.backbone.local.values():
        assert (head.conv.weight == scale * WEIGHT).all() and (head.conv.bias == scale * BIAS).all()
        assert (head.own.linear.weight == -scale * WEIGHT).all()


@pytest.fixture(autouse=True)
def count():
    MarkedHead.inits = 0


def once(model):
    return MarkedHead.inits == len(model.backbone.local)


def families():
    swin = {'embed_dims': 24, 'depths': (1, 1, 1, 1)}
    yield from [('mmdet', 'SwinTransformer', swin), ('mmseg', 'SwinTransformer', swin)]
    yield from [
        ('mmdet', 'ResNet', {'depth': 18}),
        ('mmdet', 'MobileNetV2', {}),
        ('mmdet', 'RegNet', {'arch': 'regnetx_400mf'}),
    ]
    yield from [('mmdet', 'ResNeSt', {'depth': 50, 'stem_channels': 64, 'base_channels': 64})]
    yield from [('mmseg', 'ResNetV1c', {'depth': 18}), ('mmseg', 'MobileNetV2', {})]
    yield from [
        ('mmpretrain', 'VGG', {'depth': 11}),
        ('mmpretrain', 'MobileNetV2', {}),
        ('mmpretrain', 'ResNet', {'depth': 18}),
    ]
    yield from [('mmpretrain', 'VisionTransformer', {'arch': VIT, 'img_size': 32, 'out_type': 'featmap'})]
    yield from [('mmpretrain', 'DistilledVisionTransformer', {'arch': VIT, 'img_size': 32})]
    yield from [('mmpretrain', 'SwinTransformer', {'arch': SWIN}), ('mmpretrain', 'ConvNeXt', {'arch': 'atto'})]


@pytest.mark.parametrize(('library', 'kind', 'options'), families())
def test_heads_of_every_family_are_initialised_once(library, kind, options):
    model = Model(build(library, kind, options))
    model.init_weights()
    assert_initialised(model)
    assert once(model) and model.backbone.local.uninitialised() == []
    assert not any(hasattr(module, '_params_init_info') for module in model.modules())


class LeavesChildrenOut(ToyNet):
    """As the Swin of mmdet and mmseg."""

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight)


class WritesOverChildren(ToyNet):
    """As mmpretrain's ShuffleNet."""

    def init_weights(self):
        super().init_weights()
        LeavesChildrenOut.init_weights(self)


class WritesOverData(ToyNet):
    def init_weights(self):
        super().init_weights()
        for parameter in self.parameters():
            parameter.data.zero_()
        self.stem.weight.data.normal_()


class ForgetsChildren(ToyNet):
    """Is initialised, in mmengine's eyes, before it begins."""

    def init_weights(self):
        self.is_init = True
        super().init_weights()


HOSTS = [ToyNet, LeavesChildrenOut, WritesOverChildren, WritesOverData, ForgetsChildren]


@pytest.mark.parametrize('host', HOSTS)
def test_heads_are_initialised_whatever_the_backbone_does(host):
    for copied in (lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        MarkedHead.inits = 0
        model = copied(Model(host()))
        model.init_weights()
        assert_initialised(model)
        assert once(model)
        assert model.backbone.stem.weight.std() > 0
    before = copy.deepcopy(model.state_dict())
    model.init_weights()  # again, which does nothing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_backbone_that_is_initialised_by_itself():
    model = Model(ToyNet())
    model.backbone.init_weights()
    assert_initialised(model)
    assert once(model)


def test_units_that_heads_copy_start_as_the_backbones_units_do():
    pytest.importorskip('mmpretrain')
    backbone = build('mmpretrain', 'ResNet', {'depth': 18})
    head = {'type': 'mmman.AugLocalHead', 'depth': 1}
    head['head'] = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 2, 'loss': {'type': 'mmpretrain.CrossEntropyLoss'}}
    model = Model(backbone, local_head=head)
    model.init_weights()
    for local in model.backbone.local.values():
        assert not local.units[0].bn2.weight.any()  # zero_init_residual, which the class sets after its children
        assert local.units[0].bn1.weight.all()


# ---- what starts a training


class OwnModel(Model):
    """A model that skips mmengine's machinery, and overwrites what it finds."""

    def init_weights(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def runner_of(tmp_path, model, iters=1, **options):
    torch.manual_seed(0)
    return Runner(
        model,
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(
            toy_batches(iters, dtype=torch.float32), collate_fn=lambda batch: batch[0]
        ),
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': iters, 'val_interval': 99},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.0}},
        custom_hooks=[{'type': 'mmman.EMABiasHook'}],
        default_hooks={'logger': None, 'checkpoint': {'type': 'CheckpointHook', 'interval': iters, 'by_epoch': False}},
        experiment_name=f'{tmp_path.name}-{len([*tmp_path.iterdir()])}',
        log_level='WARNING',
        **options,
    )


@pytest.mark.parametrize('host', [ToyNet, LeavesChildrenOut, WritesOverChildren])
@pytest.mark.parametrize('kind', [Model, OwnModel])
def test_runner(host, kind, tmp_path):
    def start(scale=1.0, **options):
        MarkedHead.inits = 0
        model = kind(host())
        runner_of(tmp_path, model, **options).train()
        assert_initialised(model, scale)
        assert once(model)
        for head in model.backbone.local.values():
            source = head.source.of(model.backbone).state_dict()
            for copied in head.transfer.copies:
                floats = {name: value for name, value in copied.state_dict().items() if name.endswith('conv.weight')}
                assert floats and all(torch.equal(value, source[name]) for name, value in floats.items())
        return model

    model = start()
    stock = {name: value for name, value in model.state_dict().items() if '.local.' not in name}
    torch.save({'state_dict': stock, 'meta': {}}, tmp_path / 'stock.pth')
    loaded = start(load_from=str(tmp_path / 'stock.pth'))  # which brings no heads
    assert torch.equal(loaded.backbone.stem.weight, model.backbone.stem.weight)

    saved = torch.load(tmp_path / 'iter_1.pth', weights_only=False)
    for name, value in saved['state_dict'].items():
        if name.endswith(('conv.weight', 'conv.bias', 'own.linear.weight')) and '.transfer.' not in name and 'local' in name:
            value.mul_(2)
    torch.save(saved, tmp_path / 'doubled.pth')
    start(2.0, load_from=str(tmp_path / 'doubled.pth'))
    start(2.0, load_from=str(tmp_path / 'doubled.pth'), resume=True, iters=2)


def test_pretrained_weights_of_the_backbone_bring_no_heads(tmp_path):
    pytest.importorskip('mmdet')
    from mmengine.config import ConfigDict

    small = {'embed_dims': 8, 'depths': (1, 1, 2, 1), 'num_heads': (1, 1, 2, 2), 'window_size': 2, 'pretrain_img_size': 64}
    for library in ('mmdet', 'mmseg'):
        pytest.importorskip(library)
        source = Model(build(library, 'SwinTransformer', small))
        torch.save({'state_dict': {name: 0 * value for name, value in source.state_dict().items()}}, tmp_path / 'swin.pth')
        init_cfg = ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth'))
        model = Model(build(library, 'SwinTransformer', {**small, 'init_cfg': init_cfg}))
        model.init_weights()
        assert_initialised(model)
        assert not model.backbone.patch_embed.projection.weight.any()


def sync(model):
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))


def step(model):
    wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    return model.train_step(toy_batches(1, dtype=torch.float32)[0], wrapper)


def test_a_head_that_nothing_initialised_is_refused():
    for kind in (Model, OwnModel):
        model = kind(LeavesChildrenOut())
        if kind is OwnModel:
            model.init_weights()
        sync(model)
        with pytest.raises(
            ConfigError, match=r'^the local heads after layer1_1, layer2_1 are not initialised: call model\.init_w'
        ):
            step(model)
    model.backbone.local.init_weights()
    step(model)
    assert_initialised(model)


def test_a_loaded_head_counts_as_initialised():
    trained = Model(LeavesChildrenOut())
    trained.init_weights()
    state = trained.state_dict()
    model = Model(LeavesChildrenOut())
    model.load_state_dict(state)
    sync(model)
    step(model)
    model = Model(LeavesChildrenOut())
    model.load_state_dict({name: value for name, value in state.items() if 'layer2_1.own' not in name}, strict=False)
    sync(model)
    with pytest.raises(ConfigError, match='the local heads after layer2_1 are not initialised: call'):
        step(model)
