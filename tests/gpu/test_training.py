"""A training step on a GPU: the reference's bits, half precision, units computed again, graphs, and the allocator's peak."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from mmengine.config import Config

from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.training import StepMeter
from mmman.memory.detection.focal_loss import fused_focal_loss, summed_focal_loss
from tests.conftest import ROOT
from tests.parity import test_classifiers, test_retinanet, test_segmentors
from tests.parity.lockstep import ROWS
from tests.toy import toy_batches
from tests.unit.experimental import test_cuda_graphs
from tests.unit.local.test_session import step, toy, wrapper
from tests.unit.memory import test_recompute
from tests.unit.memory.detection import test_focal_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: make test-gpu')


@pytest.fixture(autouse=True)
def deterministic():
    """Operators that have a deterministic form take it; the others are used as they are."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings('ignore:.*deterministic:UserWarning')
@pytest.mark.parametrize('row', ROWS)
@pytest.mark.parametrize('family', ['resnet', 'resnext', 'regnet', 'mobilenet_v2', 'vit', 'swin', 'convnext'])
def test_classifiers_in_lock_step_with_the_reference(family, row):
    torch.manual_seed(0)
    test_classifiers.lockstep(test_classifiers.classifier(family, row=row).cuda(), family, row)


@pytest.mark.filterwarnings('ignore:.*deterministic:UserWarning')
@pytest.mark.parametrize('row', ROWS)
def test_retinanet_in_lock_step_with_the_reference(row, tmp_path):
    test_retinanet.test_bitwise_parity(row, tmp_path)


@pytest.mark.filterwarnings('ignore:.*deterministic:UserWarning')
@pytest.mark.parametrize('name', ['deeplabv3', 'deeplabv3plus'])
def test_segmentors_in_lock_step_with_the_reference(name):
    torch.manual_seed(0)
    model = test_segmentors.deeplab(name, 'manpp', ['layer2.1'], **test_segmentors.INFOPRO)
    test_segmentors.lockstep(model.cuda(), 'manpp')


def single_precision():
    (batch,) = toy_batches(1, dtype=torch.float32)
    return toy(num_blocks=3).float().cuda(), {key: value.cuda() for key, value in batch.items()}


def gradients(dtype):
    model, batch = single_precision()
    seen = {}
    optim_wrapper = wrapper(model, lr=0.0, dtype=dtype)
    optim_wrapper.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    )
    for _ in range(3):  # a first scale of 65536 may overflow
        step(model, optim_wrapper, batch)
    return seen


def test_float16_has_the_gradients_of_full_precision():
    half, full = gradients('float16'), gradients(None)
    assert half.keys() == full.keys()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in half.values())
    compared = [name for name, gradient in full.items() if gradient.norm() > 1e-4]  # not biases in front of a BatchNorm
    assert len(compared) > 0.8 * len(full)
    for name in compared:
        assert torch.nn.functional.cosine_similarity(half[name].flatten(), full[name].flatten(), dim=0) > 0.98, name


def test_float16_skips_steps_that_overflow_until_the_scale_fits():
    model, batch = single_precision()
    before = copy.deepcopy(model.state_dict())
    optim_wrapper = wrapper(model, dtype='float16', loss_scale={'init_scale': 2.0**40})
    step(model, optim_wrapper, batch)
    assert optim_wrapper.steps == 0 and optim_wrapper.loss_scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for _ in range(40):
        step(model, optim_wrapper, batch)
    assert 0 < optim_wrapper.steps < 40
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.filterwarnings('ignore:.*deterministic:UserWarning')
@pytest.mark.parametrize('dtype', [None, 'float16', 'bfloat16'])
@pytest.mark.parametrize('way', test_recompute.WAYS)
@pytest.mark.parametrize('family', ['resnet', 'mobilenet', 'convnext', 'vit', 'swin'])
def test_units_computed_again_have_the_same_bits(family, way, dtype):
    """With the GPU's own random numbers: all of these drop paths or activations."""
    states = []
    for options in ({}, test_recompute.WAYS[way]):
        model = test_recompute.build(family, **options).cuda()
        optim_wrapper = wrapper(model, lr=0.05, dtype=dtype)
        torch.manual_seed(1)
        for batch in toy_batches(3, pixels=32, dtype=torch.float32):
            step(model, optim_wrapper, {key: value.cuda() for key, value in batch.items()})
        states.append([model.state_dict(), {'random': torch.cuda.get_rng_state()}])
    test_recompute.assert_same(*states)


