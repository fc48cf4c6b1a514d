"""Dense heads on a few images at a time: losses and gradients are those of the whole batch."""

import copy
import weakref

import pytest
import torch
from mmengine.hub import get_config

from mmman import LocalDistributedDataParallel, LocalLearningOptimWrapper
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.training import StepMeter
from mmman.errors import ConfigError
from tests.parity import test_ddp_models
from tests.parity.ranks import run_ranks

pytest.importorskip('mmdet')

CONFIGS = {
    'RetinaNet': 'retinanet/retinanet_r18_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
}


BY_CHUNK = {
    'Cascade Mask R-CNN': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
}


def detector(name):
    torch.manual_seed(0)
    return test_ddp_models.detector(CONFIGS[name], with_train_cfg=name != 'FCOS')[0]


def images(seed=0, objects=(3, 0, 1, 5, 2), size=(64, 96)):
    """One image an entry, with so many objects."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(seed)
    inputs, samples = [], []
    for count in objects:
        inputs.append(torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8))
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * torch.tensor(size[::-1])
        sample = DetDataSample(metainfo={'img_shape': size, 'scale_factor': (1.0, 1.0)})
        labels = torch.randint(5, (count,), generator=generator)
        sample.gt_instances = InstanceData(bboxes=corners.flatten(1), labels=labels)
        samples.append(sample)
    return {'inputs': inputs, 'data_samples': samples}


def one_step(model, data, parallel=False, lr=0.0, **options):
    """Losses as logged and the gradients that the optimizer saw, by name."""
    optim_wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=lr), **options)
    got = {}

    def note(optimizer, *_):
        got.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optim_wrapper.optimizer.register_step_pre_hook(note)
    log = (LocalDistributedDataParallel(model) if parallel else model).train_step(data, optim_wrapper)
    return {name: value.item() for name, value in log.items()}, got


@pytest.fixture
def in_float64(monkeypatch):
    """FCOS and ATSS call ``.float()`` on their predictions."""
    monkeypatch.setattr(torch.Tensor, 'float', lambda tensor: tensor)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('size', [1, 2, 8])
@pytest.mark.usefixtures('in_float64')
def test_losses_and_gradients_are_the_batchs(name, size):
    model, data = detector(name), images()
    theirs, expected = one_step(model, data)
    ours, gradients = one_step(model, data, images_per_chunk=size)
    loss, rtol, atol = (1e-6, 1e-4, 1e-6) if name == 'ATSS' else (1e-12, 1e-9, 1e-12)  # its centerness is in float32
    assert ours == pytest.approx(theirs, rel=loss)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.parametrize('name', CONFIGS)
def test_a_batch_without_objects(name):
    model, data = detector(name), images(objects=(0, 0))
    theirs, expected = one_step(model, data)
    ours, gradients = one_step(model, data, images_per_chunk=1)
    assert ours == pytest.approx(theirs, rel=1e-12)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12)


def test_local_losses_too():
    from mmengine.logging import MessageHub

    logs = []
    for options in ({}, {'images_per_chunk': 2}):
        MessageHub.get_instance(f'chunks{len(logs)}')
        model = detector('RetinaNet')
        model_log = {}
        wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0), **options)
        wrapper.message_hub = MessageHub.get_current_instance()
        model.train_step(images(), wrapper)
        model_log = {k: v.current() for k, v in wrapper.message_hub.log_scalars.items() if 'local/' in k}
        logs.append(model_log)
    assert len(logs[0]) == 9 and logs[1] == pytest.approx(logs[0], rel=1e-12)


def test_targets_are_computed_once(monkeypatch):
    """For all images, though losses are computed image by image."""
    from mmdet.models.task_modules import DeltaXYWHBBoxCoder

    coders, stock = [], DeltaXYWHBBoxCoder.encode

    def encode(coder, *boxes):
        coders.append(coder)
        return stock(coder, *boxes)

    monkeypatch.setattr(DeltaXYWHBBoxCoder, 'encode', encode)
    model = detector('RetinaNet')
    one_step(model, images(objects=(9, 8, 9), size=(128, 192)), images_per_chunk=1)
    heads = [*(head.bbox_head for head in model.backbone.local.values()), model.bbox_head]
    assert coders == [head.bbox_coder for head in heads]


def test_a_local_head_takes_as_many_positions_at_a_time_as_the_models_own():
    """P3 is three quarters of an image's pyramid, P4 alone less than a fifth, P5 and the rest a sixteenth."""
    model, sizes = detector('RetinaNet'), {}
    heads = [*(head.bbox_head for head in model.backbone.local.values()), model.bbox_head]
    for head in heads:
        head.register_forward_pre_hook(lambda head, args: sizes.setdefault(head, []).append(len(args[0][0])))
    one_step(model, images(), images_per_chunk=1)
    assert [sizes[head] for head in heads] == [[1] * 5, [5], [5], [1] * 5]


