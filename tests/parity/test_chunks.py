"""Dense heads on a few images at a time: losses and gradients are those of the whole batch."""

import weakref

import pytest
import torch

from mmman import LocalDistributedDataParallel, LocalLearningOptimWrapper
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
    model.__class__ = type('Distiller', (type(model),), {'loss': lambda self: None})
    with pytest.raises(ConfigError, match='images_per_chunk requires a model.*SingleStageDetector.*not Distiller'):
        one_step(model, images(), images_per_chunk=1)
    model = detector('RetinaNet')
    model.neck.lateral_convs[0].bn = torch.nn.BatchNorm2d(4)
    with pytest.raises(ConfigError, match='BatchNorm in training mode, which mixes the images.*images_per_chunk=None'):
        one_step(model, images(), images_per_chunk=1)
    model = detector('RetinaNet')
    model.bbox_head.__class__ = type('OtherHead', (type(model.bbox_head),), {'loss_by_feat': lambda self: None})
    with pytest.raises(ConfigError, match='OtherHead cannot run on a few images at a time.*AnchorHead.*images_per_chunk=None'):
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
def test_a_head_with_a_loss_of_its_own_is_refused(name):
    """Its loss would be left out."""
    model = detector(name)
    head = model.bbox_head
    head.__class__ = type('Mine', (type(head),), {'loss': lambda self, *args: {}})
    with pytest.raises(ConfigError, match='Mine cannot run on a few images at a time'):
        one_step(model, images(), images_per_chunk=1)
