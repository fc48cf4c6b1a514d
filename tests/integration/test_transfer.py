"""A classifier trained by MAN++, published, and taken up by detectors, segmentors, torchvision and export."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor
from torch.utils.data import Dataset

from mmman import delocalize_
from mmman.runtime.publish import publish
from tests.conftest import ROOT
from tests.integration.test_train import SOURCES, States, assert_same, copies, unit_of

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

CLASSES = ('a', 'b', 'c')
SIZES = {'classification': 32, 'detection': 64, 'segmentation': 64}


@DATASETS.register_module()
class Noise(Dataset):
    """Four images of noise with labels of a task."""

    metainfo = {'classes': CLASSES}  # noqa: RUF012

    def __init__(self, task: str) -> None:
        self.task = task

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        size, label = SIZES[self.task], index % len(CLASSES)
        image = torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        meta = {'img_shape': (size, size), 'ori_shape': (size, size), 'scale_factor': (1.0, 1.0)}
        if self.task == 'classification':
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=meta).set_gt_label(label)
        elif self.task == 'detection':
            from mmdet.structures import DetDataSample

            sample = DetDataSample(metainfo=meta)
            sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8.0, 48.0, 40.0]]), labels=torch.tensor([label]))
        else:
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.full((1, size, size), label))
        return {'inputs': image, 'data_samples': sample}


def localized(backbone: dict, num_blocks: int, **local_head) -> dict:
    return {'type': 'mmman.LocalBackbone', 'backbone': backbone, 'num_blocks': num_blocks, 'local_head': local_head}


def classifier(is_local: bool = True) -> dict:
    backbone = {'type': 'ResNet', 'depth': 18, 'num_stages': 4, 'out_indices': (3,), 'style': 'pytorch'}
    head = {'type': 'LinearClsHead', 'num_classes': len(CLASSES), 'in_channels': 512, 'loss': {'type': 'CrossEntropyLoss'}}
    return {
        'type': 'ImageClassifier',
        'backbone': localized(backbone, 4, type='mmman.DGLLocalHead', head=head) if is_local else backbone,
        'neck': {'type': 'GlobalAveragePooling'},
        'head': head,
        'data_preprocessor': {'mean': [127.5] * 3, 'std': [60.0] * 3, 'to_rgb': True},
    }


def retinanet(init_cfg: dict | None, is_local: bool) -> dict:
    """mmdet's RetinaNet-R18 with a narrow neck and head."""
    model = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model.to_dict()
    model['neck']['out_channels'] = 16
    model['bbox_head'].update(num_classes=len(CLASSES), in_channels=16, feat_channels=16)
    model['backbone'].update(init_cfg=init_cfg, frozen_stages=-1)
    if is_local:
        head = {'bbox_head': copy.deepcopy(model['bbox_head']), 'train_cfg': model['train_cfg']}
        model['backbone'] = localized(model['backbone'], 4, type='mmman.DetLocalHead', **head)
    return model


def deeplab(init_cfg: dict) -> dict:
    """mmseg's DeepLabV3 on a plain ResNet-18, with narrow heads, in two blocks."""
    model = get_config('mmseg::_base_/models/deeplabv3_r50-d8.py').model.to_dict()
    model['data_preprocessor']['size'] = (SIZES['segmentation'],) * 2
    norm = {'type': 'BN'}
    model['decode_head'].update(in_channels=512, channels=16, num_classes=len(CLASSES), norm_cfg=norm)
    model['auxiliary_head'].update(in_channels=256, channels=16, num_classes=len(CLASSES), norm_cfg=norm)
    model['backbone'].update(type='ResNet', depth=18, norm_cfg=norm, init_cfg=init_cfg)
    model['backbone'] = localized(model['backbone'], 2, type='mmman.SegLocalHead', decode_head=model['decode_head'])
    return {**model, 'pretrained': None}