def trained(single=False, **options):
    """The parameters after two steps."""
    model = detector('RetinaNet')
    model = model.float() if single else model
    wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01), **options)
    for seed in range(2):
        model.train_step(images(seed), wrapper)
    return dict(model.named_parameters())


@pytest.mark.parametrize('options', [{'accumulative_counts': 2}, {'update': 'immediate'}])
def test_beside_other_options(options):
    expected = trained(**options)
    for key, parameter in trained(**options, images_per_chunk=1).items():
        torch.testing.assert_close(parameter, expected[key], rtol=1e-9, atol=1e-12)


def test_in_half_precision_as_close_to_single_as_at_once():
    exact = trained(single=True)

    def distance(**options):
        parameters = trained(single=True, dtype='bfloat16', **options)
        return sum((parameters[key] - exact[key]).square().sum() for key in exact).sqrt()

    assert 0 < distance(images_per_chunk=1) < 1.05 * distance()


def test_only_a_chunk_is_alive():
    peaks = []
    for options in ({}, {'images_per_chunk': 1}):
        model, data = detector('RetinaNet'), images(objects=(2,) * 8, size=(128, 192))
        wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0), **options)
        meter = StepMeter(model, wrapper, data)
        curves = meter.memory().curves
        peaks.append([curves[part].max() for part in ('neck, head, loss', 'local head 1')])
    assert peaks[1][0] < 0.3 * peaks[0][0]  # the maps' gradients are there for the whole batch
    assert peaks[1][1] < 0.5 * peaks[0][1]  # and so is the transfer
    assert meter.floor() < 0.7 * meter.floor(in_chunks=False)
    assert 'loss' not in vars(model) and 'forward' not in vars(model.backbone)


def test_an_output_that_the_neck_skips_is_gone():
    """The stock RetinaNet's neck starts at the second output of the backbone."""
    model, data = detector('RetinaNet'), images()
    outputs, alive = [], []
    model.backbone.register_forward_hook(lambda module, args, outs: outputs.append([*map(weakref.ref, outs)]))
    forward = model.bbox_head.forward

    def note(features):
        alive.append([output() is not None for output in outputs[0]])  # of the backbone itself; chunks follow
        return forward(features)

    model.bbox_head.forward = note
    one_step(model, data, images_per_chunk=1)
    assert alive == [[False, True, True, True]] * len(data['inputs'])


