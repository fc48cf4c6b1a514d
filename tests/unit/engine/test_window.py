"""Windows of several blocks: gradients, graphs that are alive, options. Training is in tests/parity/test_mlaan.py."""

import copy
import weakref

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn.parallel import DistributedDataParallel

from mmman import delocalize_, localize_
from mmman.engine.checks import check_model
from mmman.engine.window import WindowSession
from mmman.errors import ConfigError, NonFiniteLossError
from tests.toy import classify, task_logits, toy_batches
from tests.unit.local.test_session import gradients, step, toy, wrapper

LINEAR = {'type': 'mmman.LinearLocalHead', 'head': {'type': 'mmman.ToyLinearHead', 'num_classes': 5}}


def windowed(window=2, **options):
    return toy(window=window, independent_head=LINEAR, **options)


@pytest.mark.parametrize('window', [2, 3, 4])
def test_the_last_window_is_both_streams_through_the_models_head(window):
    """0.001 and 0.999 of the task loss, of the last block alone and of the cascade, in two forward passes."""
    model = windowed(window)
    for head in model.backbone.local.values():
        head.loss_weight = 0.0
    got = gradients(model)  # of an accumulation of 10

    other = windowed(window)
    blocks = other.backbone.local.plan.blocks
    names = [unit.name for block in blocks for unit in block]
    backbone = delocalize_(other.backbone)
    batch = toy_batches(1)[0]

    def loss(detached):
        x, taps = batch['inputs'], []
        for name in names:
            x = backbone.get_submodule(name)(x)
            taps += [x] if name in ('layer2.1', 'layer3.1') else []
            x = x.detach() if name == detached else x
        isolated = [
            tap if name in {unit.name for unit in blocks[-1]} else tap.detach()
            for name, tap in zip(['layer2.1', 'layer3.1'], taps, strict=True)
        ]
        return classify(task_logits(other.head, isolated), batch['data_samples'])['loss_ce']

    before_window = blocks[-1 - window][-1].name if window < len(blocks) else None
    (0.001 * loss(blocks[-2][-1].name) + 0.999 * loss(before_window)).backward()
    theirs = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    trained = [name for name, grad in got.items() if '.local.' not in name and grad.abs().sum() > 0]
    assert {*trained} == {name for name, grad in theirs.items() if grad.abs().sum() > 0}
    for name in trained:
        torch.testing.assert_close(10 * got[name], theirs[name], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize('window', [2, 3])
def test_graphs_outlive_their_window_by_nothing(window, monkeypatch):
    outputs, alive = [], []
    train_block = WindowSession.train_block

    def watched(self, head, x):
        outputs.append(weakref.ref(x))
        result = train_block(self, head, x)
        del x
        alive.append(sum(output() is not None for output in outputs[:-1]))
        return result

    monkeypatch.setattr(WindowSession, 'train_block', watched)
    model = windowed(window, num_blocks=6)
    step(model)
    assert alive == [min(j, window - 2) for j in range(5)]
    assert not any(output() is not None for output in outputs)


def test_without_windows_nothing_changes(monkeypatch):
    monkeypatch.setattr(WindowSession, '__init__', None)
    model = toy(window=1)
    assert gradients(model).keys() == gradients(toy()).keys()
    assert all(head.independent is None for head in model.backbone.local.values())


def test_outputs_and_keys_are_the_stock_models():
    model = windowed().eval()
    stock = copy.deepcopy(model)
    delocalize_(stock.backbone)
    images = toy_batches(1)[0]['inputs']
    assert torch.equal(model(images), stock(images))
    assert {key for key in model.state_dict() if '.local.' not in key} == stock.state_dict().keys()
    keys = [key for key in model.state_dict() if '.independent.' in key]
    assert len(keys) == 2 * 3 and all(key.startswith('backbone.local.') for key in keys)


def test_accumulated_gradients_are_means():
    model, other = windowed(), windowed()
    batch = toy_batches(1)[0]
    once, twice = wrapper(model), wrapper(other, accumulative_counts=2)
    step(model, once, batch)
    for _ in range(2):
        step(other, twice, batch)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)


def test_recomputed_units():
    plain = gradients(windowed())
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients(windowed(recompute=True)).items())
    with pytest.raises(ConfigError, match='selective_recompute back-propagates through a unit once, but window=2'):
        windowed(selective_recompute=['layer2'])


def test_norms_on_outputs_from_inside_blocks_are_refused():
    pytest.importorskip('mmdet')
    net = {
        'type': 'mmdet.SwinTransformer',
        'embed_dims': 8,
        'depths': (1, 1, 1, 1),
        'num_heads': (1, 1, 1, 1),
        'window_size': 2,
    }
    with pytest.raises(ConfigError, match='window=2 does not support norms on outputs from inside the first K-1 blocks'):
        localize_(MODELS.build(net), 4, {'type': 'mmman.ToyLocalHead'}, window=2, independent_head=LINEAR)


def test_autocast():
    model = windowed().float()
    step(model, wrapper(model, dtype='bfloat16'), toy_batches(1, dtype=torch.float32)[0])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_both_losses_are_logged_and_checked():
    model = windowed()
    optim_wrapper = wrapper(model)
    step(model, optim_wrapper)
    log = {name: float(value.current()) for name, value in optim_wrapper.message_hub.log_scalars.items()}
    total, cascade, own = (log[f'train/local/1/{name}'] for name in ('loss', 'loss_ce', 'independent_loss_ce'))
    assert total == pytest.approx(0.001 * own + 0.999 * cascade, rel=1e-6)
    next(iter(model.backbone.local.values())).independent.head.fc.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError):
        step(model, optim_wrapper)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'update': 'immediate'}, "window=2 .*: set optim_wrapper.update='synchronous'"),
        ({'images_per_chunk': 1}, 'window=2 .*, so optim_wrapper.images_per_chunk=1 is not supported'),
        ({'cuda_graphs': True}, 'window=2 .*, so optim_wrapper.cuda_graphs=True is not supported'),
    ],
)
def test_options_that_need_isolated_blocks(options, message):
    model = windowed()
    with pytest.raises(ConfigError, match=message):
        step(model, wrapper(model, **options))


def test_data_parallel_training_is_refused():
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(model)
    model.module, model.static_graph, model.find_unused_parameters = windowed(), False, True
    with pytest.raises(
        ConfigError, match='window=2 back-propagates through a block several times, which DistributedDataParallel'
    ):
        check_model(model)
