"""The wrapper and its reducers; a group of one process is enough for what is checked here."""

import copy

import pytest
import torch
import torch.distributed as dist
from mmengine.model import convert_sync_batchnorm, is_model_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future

from mmman import LocalDistributedDataParallel
from mmman.engine.block_parameters import parameters_by_block
from mmman.errors import ConfigError
from mmman.parallel import BlockReducer
from tests.toy import toy_batches
from tests.unit.local.test_session import gradients, step, toy, wrapper


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def double(state, bucket):
    """A hook whose result, twice the gradients, comes later and in another tensor."""
    state.append(Future())
    state[-1].result = 2 * bucket.buffer()
    return state[-1]


def finish(futures):
    while futures:
        future = futures.pop()
        future.set_result(future.result)


@pytest.mark.parametrize('num_blocks', [1, 2, 4])
@pytest.mark.parametrize('options', [{}, {'find_unused_parameters': True, 'bucket_cap_mb': 0.001}], ids=str)
def test_one_process_trains_as_without(num_blocks, options):
    plain, model = toy(num_blocks=num_blocks), toy(num_blocks=num_blocks)
    parallel = LocalDistributedDataParallel(model, **options)
    assert len(parallel.block_reducers) == num_blocks - 1
    ours, theirs = wrapper(parallel, accumulative_counts=2), wrapper(plain, accumulative_counts=2)
    for batch in toy_batches(6):
        step(parallel, ours, batch)
        step(plain, theirs, batch)
    assert ours.steps == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_a_wrapped_model_shows_no_trace():
    model = toy()
    attributes = {name: {*vars(module)} for name, module in model.named_modules()}
    parallel = LocalDistributedDataParallel(model, device_ids=[0])
    assert is_model_wrapper(parallel)
    assert [*parallel.state_dict()] == [f'module.{key}' for key in model.state_dict()]
    assert len([*parallel.parameters()]) == len([*model.parameters()])
    assert {name: {*vars(module)} for name, module in model.named_modules()} == attributes
    assert not any(hasattr(tensor, '_ddp_ignored') for tensor in (*model.parameters(), *model.buffers()))
    copy.deepcopy(model)


def test_what_the_user_hid_from_ddp_stays_hidden():
    model = toy()
    model._ddp_params_and_buffers_to_ignore = ['head.0.bias']
    parallel = LocalDistributedDataParallel(model)
    assert model._ddp_params_and_buffers_to_ignore == ['head.0.bias']
    assert 'head.0.bias' in parallel.parameters_to_ignore


@pytest.mark.parametrize('option', ['static_graph', 'mixed_precision', 'delay_all_reduce_named_params'])
def test_options_without_a_meaning(option):
    with pytest.raises(ConfigError, match=f'does not take {option}'):
        LocalDistributedDataParallel(toy(), **{option: True})


@pytest.mark.parametrize(
    ('first', 'second', 'blocks'),
    [
        ('backbone.layer1.1.conv', 'backbone.layer2.1.conv', '1 and 2'),
        ('backbone.layer1.1.conv', 'head.0', '1 and 3'),
        ('backbone.layer1.1.conv', 'backbone.local.layer1_1.fc.0', None),  # in the same block: fine
    ],
)
def test_a_parameter_in_two_blocks_is_refused_by_name(first, second, blocks):
    model = toy(num_blocks=3, partition=['layer1.1', 'layer2.1'])
    model.get_submodule(second).weight = model.get_submodule(first).weight
    if blocks is None:
        *scopes, _ = parameters_by_block(model)
        assert f'{first}.weight' in scopes[0] and f'{second}.weight' not in scopes[0]
        return
    for refused in (lambda: LocalDistributedDataParallel(model), lambda: step(model)):
        with pytest.raises(ConfigError, match=f'{first}.weight and {second}.weight are the same parameter.* blocks {blocks},'):
            refused()