def config(scope: str, task: str, model: dict, work_dir: Path, iterations: int = 1) -> Config:
    is_local = model['backbone']['type'] == 'mmman.LocalBackbone'
    collate = {'type': 'default_collate' if task == 'classification' else 'pseudo_collate'}
    return Config(
        dict(
            default_scope=scope,
            model=model,
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                dataset=dict(type='mmengine.Noise', task=task),
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=collate,
            ),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=9),
            optim_wrapper=dict(
                type='mmman.LocalLearningOptimWrapper' if is_local else 'OptimWrapper', optimizer=dict(type='SGD', lr=0.01)
            ),
            custom_hooks=[dict(type='mmman.EMABiasHook')] if is_local else [],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=9, save_last=True)),
            work_dir=str(work_dir),
            experiment_name=work_dir.name,
            randomness=dict(seed=0),
        )
    )


def start_of(cfg: Config) -> dict[str, Tensor]:
    """Train, and return the state dict with which training started."""
    runner = Runner.from_cfg(cfg)
    states = States()
    runner.register_hook(states)
    runner.train()
    return states.first


def said(work_dir: Path) -> list[str]:
    (log,) = work_dir.glob('*/*.log')
    return [line.partition(' - loaded ')[2] for line in log.read_text().splitlines() if ' backbone tensors from ' in line]


@pytest.fixture(scope='module')
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a ResNet-18 classifier after two iterations of MAN++."""
    work_dir = tmp_path_factory.mktemp('classifier')
    start_of(config('mmpretrain', 'classification', classifier(), work_dir, iterations=2))
    return work_dir / 'iter_2.pth'


@pytest.fixture(scope='module')
def backbone_file(raw: Path) -> Path:
    """Its backbone, as the tool publishes it."""
    command = [sys.executable, ROOT / 'tools' / 'publish_model.py', raw, raw.parent / 'backbone.pth', '--backbone-only']
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.partition(': ')[0])


@pytest.fixture(scope='module')
def weights(raw: Path) -> dict[str, Tensor]:
    """What the checkpoint has of the stock backbone, without a prefix."""
    state = unit_of(torch.load(raw)['state_dict'], 'backbone')
    return {name: value for name, value in state.items() if not name.startswith('local.')}


def assert_started_from(start: dict[str, Tensor], weights: dict[str, Tensor], sources: dict[str, str]) -> None:
    """Backbone and copies are the checkpoint's, bit for bit, and the scales are their own."""
    backbone = unit_of(start, 'backbone')
    assert_same({name: value for name, value in backbone.items() if not name.startswith('local.')}, weights)
    for head, source in sources.items():
        for copied in copies(start, head):
            assert_same(copied, unit_of(weights, source.removeprefix('backbone.')), head)
        assert start[f'backbone.local.{head}.transfer.delta'] == 0


@pytest.mark.parametrize('is_published', [False, True])
def test_a_detector_starts_from_the_classifier(raw, backbone_file, weights, is_published, tmp_path):
    file = backbone_file if is_published else raw
    state = torch.load(raw)['state_dict']
    assert all(state[f'backbone.local.{head}.transfer.delta'] != 0 for head in SOURCES)  # same cuts as the detector's
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(file), 'prefix': 'backbone.'}
    start = start_of(config('mmdet', 'detection', retinanet(init_cfg, is_local=True), tmp_path))
    assert_started_from(start, weights, SOURCES)
    local = sum('.local.' in name for name in state)
    left = 'nothing' if is_published else f'{local} of backbone.local.*, 2 of head.*'
    assert said(tmp_path) == [f'100 of 100 backbone tensors from {file}; unused: {left}']


def test_a_segmentor_starts_from_the_classifier(raw, weights, tmp_path):
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(raw), 'prefix': 'backbone.'}
    start = start_of(config('mmseg', 'segmentation', deeplab(init_cfg), tmp_path))
    assert_started_from(start, weights, {'layer2_1': 'layer3.0'})
    assert len(said(tmp_path)) == 1


