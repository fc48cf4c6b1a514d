"""update='immediate' trains bit by bit as 'synchronous' does, and holds one block's gradients at a time."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmman.analysis import LiveBytes
from mmman.engine.block_parameters import parameters_by_block
from tests.toy import block_parameters, toy_batches
from tests.unit.local.test_session import step, toy

SGD = {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9, 'weight_decay': 1e-3}
ADAMW = {'type': 'AdamW', 'lr': 0.01, 'weight_decay': 0.05}
BY_NAME = {'custom_keys': {'layer1': {'lr_mult': 0.1}, 'bn': {'decay_mult': 0.0}}}


def optim_wrapper_of(model, update='immediate', optimizer=SGD, **options):
    kind = {'type': 'mmman.LocalLearningOptimWrapper', 'update': update, 'optimizer': optimizer, **options}
    return build_optim_wrapper(model, copy.deepcopy(kind))


def update_copies(model):
    for head in model.backbone.local.values():
        head.transfer.ema_update_(head.source.of(model.backbone), 0.9)


def compare(model, batches, **options):
    """Train twice; states are compared after every iteration."""
    other = copy.deepcopy(model)
    ours, theirs = optim_wrapper_of(model, **options), optim_wrapper_of(other, 'synchronous', **options)
    before = copy.deepcopy(model.state_dict())
    for batch in batches:
        model.train_step(copy.deepcopy(batch), ours)
        other.train_step(copy.deepcopy(batch), theirs)
        assert (ours.steps, ours.inner_count) == (theirs.steps, theirs.inner_count)
        for name, value in other.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        update_copies(model)
        update_copies(other)
    for scope in parameters_by_block(model):
        assert any(not torch.equal(p, before[name]) for name, p in scope.items())


@pytest.mark.parametrize('optimizer', [SGD, ADAMW], ids=lambda optimizer: optimizer['type'])
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('max_norm', [None, 0.05])
@pytest.mark.parametrize('paramwise', [None, BY_NAME], ids=['one group', 'a group a parameter'])
def test_toy(optimizer, accumulate, max_norm, paramwise):
    clip = {'max_norm': max_norm} if max_norm else None
    options = {'optimizer': optimizer, 'accumulative_counts': accumulate, 'clip_grad': clip, 'paramwise_cfg': paramwise}
    compare(toy(num_blocks=4), toy_batches(4), **options)


def test_retinanet():
    pytest.importorskip('mmdet')
    from tests.parity.test_ddp_models import retinanet

    model, batch = retinanet()
    compare(model, [batch(0), batch(1)], clip_grad={'max_norm': 1.0})


def test_classifier():
    pytest.importorskip('mmpretrain')
    from tests.parity.test_ddp_models import vit

    model, batch = vit()
    compare(model, [batch(0), batch(1), batch(2), batch(3)], optimizer=ADAMW, accumulative_counts=2)


@pytest.mark.parametrize('update', ['immediate', 'synchronous'])
def test_gradients_alive_at_the_start_of_a_block(update):
    model = toy(num_blocks=3, partition='stage')
    batch = toy_batches(1)[0]
    optim_wrapper = optim_wrapper_of(model, update, optimizer={'type': 'SGD', 'lr': 0.1})
    step(model, optim_wrapper, batch)  # what the first step makes for good
    alive = {}
    for path in ('layer2.0', 'layer3.0'):
        model.backbone.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: alive.update({path: live.current}))
    optim_wrapper.zero_grad()
    with LiveBytes(model, batch) as live:
        held = live.current
        step(model, optim_wrapper, batch)
    sizes = [sum(p.numel() * 8 for p in block if p.requires_grad) for block in block_parameters(model.backbone)]
    output = {'layer2.0': 4 * 4 * 16 * 16 * 8, 'layer3.0': 4 * 8 * 8 * 8 * 8}
    logged = {'layer2.0': 3 * 8, 'layer3.0': 6 * 8}  # loss, loss_ce, acc of every head
    gradients = {'layer2.0': sizes[0], 'layer3.0': sum(sizes)} if update == 'synchronous' else {'layer2.0': 0, 'layer3.0': 0}
    assert alive == {path: held + output[path] + logged[path] + gradients[path] for path in output}


def test_no_step_while_accumulating_and_every_step_is_counted_once():
    model = toy(num_blocks=3)
    optim_wrapper = optim_wrapper_of(model, accumulative_counts=3)
    before = copy.deepcopy(model.state_dict())
    for i, batch in enumerate(toy_batches(3)):
        step(model, optim_wrapper, batch)
        same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert (same, optim_wrapper.steps) == ((True, 0) if i < 2 else (False, 1))
    assert [len(group['params']) for group in optim_wrapper.optimizer.param_groups] == [len([*model.parameters()])]


def test_a_block_steps_before_the_next_one_runs():
    model = toy(num_blocks=3, partition='stage')
    optim_wrapper = optim_wrapper_of(model)
    before = model.backbone.layer1[0].conv.weight.clone()
    seen = []
    model.backbone.layer2[0].register_forward_pre_hook(
        lambda *_: seen.append(torch.equal(model.backbone.layer1[0].conv.weight, before))
    )
    step(model, optim_wrapper)
    assert seen == [False]