def meter(name, options):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    cfg.merge_from_dict(options)
    model, optim_wrapper = build_dummy_model(cfg, 416, 640)
    return StepMeter(model.cuda(), optim_wrapper, random_batch(model, 'mmdet', 8, 416, 640))


def test_live_bytes_are_what_the_allocator_holds():
    """Beside what operators take inside, and the allocator's rounding."""
    peaks = []
    for name, backbone in (('paper/retinanet_r18_e2e.py', 'backbone'), ('retinanet_r18_manpp_k4.py', 'backbone.backbone')):
        one = meter(name, {f'model.{backbone}.norm_eval': False})
        peak, allocated = one.memory().peak, one.allocator_peak()
        on_host = sum(image.nbytes for image in one.data['inputs'])
        assert peak - on_host <= allocated <= 1.25 * peak
        peaks.append(allocated)
        assert one.floor() < peak
    assert peaks[1] < 0.35 * peaks[0]


@pytest.mark.parametrize('options', [{}, test_cuda_graphs.AT_ONCE, {'optim_wrapper.dtype': 'bfloat16'}], ids=str)
def test_graphs_train_what_is_trained_without(options):
    """But for the rounding of one division. Two shapes share the graphs' memory."""
    sizes = [(128, 192)] * 3 + [(192, 128)] * 2 + [(128, 192), (192, 128)]
    with fused_focal_loss(with_kernel=False):  # mmcv's has no bfloat16
        expected, state = test_cuda_graphs.trained(sizes, device='cuda', **options)
    logs, own = test_cuda_graphs.trained(sizes, device='cuda', **options, **test_cuda_graphs.GRAPHS)
    for mine, theirs in zip(logs, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for name, value in state.items():
        torch.testing.assert_close(own[name], value, rtol=0.01, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('dtype, rtol', [(torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 0.016)])
def test_a_sum_of_the_focal_loss_is_that_of_the_cpu(dtype, rtol):
    """In single precision its gradient is mmcv's."""
    results = []
    for device in ('cpu', 'cuda'):
        pred, target, weight = (tensor.detach().to(device) for tensor in test_focal_loss.inputs(dtype))
        criterion = partial(summed_focal_loss, test_focal_loss.FocalLoss())
        results.append(test_focal_loss.loss_and_gradient(criterion, pred.requires_grad_(), target, weight, 12))
    torch.testing.assert_close(*([tensor.cpu() for tensor in one] for one in results), rtol=rtol, atol=1e-6)


def test_graphs_have_memory_that_counts():
    one = meter('retinanet_r18_manpp_k4.py', test_cuda_graphs.GRAPHS)
    one.step()
    recorded, peak = one.optim_wrapper.graph_bytes, one.allocator_peak()
    assert 0 < recorded == one.optim_wrapper.graph_bytes < peak
    assert one.memory().peak > 0  # of a step without them


@pytest.mark.parametrize('way', ['--amp', '--amp pytorch', 'graphs'])
def test_a_detector_trains_and_validates(way, tmp_path):
    from mmman.datasets import write_shapes_dataset

    data = write_shapes_dataset(tmp_path / 'data', train_images=16, val_images=4)
    options = {
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 1,
        'default_hooks.checkpoint.interval': 1,
        'train_dataloader.dataset.data_root': data,
        'val_dataloader.dataset.data_root': data,
        'val_evaluator.ann_file': data / 'annotations/instances_val.json',
    }
    launcher = 'pytorch' if 'pytorch' in way else 'none'
    runner = [sys.executable, *(['-m', 'torch.distributed.run', '--nproc-per-node=1'] if launcher == 'pytorch' else [])]
    command = [*runner, ROOT / 'tools/train.py', ROOT / 'configs/demo/retinanet_r18_manpp_k2_shapes.py']
    if way == 'graphs':
        options |= test_cuda_graphs.GRAPHS
    else:
        command.append('--amp')
        options['optim_wrapper.update'] = 'synchronous'  # a loss scaler needs all gradients first
    command += ['--work-dir', tmp_path / 'run', '--launcher', launcher, '--cfg-options']
    command += [f'{key}={value}' for key, value in options.items()]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'run/epoch_1.pth').exists() and 'Epoch(val) [1][1/1]' in done.stdout + done.stderr