@pytest.mark.parametrize(
    ('path', 'blamed'), [('backbone.layer1.1', 'backbone.layer1.1.unused'), ('head', 'head.unused')], ids=['block', 'task']
)
def test_a_parameter_without_gradient_is_named_at_once(path, blamed):
    models = toy(), toy()
    for model in models:
        model.get_submodule(path).unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parallel = LocalDistributedDataParallel(models[0])
    with pytest.raises(ConfigError, match=f'^{blamed} got no gradient.*find_unused_parameters=True'):
        step(parallel, wrapper(models[0]))
    parallel = LocalDistributedDataParallel(model, find_unused_parameters=True)
    optim_wrapper = wrapper(model)
    for _ in range(3):
        step(parallel, optim_wrapper)
    assert not model.get_parameter(blamed).any()


def test_conversion_to_sync_batchnorm_keeps_the_scopes():
    model = toy(num_blocks=3)
    names = [[*scope] for scope in parameters_by_block(model)]
    converted = parameters_by_block(convert_sync_batchnorm(model))
    assert [[*scope] for scope in converted] == names
    assert all(model.get_parameter(name) is p for scope in converted for name, p in scope.items())


def test_bfloat16_and_a_loss_scale():
    batch = toy_batches(1, dtype=torch.float32)[0]
    plain, model = toy().float(), toy().float()
    options = {'dtype': 'bfloat16', 'loss_scale': 1024.0, 'clip_grad': {'max_norm': 0.1}}
    parallel = LocalDistributedDataParallel(model)
    ours, theirs = wrapper(parallel, **options), wrapper(plain, **options)
    for _ in range(3):
        step(parallel, ours, batch)
        step(plain, theirs, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_reduction_isnt_waited_for_before_the_end_of_the_iteration():
    model = toy(num_blocks=3)
    alone = gradients(toy(num_blocks=3))
    parallel = LocalDistributedDataParallel(model)
    futures, seen = [], {}
    for reducer in parallel.block_reducers.values():
        reducer.register_comm_hook(futures, double)
    names = [[*scope] for scope in parameters_by_block(model)]

    def at_last_block(*_):
        seen.update({name: model.get_parameter(name).grad.clone() for name in names[1]})
        finish(futures)

    model.backbone.register_forward_hook(at_last_block)
    optim_wrapper = wrapper(model)
    optim_wrapper.step = optim_wrapper.zero_grad = lambda: None
    step(parallel, optim_wrapper)
    for name in (*names[0], *names[1]):
        torch.testing.assert_close(model.get_parameter(name).grad, 20 * alone[name], rtol=1e-12, atol=1e-14)
    for name in names[1]:
        torch.testing.assert_close(seen[name], 10 * alone[name], rtol=1e-12, atol=1e-14)
    for name in names[2]:
        torch.testing.assert_close(model.get_parameter(name).grad, 10 * alone[name], rtol=1e-12, atol=1e-14)


def test_a_reducer_serves_any_block_and_group():
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    layer(x).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    futures = []
    reducer = BlockReducer(layer.parameters(), process_group=dist.new_group([0]), bucket_cap_mb=1)
    reducer.register_comm_hook(futures, double)
    for _ in range(3):
        layer.zero_grad(set_to_none=False)
        with reducer.no_sync():
            reducer.prepare(layer(x).sum()).backward()
        reducer.wait()
        assert not futures
        reducer.prepare(layer(x).sum()).backward()
        finish(futures)
        reducer.wait()
        for parameter, gradient in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 4 * gradient)


def test_blocks_do_not_share_the_state_of_a_hook():
    model = toy(num_blocks=3, transfer={'scale': False}).float()
    parallel = LocalDistributedDataParallel(model)
    states = []

    def state():
        states.append(PowerSGDState(None, 1, start_powerSGD_iter=2))
        return states[-1]

    with pytest.raises(ConfigError, match=r'share one PowerSGDState.*register_comm_hook\(lambda: PowerSGDState'):
        parallel.register_comm_hook(PowerSGDState(None, 1), powerSGD_hook)
    parallel.register_comm_hook(state, powerSGD_hook)
    optim_wrapper = wrapper(model)
    for batch in toy_batches(4, dtype=torch.float32):
        step(parallel, optim_wrapper, batch)
    assert len(states) == 3 and all(state.iter == 4 for state in states)
    with pytest.raises(RuntimeError, match='only be called once'):
        parallel.register_comm_hook(None, powerSGD_hook)