def test_the_model_is_left_as_it_was():
    model, data = detector('RetinaNet'), images()
    one_step(model, data)
    before = {name: {*vars(part)} for name, part in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    one_step(model, data, images_per_chunk=1)
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    assert {name: {*vars(part)} for name, part in model.named_modules()} == before


def test_refused():
    with pytest.raises(ConfigError, match='images_per_chunk=0: expected'):
        one_step(detector('RetinaNet'), images(), images_per_chunk=0)
    model = detector('RetinaNet')
    model.__class__ = type('Distiller', (type(model),), {'loss': lambda self, *batch: {'loss': torch.ones(())}})
    with pytest.raises(ConfigError, match='loss runs its backbone once, but Distiller ran it 0 times'):
        one_step(model, images(), images_per_chunk=1)
    model = detector('RetinaNet')
    model.neck.lateral_convs[0].bn = torch.nn.BatchNorm2d(4)
    with pytest.raises(
        ConfigError, match='BatchNorm in training mode behind the backbone .*lateral_convs.0.bn.*images_per_chunk=None'
    ):
        one_step(model, images(), images_per_chunk=1)


def check_rank(rank, world, name):
    torch.Tensor.float = lambda tensor: tensor
    mine = images(rank, objects=((2, 0, 1), (4, 1, 3))[rank])
    _, expected = one_step(detector(name), mine, parallel=True)
    _, gradients = one_step(detector(name), mine, parallel=True, images_per_chunk=2)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', ['RetinaNet', 'FCOS'])
def test_two_ranks(name, tmp_path):
    run_ranks(check_rank, 2, tmp_path, name)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_loss_of_its_own_is_computed_chunk_by_chunk(name):
    """The adapters don't know it."""
    model = detector(name)
    head = model.bbox_head
    sizes = []

    def loss(self, features, samples):
        sizes.append(len(samples))
        return {'loss_mine': features[-1].mean()}

    head.__class__ = type('Mine', (type(head),), {'loss': loss})
    one_step(model, images(), images_per_chunk=2)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize('name', BY_CHUNK)
def test_other_detectors_train_as_if_spread_over_more_gpus(name, monkeypatch):
    """Each chunk's loss is that of a batch of its own, and counts by its number of images.

    The reference has the same outputs of the backbone, to the bit: what a detector samples may hang on the last one.
    """
    cfg = get_config(f'mmdet::{BY_CHUNK[name]}')
    cfg.model.backbone.update(init_cfg=None, depth=50, base_channels=64)
    cfg.model.backbone = {'type': 'mmman.LocalBackbone', 'backbone': cfg.model.backbone, 'num_blocks': 1, 'partition': 'stage'}
    torch.manual_seed(0)
    model, _ = build_dummy_model(cfg, 64, 96)
    batch = random_batch(model, 'mmdet', 3, 64, 96)
    torch.manual_seed(1)
    log, gradients = one_step(model, copy.deepcopy(batch), images_per_chunk=2)
    torch.manual_seed(1)
    model.zero_grad()
    batch = model.data_preprocessor(copy.deepcopy(batch), True)
    outputs, total, expected = model.backbone(batch['inputs']), 0.0, {}
    for span, share in ((slice(2), 2 / 3), (slice(2, 3), 1 / 3)):
        monkeypatch.setattr(model.backbone, 'forward', lambda _, span=span: tuple(output[span] for output in outputs))
        loss, losses = model.parse_losses(model.loss(batch['inputs'][span], batch['data_samples'][span]))
        total = total + loss * share
        for key, value in losses.items():
            expected[key] = expected.get(key, 0.0) + share * value.item()
    total.backward()
    assert log == pytest.approx(expected, rel=1e-4)
    trained = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == trained.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, trained[key], rtol=1e-3, atol=1e-5 * max(1.0, trained[key].abs().max().item()))


def test_a_two_stage_detector_trains_its_blocks_in_chunks():
    """Local losses and the gradients of blocks don't depend on the chunks."""
    results = []
    for options in ({}, {'images_per_chunk': 1}):
        cfg = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
        local_head = {'type': 'mmman.DetLocalHead', 'num_classes': 80, 'stacked_convs': 1}
        cfg.model.backbone.update(init_cfg=None)
        cfg.model.backbone = {
            'type': 'mmman.LocalBackbone',
            'backbone': cfg.model.backbone,
            'num_blocks': 2,
            'local_head': local_head,
        }
        torch.manual_seed(0)
        model, _ = build_dummy_model(cfg, 64, 96)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else None
        results.append(one_step(model, random_batch(model, 'mmdet', 3, 64, 96), **options)[1])
    whole, chunks = results
    blocks = [key for key in whole if key.startswith('backbone.local')]
    assert blocks and whole.keys() == chunks.keys()
    for key in blocks:
        torch.testing.assert_close(chunks[key], whole[key], rtol=1e-3, atol=1e-5)
