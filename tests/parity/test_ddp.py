"""Several gloo processes against one: gradients are the mean over ranks of the local ones, parameters the same on all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.utils import clip_grad_norm_

from mmman import LocalDistributedDataParallel, LocalLearningOptimWrapper
from mmman.parallel import ddp as ddp_module
from tests.parity.ranks import assert_same_on_all_ranks, run_ranks
from tests.toy import block_parameters, toy_batches, toy_config

STEPS = 4


def localized_toy(**options):
    torch.manual_seed(0)
    model = MODELS.build(toy_config(num_blocks=4, **options)).double().train()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return model


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def batch_of(step, rank, world):
    return toy_batches(STEPS * world)[step * world + rank]


def update_copies(model):
    for head in model.backbone.local.values():
        head.transfer.ema_update_(head.source.of(model.backbone), 0.9)


def to_another_tensor(state, bucket):
    """A hook whose result isn't the bucket's own buffer: gradients are local ones until somebody waits for it."""
    mean = bucket.buffer() / dist.get_world_size()
    return dist.all_reduce(mean, async_op=True).get_future().then(lambda future: future.value()[0])


def summing(state, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


SELECTIVE = {'selective_recompute': ['layer2.1', 'layer3']}
OURS = {'wrapper': LocalDistributedDataParallel}
SETTINGS = {
    'stock': {'wrapper': MMDistributedDataParallel, 'ddp': {'find_unused_parameters': True}},
    'stock, accumulation': {
        'wrapper': MMDistributedDataParallel,
        'ddp': {'find_unused_parameters': True},
        'optim': {'accumulative_counts': 2},
    },
    'ours': OURS,
    'accumulation': {**OURS, 'optim': {'accumulative_counts': 2}},
    'accumulation, zeros': {**OURS, 'optim': {'accumulative_counts': 2}, 'set_to_none': False},
    'clipping': {**OURS, 'optim': {'clip_grad': {'max_norm': 0.1}}},
    'global clipping': {**OURS, 'optim': {'clip_grad': {'max_norm': 0.1}, 'clip_scope': 'global'}},
    'many buckets': {**OURS, 'ddp': {'bucket_cap_mb': 0.001}},
    'unused': {**OURS, 'ddp': {'bucket_cap_mb': 0.001, 'find_unused_parameters': True}, 'optim': {'accumulative_counts': 2}},
    'no views': {**OURS, 'ddp': {'gradient_as_bucket_view': False}},
    'buffers': {**OURS, 'ddp': {'broadcast_buffers': True}},
    'immediate': {**OURS, 'optim': {'update': 'immediate'}},
    'immediate, accumulation': {**OURS, 'optim': {'update': 'immediate', 'accumulative_counts': 2}},
    'immediate, clipping': {**OURS, 'optim': {'update': 'immediate', 'clip_grad': {'max_norm': 0.1}}},
    'another tensor': {**OURS, 'hook': (None, to_another_tensor)},
    'a later unit': {**OURS, 'model': {'transfer': {'source_unit': 'next_stage'}}},
    'recompute': {**OURS, 'ddp': {'bucket_cap_mb': 0.001}, 'model': {'recompute': ['layer1', 'layer2.0'], **SELECTIVE}},
}
COMPRESSED = {**OURS, 'hook': (None, fp16_compress_hook)}
MUTATIONS = {
    'never reduced': ({}, (ddp_module.BlockReducer, 'prepare', lambda self, loss: loss)),
    'not waited': ({'hook': (None, to_another_tensor)}, (ddp_module._Buckets, 'wait', lambda self: self.launched.clear())),
    'a sum': ({'hook': (None, summing)}, None),
    'always no_sync': ({'optim': {'accumulative_counts': 2}}, (LocalLearningOptimWrapper, 'should_sync', lambda self: False)),
    'stepped before it is reduced': (
        {'optim': {'update': 'immediate'}, 'hook': (None, to_another_tensor)},
        (ddp_module.BlockReducer, 'wait', lambda self: None),
    ),
}


def train(rank, world, wrapper=None, ddp=None, optim=None, hook=None, set_to_none=True, model=None):
    """The model's state after every optimizer step of one rank."""
    model = localized_toy(**(model or {}))
    if rank:  # what ranks start from is rank 0's
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    options = {'broadcast_buffers': False, 'device_ids': None, **(ddp or {})}
    wrapped = wrapper(model, **options)
    if hook:
        wrapped.register_comm_hook(*hook)
    optim_wrapper = LocalLearningOptimWrapper(optimizer(model), **(copy.deepcopy(optim) or {}))
    optim_wrapper.initialize_count_status(wrapped, 0, STEPS)
    states = []
    for step in range(STEPS):
        with optim_wrapper.optim_context(wrapped):
            losses = wrapped(**batch_of(step, rank, world), mode='loss')
        loss = model.parse_losses(losses)[0]
        optim_wrapper.update_params(loss, zero_kwargs={'set_to_none': set_to_none})
        if optim_wrapper.should_update():
            update_copies(model)
            states.append(copy.deepcopy(model.state_dict()))
    return states


