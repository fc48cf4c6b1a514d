"""The focal loss with a kernel's memory: mmdet's own values and gradients, and what it keeps."""

from functools import partial

import pytest
import torch

pytest.importorskip('mmdet')

from mmdet.models.losses import FocalLoss
from mmdet.models.losses import focal_loss as library
from mmengine.hub import get_config
from torch.utils._python_dispatch import TorchDispatchMode

from mmman.analysis import LiveBytes
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.gpu_work import GPUWork, kernel_of
from mmman.analysis.training import StepMeter
from mmman.memory.detection import focal_loss
from mmman.memory.detection.focal_loss import SLICE_SIZE, focal_loss_without_kernel, fused_focal_loss, summed_focal_loss

ROWS, CLASSES = SLICE_SIZE // 5 + 3, 7  # two slices, and a part of one


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    pred = 6 * torch.randn(ROWS, CLASSES, generator=generator, dtype=dtype)
    pred[:2] = torch.tensor([[60.0], [-60.0]])  # where a sigmoid is 0 or 1
    target = torch.randint(CLASSES + 1, (ROWS,), generator=generator)
    return pred.requires_grad_(), target, torch.rand(ROWS, generator=generator, dtype=dtype)


def loss_and_gradient(criterion, pred, *args, **kwargs):
    loss = criterion(pred, *args, **kwargs)
    seed = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return loss.detach(), torch.autograd.grad(loss, pred, seed)[0]


@pytest.mark.parametrize('weighted', ['by anchor', 'by anchor and class', 'not'])
@pytest.mark.parametrize(
    'options, avg_factor',
    [
        ({}, None),
        ({}, 12.5),
        ({'gamma': 1.5, 'alpha': 0.6, 'loss_weight': 3.0}, 12.5),
        ({'reduction': 'sum'}, None),
        ({'reduction': 'none'}, None),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_mmdet(options, avg_factor, weighted):
    pred, target, by_anchor = inputs()
    by_both = by_anchor[:, None] * torch.arange(1.0, CLASSES + 1)
    weight = {'by anchor': by_anchor, 'by anchor and class': by_both, 'not': None}[weighted]
    criterion = FocalLoss(**options)
    expected = loss_and_gradient(criterion, pred, target, weight, avg_factor)
    with fused_focal_loss():
        given = loss_and_gradient(criterion, pred, target, weight, avg_factor)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('options', [{}, {'gamma': 1.5, 'alpha': 0.6, 'loss_weight': 3.0}], ids=str)
def test_a_sum_is_that_of_mmdet(options, weighted):
    pred, target, weight = inputs()
    head = torch.nn.Module()
    head.loss_cls = FocalLoss(**options)
    args = pred, target, weight if weighted else None, torch.tensor(12)
    expected = loss_and_gradient(head.loss_cls, *args)
    given = loss_and_gradient(partial(summed_focal_loss, head.loss_cls), *args)
    assert given[0].dim() == 0
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-14)
    without = loss_and_gradient(partial(focal_loss_without_kernel, head.loss_cls), *args)
    torch.testing.assert_close(without, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_sum_in_half_precision_is_computed_in_single(dtype):
    pred, target, weight = inputs(torch.float32)
    pred = pred.detach().to(dtype).requires_grad_()
    head = torch.nn.Module()
    head.loss_cls = FocalLoss()
    expected = loss_and_gradient(head.loss_cls, pred.detach().float().requires_grad_(), target, weight, 12)
    loss, gradient = loss_and_gradient(partial(summed_focal_loss, head.loss_cls), pred, target, weight, 12)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1].to(dtype))


def test_a_sum_keeps_no_map_of_losses():
    pred, target, weight = inputs(torch.float32)
    head = torch.nn.Module()
    head.loss_cls = FocalLoss()
    with LiveBytes(pred, target, weight) as live:
        held = live.current
        loss = summed_focal_loss(head.loss_cls, pred, target, weight, 12)
        assert live.peak < held + 100
        loss.backward()
    assert live.peak < held + pred.nbytes + weight.nbytes + 100


