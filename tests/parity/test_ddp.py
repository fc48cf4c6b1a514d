"""Two gloo processes under stock DDP: every gradient is the mean over ranks, every momentum copy the same on all of them."""

import copy

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from torch import multiprocessing

from mmman import LocalLearningOptimWrapper
from tests.toy import toy_batches, toy_config

RANKS, STEPS = 2, 4


def localized_toy():
    torch.manual_seed(0)
    model = MODELS.build(toy_config(num_blocks=4)).double().train()
    for head in model.backbone.local.values():
        head.transfer.sync_(head.source.of(model.backbone))
    return model


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def batch_of(step, rank):
    return toy_batches(STEPS * RANKS)[step * RANKS + rank]


def update_copies(model):
    for head in model.backbone.local.values():
        head.transfer.update_(head.source.of(model.backbone), 0.9)


def train(rank, folder, accumulate):
    """What one rank does; its state after every optimizer step goes to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=RANKS)
    model = localized_toy()
    wrapped = MMDistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False, device_ids=None)
    wrapper = LocalLearningOptimWrapper(optimizer(model), accumulative_counts=accumulate)
    wrapper.initialize_count_status(wrapped, 0, STEPS)
    states = []
    for step in range(STEPS):
        wrapped.train_step(batch_of(step, rank), wrapper)
        if (step + 1) % accumulate == 0:
            update_copies(model)
            states.append(copy.deepcopy(model.state_dict()))
    torch.save(states, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


def expected(accumulate):
    """The same by hand: a model a rank, gradients of its own batches, averaged over ranks, one step for all."""
    models = [localized_toy() for _ in range(RANKS)]
    optimizers = [optimizer(model) for model in models]
    states = []
    for step in range(STEPS):
        for rank, model in enumerate(models):
            wrapper = LocalLearningOptimWrapper(optimizers[rank])
            data = batch_of(step, rank)
            with wrapper.optim_context(model):
                losses = model(**data, mode='loss')
            model.parse_losses(losses)[0].backward()
        if (step + 1) % accumulate:
            continue
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            if parameters[0].grad is not None:
                mean = sum(parameter.grad for parameter in parameters) / RANKS / accumulate
                for parameter in parameters:
                    parameter.grad = mean.clone()
        for model, optim in zip(models, optimizers, strict=True):
            optim.step()
            optim.zero_grad()
            update_copies(model)
        states.append([copy.deepcopy(model.state_dict()) for model in models])
    return states


@pytest.mark.parametrize('accumulate', [1, 2])
def test_gradients_are_the_mean_over_ranks(accumulate, tmp_path):
    multiprocessing.spawn(train, (str(tmp_path), accumulate), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f'{rank}.pth') for rank in range(RANKS)]
    for step, theirs in enumerate(expected(accumulate)):
        for rank in range(RANKS):
            for name, value in theirs[rank].items():
                assert torch.allclose(ranks[rank][step][name], value, rtol=1e-12, atol=1e-14), (
                    f'{name}, rank {rank}, step {step}'
                )
        parameters = {name for name, _ in localized_toy().named_parameters()}
        assert all(torch.equal(ranks[0][step][name], ranks[1][step][name]) for name in parameters)