def expected(world, accumulative_counts=1, clip_grad=None, clip_scope='block', update=None, transfer=None):
    """The same by hand: a model a rank, gradients of its own batches, averaged over ranks, one step for all."""
    models = [localized_toy(transfer=transfer) for _ in range(world)]
    optimizers = [optimizer(model) for model in models]
    states = []
    for step in range(STEPS):
        for rank, model in enumerate(models):
            wrapper = LocalLearningOptimWrapper(optimizers[rank])
            data = batch_of(step, rank, world)
            with wrapper.optim_context(model):
                losses = model(**data, mode='loss')
            model.parse_losses(losses)[0].backward()
        if (step + 1) % accumulative_counts:
            continue
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            if parameters[0].grad is not None:
                mean = sum(parameter.grad for parameter in parameters) / world / accumulative_counts
                for parameter in parameters:
                    parameter.grad = mean.clone()
        for model, optim in zip(models, optimizers, strict=True):
            if clip_grad:
                blocks = block_parameters(model.backbone) if clip_scope == 'block' else []
                owned = {p for block in blocks for p in block}
                for scope in (*blocks, [p for p in model.parameters() if p not in owned]):
                    clip_grad_norm_(scope, **clip_grad)
            optim.step()
            optim.zero_grad()
            update_copies(model)
        states.append([copy.deepcopy(model.state_dict()) for model in models])
    return states


def difference(states, theirs, rank, names):
    """The first tensor that isn't what it should be, or None."""
    for step, (ours, by_rank) in enumerate(zip(states, theirs, strict=True)):
        for name in names:
            if not torch.allclose(ours[name], by_rank[rank][name], rtol=1e-12, atol=1e-14):
                return f'{name}, rank {rank}, step {step}'
    return None


def check_settings(rank, world):
    parameters = [name for name, _ in localized_toy().named_parameters()]
    computed = {}
    for name, setting in SETTINGS.items():
        states = train(rank, world, **setting)
        options = {**setting.get('optim', {}), 'transfer': setting.get('model', {}).get('transfer')}
        if repr(options) not in computed:
            computed[repr(options)] = expected(world, **options)
        theirs = computed[repr(options)]
        # with broadcast_buffers every rank has the running statistics of rank 0's batches
        names = parameters if name == 'buffers' else [*states[0]]
        assert len(states) == len(theirs)
        assert difference(states, theirs, rank, names) is None, f'{name}: {difference(states, theirs, rank, names)}'
        assert_same_on_all_ranks({f'{name}: {key}': states[-1][key] for key in parameters})
    states = train(rank, world, **COMPRESSED)
    assert_same_on_all_ranks({key: states[-1][key] for key in parameters})
    for key in parameters:
        torch.testing.assert_close(states[0][key], computed[repr({'transfer': None})][0][rank][key], rtol=0, atol=1e-4)


def check_mutations(rank, world):
    parameters = [name for name, _ in localized_toy().named_parameters()]
    for name, (setting, patch) in MUTATIONS.items():
        setting = {**OURS, **setting}
        theirs = expected(world, **setting.get('optim', {}))
        if patch:
            owner, attribute, broken = patch
            whole = getattr(owner, attribute)
            setattr(owner, attribute, broken)
        try:
            states = train(rank, world, **setting)
        finally:
            if patch:
                setattr(owner, attribute, whole)
        assert difference(states, theirs, rank, parameters), f'{name}: nobody noticed'


@pytest.mark.parametrize('world', [2, 4])
def test_ranks_train_as_by_hand(world, tmp_path):
    run_ranks(check_settings, world, tmp_path)


def test_a_broken_reduction_fails(tmp_path):
    run_ranks(check_mutations, 2, tmp_path)