def test_a_stock_detector_starts_from_the_published_backbone(backbone_file, weights, tmp_path):
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(backbone_file), 'prefix': 'backbone.'}
    start = start_of(config('mmdet', 'detection', retinanet(init_cfg, is_local=False), tmp_path))
    assert_started_from(start, weights, {})
    assert said(tmp_path) == []


def test_the_published_classifier_is_a_stock_one(raw, tmp_path):
    mmpretrain = pytest.importorskip('mmpretrain')
    file, _ = publish(raw, tmp_path / 'classifier.pth')
    stock = mmpretrain.get_model(Config({'model': classifier(is_local=False)}), pretrained=str(file), device='cpu')
    local = mmpretrain.get_model(Config({'model': classifier()}), pretrained=str(raw), device='cpu')
    assert stock._dataset_meta == {'classes': CLASSES}
    assert torch.load(file)['state_dict'].keys() == stock.state_dict().keys()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(stock(images, mode='tensor'), local(images, mode='tensor'))
    assert file.stat().st_size < raw.stat().st_size / 1.5


def test_torchvision_takes_the_backbone_strictly(raw, weights, tmp_path):
    models = pytest.importorskip('torchvision').models
    file, _ = publish(raw, tmp_path / 'resnet18.pth', library='torchvision')
    theirs = models.resnet18()
    own = {name: value for name, value in theirs.state_dict().items() if name.startswith('fc.')}
    theirs.load_state_dict({**torch.load(file)['state_dict'], **own}, strict=True)
    theirs.fc = torch.nn.Identity()
    init_default_scope('mmpretrain')
    ours = MODELS.build(classifier(is_local=False)['backbone'])
    ours.load_state_dict(weights)
    ours.eval()
    theirs.eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images)[0].mean((2, 3)))


def test_the_configs_of_the_howto(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'docs' / 'howto' / 'pretrained_backbones.md').read_text()
    snippets = [block for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL) if block.startswith('_base_')]
    weights = None
    for i, snippet in enumerate(snippets):
        path = tmp_path / f'{i}.py'
        path.write_text(re.sub(r'resnet50_manpp-\w{8}', 'resnet50_manpp', snippet))
        cfg = Config.fromfile(path)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        if weights is None:
            weights = model.backbone.state_dict()
            torch.save({'state_dict': model.state_dict()}, tmp_path / 'resnet50_manpp.pth')
        else:
            model.backbone.init_weights()
            loaded = model.backbone.state_dict()
            assert_same(*({name: x[name] for name in weights if not name.startswith('local.')} for x in (loaded, weights)))
    assert len(snippets) == 4


def pair(init: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A stock backbone, and one that was localised and is stock again, in eval mode."""
    init_default_scope('mmpretrain')
    stock = MODELS.build(classifier(is_local=False)['backbone'])
    again = delocalize_(MODELS.build(classifier()['backbone']))
    for backbone in (stock, again):
        backbone.load_state_dict(init)
        backbone.eval()
    return stock, again


def test_a_delocalised_backbone_exports_the_stock_graph(weights):
    graphs = [torch.export.export(model, (torch.rand(1, 3, 32, 32),)).graph for model in pair(weights)]
    stock, again = ([(node.op, str(node.target), str(node.args)) for node in graph.nodes] for graph in graphs)
    assert again == stock
    assert len(stock) > 50


@pytest.mark.filterwarnings('ignore:You are using the legacy TorchScript-based:DeprecationWarning')
def test_a_delocalised_backbone_exports_the_stock_onnx_file(weights, tmp_path):
    onnx = pytest.importorskip('onnx')  # without it torch exports none
    graphs = []
    for i, model in enumerate(pair(weights)):
        torch.onnx.export(model, (torch.rand(1, 3, 32, 32),), str(tmp_path / f'{i}.onnx'), dynamo=False)
        graphs.append(onnx.load(tmp_path / f'{i}.onnx').graph)
    assert graphs[1].node == graphs[0].node
    assert graphs[1].initializer == graphs[0].initializer
    assert len(graphs[0].node) > 40
