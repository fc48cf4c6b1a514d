"""Backward passes and steps of local learning: accumulation, clipping, mixed precision, and the order of updates."""

import copy
import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmman import LocalLearningOptimWrapper
from mmman.errors import ConfigError
from tests.toy import block_parameters, toy_batches
from tests.unit.local.test_session import step, toy, wrapper

pytestmark = pytest.mark.usefixtures('fresh_hub')


def scalars(optim_wrapper):
    return {name: buffer.current() for name, buffer in optim_wrapper.message_hub.log_scalars.items()}


def test_accumulation_steps_once_and_divides_every_loss():
    one, many = toy(), toy()
    optim_wrapper = wrapper(many, accumulative_counts=3)
    for batch in toy_batches(3):
        step(many, optim_wrapper, batch)
    assert optim_wrapper.steps == 1
    many.load_state_dict(one.state_dict())
    ours, theirs = wrapper(one, accumulative_counts=4), wrapper(many, accumulative_counts=2)
    step(one, ours)
    step(many, theirs)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        if a.grad is not None:
            assert torch.equal(2 * a.grad, b.grad)


@pytest.mark.parametrize('scope', ['block', 'global'])
def test_clipping(scope):
    model = toy(num_blocks=3)
    optim_wrapper = wrapper(model, lr=0.0, clip_grad={'max_norm': 0.01}, clip_scope=scope)
    optim_wrapper.zero_grad = lambda: None
    step(model, optim_wrapper)
    blocks = block_parameters(model.backbone)
    owned = {id(p) for block in blocks for p in block}
    groups = [*blocks, [p for p in model.parameters() if id(p) not in owned]]
    norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in group if p.grad is not None)) for group in groups]
    logged = scalars(optim_wrapper)
    if scope == 'block':
        assert norms == pytest.approx([0.01] * 3, rel=1e-3)
        assert {'train/grad_norm', 'train/local/1/grad_norm', 'train/local/2/grad_norm'} <= set(logged)
    else:
        assert math.hypot(*norms) == pytest.approx(0.01, rel=1e-3)
        assert 'train/grad_norm' in logged and 'train/local/1/grad_norm' not in logged


def test_clipping_by_value():
    model = toy()
    optim_wrapper = wrapper(model, lr=0.0, clip_grad={'type': 'value', 'clip_value': 1e-3})
    optim_wrapper.zero_grad = lambda: None
    step(model, optim_wrapper)
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) == pytest.approx(1e-3)


def test_local_learning_rates_by_custom_keys():
    model = toy()
    before = copy.deepcopy(model.state_dict())
    optim_wrapper = build_optim_wrapper(
        model,
        {
            'type': 'mmman.LocalLearningOptimWrapper',
            'optimizer': {'type': 'SGD', 'lr': 0.1, 'weight_decay': 0.01},
            'paramwise_cfg': {'custom_keys': {'backbone.local': {'lr_mult': 0.0}}},
        },
    )
    step(model, optim_wrapper)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ('.local.' in name), name


def single_precision():
    return toy(num_blocks=3).float(), toy_batches(1, dtype=torch.float32)[0]


def test_bfloat16_runs_local_heads_under_autocast_and_their_backward_outside():
    model, batch = single_precision()
    seen = []
    head = next(iter(model.backbone.local.values()))
    head.fc.register_forward_hook(lambda m, a, out: seen.append((torch.is_autocast_enabled('cpu'), out.dtype)))
    head.fc[0].register_full_backward_hook(lambda *args: seen.append(torch.is_autocast_enabled('cpu')))
    optim_wrapper = wrapper(model, dtype='bfloat16')
    optim_wrapper.zero_grad = lambda: None
    step(model, optim_wrapper, batch)
    assert seen == [(True, torch.bfloat16), False]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    exact, _ = single_precision()
    plain = wrapper(exact)
    plain.zero_grad = lambda: None
    step(exact, plain, batch)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        if ours.grad is not None:
            assert (
                torch.nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.9
                or ours.numel() < 9
            ), name