@pytest.mark.parametrize('rows', [100, 30_000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_the_kernels_of_a_sum_are_known(rows, dtype, monkeypatch):
    launches = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if kernel_of(func, args, kwargs or {}, result) is not None:
                launches.extend([func] * (1 + (func is torch.ops.aten.scatter.src)))  # it copies first
            return result

    monkeypatch.setattr(focal_loss, 'GPU_SLICE_SIZE', SLICE_SIZE)
    pred, target, weight = torch.randn(rows, 10).to(dtype), torch.randint(11, (rows,)), torch.rand(rows)
    with Counting():
        focal_loss._sum._init_fn(pred, target, weight, 2.0, 0.25)
    count, moved = focal_loss.sum_on_gpu(pred)
    assert count == len(launches) and moved == 12 * rows * 10 * 4
    with GPUWork(lambda: 'sum') as work:
        focal_loss._sum(pred, target, None, 2.0, 0.25)
    assert work.parts['sum'].launches == count and work.parts['sum'].moved == moved


@pytest.mark.parametrize('kind', ['summed', 'by mean', 'one hot', 'by class'])
def test_what_is_no_average_of_rows_stays_with_mmdet(kind):
    pred, target, weight = inputs()
    loss, options = FocalLoss(), {'weight': weight, 'avg_factor': 12.0}
    if kind == 'summed':
        loss, options = FocalLoss(reduction='sum'), {'weight': weight}
    elif kind == 'by mean':
        options = {'weight': weight}
    elif kind == 'one hot':
        target = torch.nn.functional.one_hot(target, CLASSES + 1)[:, :CLASSES]
    else:
        options['weight'] = weight[:, None].expand(-1, CLASSES)
    assert torch.equal(summed_focal_loss(loss, pred, target, **options), loss(pred, target, **options))


def test_other_losses_are_computed_by_themselves():
    class Mine(FocalLoss):
        def forward(self, *args, **kwargs):
            return args, kwargs

    args = inputs()
    for compute in (summed_focal_loss, focal_loss_without_kernel):
        assert compute(Mine(), *args, 12) == (args, {'avg_factor': 12})


def test_one_hot_targets_and_probabilities_stay_with_mmdet(monkeypatch):
    """mmdet computes them in Python on a GPU as well."""
    monkeypatch.setattr(library, 'sigmoid_focal_loss', None)
    pred, target, weight = inputs()
    one_hot = torch.nn.functional.one_hot(target, CLASSES + 1)[:, :CLASSES]
    for criterion, args in ((FocalLoss(), (pred, one_hot)), (FocalLoss(activated=True), (pred.sigmoid(), target))):
        with fused_focal_loss():
            given = criterion(*args, weight)
        assert torch.equal(given, criterion(*args, weight))


def test_it_keeps_its_inputs_and_makes_its_output():
    pred, target, _ = inputs(torch.float32)
    with fused_focal_loss(), LiveBytes(pred, target) as live:
        held = live.current
        loss = FocalLoss(reduction='none')(pred, target)
        assert live.peak == held + 2 * pred.nbytes  # the kernel's, and that times loss_weight
        assert live.current == held + pred.nbytes
        loss.backward(torch.ones_like(loss))
    # The loss is alive, its gradient, that times loss_weight, and the gradient of the input.
    assert live.peak == held + 4 * pred.nbytes


def test_nothing_is_left_behind():
    stock = FocalLoss.forward, library._sigmoid_focal_loss
    with pytest.raises(ZeroDivisionError), fused_focal_loss():
        assert FocalLoss.forward is not stock[0]
        raise ZeroDivisionError
    assert (FocalLoss.forward, library._sigmoid_focal_loss) == stock


def test_retinanet_takes_less_and_loses_the_same():
    cfg = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    narrow = {'neck.out_channels': 16, 'bbox_head.in_channels': 16, 'bbox_head.feat_channels': 16}
    narrow |= {'backbone.base_channels': 4, 'neck.in_channels': [4, 8, 16, 32]}
    cfg.merge_from_dict({f'model.{name}': value for name, value in narrow.items()})
    model, optim_wrapper = build_dummy_model(cfg, 128, 128)
    meter = StepMeter(model, optim_wrapper, random_batch(model, 'mmdet', 2, 128, 128))

    def measured():
        with torch.no_grad():
            losses = model(**model.data_preprocessor(meter.data, True), mode='loss')
        return meter.memory().peak, meter.floor(), losses['loss_cls']

    python = measured()
    with fused_focal_loss():
        fused = measured()
    scores = 4 * 2 * 80 * 9 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1)
    assert fused[0] < python[0] - 3 * scores and fused[1] < python[1] - 3 * scores
    torch.testing.assert_close(fused[2], python[2])
