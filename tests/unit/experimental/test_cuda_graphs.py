"""A step as recorded graphs: on whatever data they run, they train what the step without them trains."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmman import LocalLearningOptimWrapper
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.errors import ConfigError
from mmman.experimental.cuda_graphs import StepGraphs
from mmman.memory.detection.focal_loss import fused_focal_loss
from tests.conftest import ROOT
from tests.graph_capturer import CPUGraphCapturer

pytestmark = pytest.mark.whole_models

pytest.importorskip('mmdet')

R18 = 'retinanet_r18_manpp_k4.py'
GRAPHS = {'optim_wrapper.cuda_graphs': True}
HALF = {'update': 'synchronous', 'loss_scale': 512.0, 'dtype': 'bfloat16'}
AT_ONCE = {'optim_wrapper.update': 'synchronous', 'optim_wrapper.images_per_chunk': None}
AT_ONCE |= {'model.neck.norm_cfg': {'type': 'BN'}}  # with which images can't be taken a few at a time
SEGMENTS = 2 * 4  # of a step in four blocks
NARROW = {'backbone.backbone.base_channels': 16, 'neck.in_channels': [32, 64, 128], 'neck.out_channels': 32}
for head in ('bbox_head', 'backbone.local_head.bbox_head'):
    NARROW |= {f'{head}.in_channels': 32, f'{head}.feat_channels': 16, f'{head}.num_classes': 5}


@pytest.fixture
def capturer(monkeypatch):
    """Graphs on the CPU."""
    capturer = CPUGraphCapturer()

    def step_graphs(wrapper, model):
        blocks = wrapper._backbone.local
        return StepGraphs(model, wrapper.images_per_chunk, blocks, wrapper._back_propagate, wrapper._after_backward, capturer)

    monkeypatch.setattr(LocalLearningOptimWrapper, '_step_graphs', step_graphs)
    return capturer


class Steps:
    """A light detector that trains on batches of three random images."""

    def __init__(self, config=R18, device='cpu', **options):
        torch.manual_seed(0)
        cfg = Config.fromfile(ROOT / 'configs' / config)
        narrow = {f'model.{name}': value for name, value in NARROW.items()}
        cfg.merge_from_dict({'model.backbone.backbone.norm_eval': False, **narrow, **options})
        self.model, self.optim_wrapper = build_dummy_model(cfg, 64, 96)
        self.model.to(device)
        self.backbone = self.model.backbone
        for group in self.optim_wrapper.optimizer.param_groups:
            group['lr'] = 1e-6  # of random weights as they are

    def __call__(self, height, width, seed=0):
        """One step, on images with 0, ``seed`` and twice as many objects. Returns the local losses."""
        data = random_batch(self.model, 'mmdet', 3, height, width, seed)
        for i, sample in enumerate(data['data_samples']):
            sample.gt_instances = sample.gt_instances[: i * seed]
        self.model.train_step(data, self.optim_wrapper)
        for head in self.backbone.local.values():
            head.transfer.ema_update_(head.source.of(self.backbone), 0.99)
        return {key: log.current() for key, log in self.optim_wrapper.message_hub.log_scalars.items() if 'local/' in key}


def trained(sizes, **options):
    steps = Steps(**options)
    logs = [steps(*size, seed=-i % 5) for i, size in enumerate(sizes)]
    return logs, steps.model.state_dict()


@pytest.fixture(params=[False, True], ids=['', 'deterministic'])
def deterministic(request):
    """Fresh memory is not left as it is then."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures('deterministic')
@pytest.mark.parametrize('options', [{}, AT_ONCE], ids=['', 'at once'])
def test_trains_what_is_trained_without(options, capturer):
    """Other pixels, other numbers of objects, two shapes by turns: bit by bit.

    But for the batch at once, which mmdet's code computes level by level without graphs.
    """
    rtol = 1e-5 if options else 0
    sizes = [(64, 96), (64, 96), (64, 96), (96, 64), (64, 96), (96, 64)]
    with fused_focal_loss(with_kernel=False):
        expected, state = trained(sizes, **options)
    logs, own = trained(sizes, **options, **GRAPHS)
    assert capturer.captures == 2 * SEGMENTS
    for log, other in zip(logs, expected, strict=True):
        assert log == pytest.approx(other, rel=rtol, abs=0)
    for name, value in state.items():
        atol = rtol if 'running_' in name else 0.03 * rtol  # a step moves a weight by 1e-6 of its gradient
        torch.testing.assert_close(own[name], value, rtol=0, atol=atol, msg=name)