@pytest.mark.parametrize('loss_scale', ['dynamic', 1024.0, {'init_scale': 1024.0}])
def test_a_loss_scale_leaves_the_update_as_it_is(loss_scale):
    """Powers of two scale and unscale exactly."""
    model, batch = single_precision()
    plain, _ = single_precision()
    options = {'clip_grad': {'max_norm': 0.1}}
    ours = wrapper(model, dtype='bfloat16', loss_scale=loss_scale, **options)
    theirs = wrapper(plain, dtype='bfloat16', **options)
    for _ in range(2):
        step(model, ours, batch)
        step(plain, theirs, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize('loss_scale', ['dynamic', 1024.0])
@pytest.mark.parametrize('fused', [False, True])  # a fused optimizer is called all the same and skips by itself
def test_an_overflow_skips_the_step_and_the_count(loss_scale, fused):
    model, batch = single_precision()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    optim_wrapper = LocalLearningOptimWrapper(optimizer, dtype='bfloat16', loss_scale=loss_scale)
    step(model, optim_wrapper, batch)
    before = copy.deepcopy(model.state_dict())
    head = [*model.backbone.local.values()][1]
    loss, head.loss = head.loss, lambda *args: {'loss_ce': loss(*args)['loss_ce'] * float('inf')}
    step(model, optim_wrapper, batch)
    assert optim_wrapper.steps == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    head.loss = loss
    step(model, optim_wrapper, batch)
    assert optim_wrapper.steps == 2


def test_state_dict_round_trip_keeps_steps_and_scale():
    model, batch = single_precision()
    optim_wrapper = wrapper(model, dtype='bfloat16', loss_scale={'init_scale': 512.0})
    step(model, optim_wrapper, batch)
    state = optim_wrapper.state_dict()
    other = wrapper(model, dtype='bfloat16', loss_scale='dynamic')
    other.load_state_dict(state)
    assert other.steps == 1 and other.loss_scaler.get_scale() == 512.0
    plain = wrapper(model)
    plain.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())  # a stock checkpoint's
    assert plain.steps == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'clip_scope': 'layer'}, "expected 'block' or 'global'"),
        ({'update': 'late'}, "expected 'synchronous' or 'immediate'"),
        (
            {'update': 'immediate', 'clip_scope': 'global', 'clip_grad': {'max_norm': 1.0}},
            "never has all gradients at once: clip_scope='global' requires",
        ),
        ({'update': 'immediate', 'dtype': 'bfloat16', 'loss_scale': 8.0}, 'steps before a loss scaler knows'),
        ({'use_fsdp': True}, 'use_fsdp is not supported'),
        ({'dtype': 'float64'}, "dtype='float64': expected"),
        ({'dtype': 'bfloat16', 'loss_scale': 'static'}, "loss_scale='static': expected"),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(ConfigError, match=message):
        wrapper(toy(), **options)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_an_iteration_without_a_task_loss_is_finished_like_any_other(accumulate):
    ours, theirs = toy(num_blocks=3), toy(num_blocks=3)
    for parameter in theirs.head.parameters():
        parameter.requires_grad_(False)
    task_scope = [*ours.backbone.layer3.parameters(), *ours.head.parameters()]
    options = {'accumulative_counts': accumulate, 'clip_grad': {'max_norm': 0.1}}
    without, complete = wrapper(ours, **options), wrapper(theirs, **options)
    before = [p.clone() for p in task_scope]
    for batch in toy_batches(2 * accumulate):
        with without.optim_context(ours):
            ours(**batch, mode='loss')
        without.finish_iteration()
        step(theirs, complete, batch)
    assert without.steps == complete.steps == 2 and without.inner_count == complete.inner_count
    assert scalars(without).keys() >= {'train/local/1/loss', 'train/local/2/loss', 'train/local/1/grad_norm'}
    for block, other in zip(*(block_parameters(m.backbone) for m in (ours, theirs)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(block, other, strict=True))
        assert all(p.grad is None for p in block)
    assert all(torch.equal(a, b) for a, b in zip(task_scope, before, strict=True))


def test_immediate_with_a_global_scope_that_clips_by_value():
    model = toy()
    optim_wrapper = wrapper(model, update='immediate', clip_scope='global', clip_grad={'type': 'value', 'clip_value': 1e-3})
    step(model, optim_wrapper)
    assert optim_wrapper.steps == 1


def test_a_model_wrapper_may_have_no_reducers():
    """As a pipeline's stage has none: it only says when all is there."""
    model, plain = toy(), toy()
    waited = []
    model.block_reducers, model.wait = {}, lambda: waited.append(True)
    step(model, wrapper(model, update='immediate'))
    step(plain, wrapper(plain))
    assert waited == [True]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