def test_blocks_step_one_by_one(capturer):
    """So that the gradients of one are alive at a time."""
    steps, seen = Steps(**GRAPHS), []

    def note(optimizer, *_):
        seen.append(sum(p.grad is not None for p in steps.model.parameters()))

    steps.optim_wrapper.optimizer.register_step_pre_hook(note)
    for _ in range(3):
        steps(64, 64)
    assert len(seen) == 3 * 4 and seen[:4] == seen[4:8] == seen[8:]


def test_another_mode_is_another_capture(capturer):
    steps = Steps(**GRAPHS)
    for _ in range(3):
        steps(64, 64)
    assert capturer.captures == SEGMENTS
    steps.backbone.layer4.requires_grad_(False)
    steps(64, 64)
    assert capturer.captures == 2 * SEGMENTS
    steps.backbone.norm_eval = True
    steps.model.train()
    steps(64, 64)
    assert capturer.captures == 3 * SEGMENTS
    steps.backbone.norm_eval = False
    steps.model.train()
    steps(64, 64)
    assert capturer.captures == 3 * SEGMENTS


def fail(*_):
    raise ZeroDivisionError


@pytest.mark.usefixtures('capturer')
@pytest.mark.parametrize('options', [{}, AT_ONCE], ids=['', 'at once'])
def test_the_model_has_its_own_loss_after_each_step(options):
    """Also after one that fails: nothing else may run graphs of a step by calling the model."""
    steps = Steps(**options, **GRAPHS)
    steps(64, 64)
    assert 'loss' not in vars(steps.model)
    handle = steps.model.neck.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        steps(64, 64)
    handle.remove()
    assert 'loss' not in vars(steps.model)
    assert not steps.model._forward_pre_hooks
    assert steps.backbone.local.session is None


def test_an_operator_that_waits_is_named(capturer):
    steps = Steps(**GRAPHS)
    steps(64, 64)
    loss = steps.model.bbox_head.loss_bbox
    stock = loss.forward
    loss.__class__ = type('Watching', (type(loss),), {'forward': lambda self, *args, **kwargs: stock(*args, **kwargs)})
    with pytest.raises(ConfigError, match=r'RetinaNet has an operator.*waits for the device.*cuda_graphs=False'):
        steps(64, 64)
    assert not capturer.is_capturing


def test_random_numbers_cannot_be_drawn_twice(capturer):
    steps = Steps(**GRAPHS)
    steps.model.neck.register_forward_hook(lambda module, args, outs: tuple(nn.functional.dropout(out) for out in outs))
    with pytest.raises(ConfigError, match=r'draws random numbers.*units that it recomputes \(backbone.layer1.0, ...\)'):
        steps(64, 64)


def test_gradients_from_before_are_refused(capturer):
    steps = Steps(**GRAPHS)
    steps(64, 64)
    steps.model.neck.lateral_convs[0].conv.bias.grad = torch.zeros(32)
    with pytest.raises(ConfigError, match='gradients exist before the step'):
        steps(64, 64)


@pytest.mark.parametrize(
    'options, message',
    [
        ({}, 'one process with one GPU, but the model is on the cpu'),
        ({'optim_wrapper.accumulative_counts': 2}, 'accumulative_counts=1'),
        (
            {'optim_wrapper.update': 'synchronous', 'optim_wrapper.loss_scale': 512.0, 'optim_wrapper.dtype': 'bfloat16'},
            'does not support a loss scaler',
        ),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Steps(**GRAPHS, **options)(64, 64)


@pytest.mark.usefixtures('capturer')
def test_other_heads_are_refused():
    with pytest.raises(ConfigError, match='like RetinaNet.*not RetinaNet with RetinaHead'):
        Steps(**GRAPHS, **{'model.train_cfg.assigner.ignore_iof_thr': 0.5})(64, 64)
