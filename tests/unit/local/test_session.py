"""One training step of a localised model: who gets which gradient, what stays alive, what is refused."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from mmman import LocalLearningOptimWrapper, delocalize_
from mmman.analysis import LiveBytes
from mmman.errors import ConfigError
from tests.toy import block_parameters, classify, task_logits, toy_batches, toy_config


def toy(**options):
    torch.manual_seed(0)
    model = MODELS.build(toy_config(**options)).double()
    model.init_weights()
    sync(model)
    for head in model.backbone.local.values():  # while the bias equals the copy, the scale has no gradient
        for parameter in [*(head.transfer.bias or torch.nn.Identity()).parameters()]:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def sync(model):
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))


def wrapper(model, lr=0.1, **options):
    return LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=lr), **options)


def step(model, optim_wrapper=None, batch=None, **options):
    return model.train_step(batch or toy_batches(1)[0], optim_wrapper or wrapper(model, **options))


def gradients(model):
    """Gradients of one iteration, kept by an accumulation that never ends."""
    step(model, accumulative_counts=10)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('partition', ['stage', 'uniform', ['layer1.0', 'layer3.0']])
def test_gradients_are_those_of_the_own_local_loss_alone(partition):
    model = toy(num_blocks=3, partition=partition)
    got = gradients(model)
    local = model.backbone.local
    for head in local.values():
        head.loss_weight = 0.0
    for weighted, (head, trained) in enumerate(zip(local.values(), block_parameters(model.backbone), strict=True)):
        model.zero_grad()
        head.loss_weight = 1.0
        alone = gradients(model)
        head.loss_weight = 0.0
        ids = {id(p) for p in trained}
        others = {id(p) for i, block in enumerate(block_parameters(model.backbone)) if i != weighted for p in block}
        names = [name for name, p in model.named_parameters() if id(p) in ids and p.requires_grad]
        assert names and all(torch.equal(alone[name], got[name]) and got[name].abs().sum() > 0 for name in names)
        assert all(alone[name].abs().sum() == 0 for name, p in model.named_parameters() if id(p) in others and name in alone)
    task = [
        name
        for name, p in model.named_parameters()
        if all(id(p) not in {*map(id, b)} for b in block_parameters(model.backbone))
    ]
    model.zero_grad()
    alone = gradients(model)
    assert task and all(torch.equal(alone[name], got[name]) for name in task)


def test_every_local_parameter_trains():
    model = toy(num_blocks=7)
    grads = gradients(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert grads[name].abs().sum() > 0, name


def test_loss_weights_scale_local_gradients():
    heavy, plain = toy(loss_weight=[3.0, 1.0, 0.5]), toy()
    ours, theirs = gradients(heavy), gradients(plain)
    weights = dict(zip(plain.backbone.local, (3.0, 1.0, 0.5), strict=True))
    for name in ours:
        factor = next((w for key, w in weights.items() if f'local.{key}.' in name), None)
        if factor is not None:
            torch.testing.assert_close(ours[name], factor * theirs[name])


def test_at_a_boundary_only_its_output_and_taps_stay_alive():
    model = toy(num_blocks=3, partition='stage')
    optim_wrapper = wrapper(model, accumulative_counts=10)
    batch = toy_batches(1)[0]
    alive = {}
    local = model.backbone.local
    starts = [block[0].output for block in local.plan.blocks[1:]]
    for path in starts:
        model.backbone.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: alive.update({path: live.current}))
    with LiveBytes(model, batch) as live:
        expected, held = {}, live.current
        step(model, optim_wrapper, batch)
    grads, scalar = 0, 8
    boundary = [4 * 4 * 16 * 16 * 8, 4 * 8 * 8 * 8 * 8]
    for j, path in enumerate(starts):
        grads += sum(p.numel() * 8 for p in block_parameters(model.backbone)[j] if p.requires_grad)
        logged = 3 * (j + 1) * scalar  # loss, loss_ce, acc
        expected[path] = held + grads + boundary[j] + logged
    assert alive == expected


def test_an_output_from_inside_a_block_is_detached():
    model = toy(num_blocks=2, partition='uniform', net={'units': (1, 1, 5)})
    inner = []
    model.backbone.register_forward_hook(lambda m, a, outs: inner.extend(outs))
    step(model)
    assert [out.requires_grad for out in inner] == [False, True]


def test_normalisation_modes():
    model = toy(num_blocks=3, net={'norm_eval': True})
    step(model.train())
    head = next(iter(model.backbone.local.values()))
    assert not model.backbone.layer1[0].bn.training
    assert not head.transfer.momentum.bn.training and not head.transfer.bias.bn.training
    assert head.fc[1].training and head.fc[1].num_batches_tracked == 1
    assert model.eval().backbone.local.training is False


def test_a_single_block_is_end_to_end_training():
    model = toy(num_blocks=1)
    got = gradients(model)
    model.zero_grad()
    delocalize_(model.backbone)
    batch = toy_batches(1)[0]
    loss = classify(task_logits(model.head, model.backbone(batch['inputs'])), batch['data_samples'])['loss_ce'] / 10
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert all(torch.equal(got[name], g) for name, g in zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_wrapper_needs_a_localised_backbone():
    model = toy(num_blocks=1)
    delocalize_(model.backbone)
    with pytest.raises(ConfigError, match="ToyClassifier has 0 localised backbones.*type='mmman.LocalBackbone'"):
        step(model)


def test_a_copy_of_the_backbone_is_refused():
    """As in teachers and momentum encoders, which are no part of the chain."""
    model = toy(num_blocks=2)
    model.teacher = copy.deepcopy(model.backbone)
    with pytest.raises(ConfigError, match='ToyClassifier has 2 localised backbones.* teacher or momentum encoder: train the'):
        step(model)


def test_copies_that_were_never_set_are_refused():
    model = MODELS.build(toy_config()).double()
    with pytest.raises(ConfigError, match='add dict.*EMABiasHook'):
        step(model)
    plain = MODELS.build(toy_config(transfer={'ema': False, 'bias': False, 'scale': False})).double()
    step(plain)


def test_a_backbone_that_runs_twice_is_refused():
    model = toy()
    forward = model.backbone.forward
    with pytest.raises(ConfigError, match='boundary of block 1 was reached twice'):
        model.backbone.register_forward_pre_hook(lambda m, args: (forward(*args), args)[1])
        step(model)


def test_a_step_that_skips_the_boundaries_is_refused():
    model = toy()
    model.backbone.forward = torch.no_grad()(model.backbone.forward)
    with pytest.raises(ConfigError):
        step(model)
    del model.backbone.forward
    with (
        pytest.raises(ConfigError, match=r'without reaching the boundaries of blocks \[1, 2, 3\]'),
        wrapper(model).optim_context(model),
    ):
        pass
    with pytest.raises(ConfigError, match='call the model, not its backbone'), wrapper(model).optim_context(model):
        model.backbone(toy_batches(1)[0]['inputs'])


def test_an_error_inside_the_step_comes_through_and_ends_the_session():
    model = toy()
    with pytest.raises(ZeroDivisionError), wrapper(model).optim_context(model):
        raise ZeroDivisionError
    assert all(head.session is None for head in model.backbone.local.values())
    step(model)


def test_checkpointing_around_blocks_is_refused():
    from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing

    for path in ('backbone', 'backbone.layer2'):
        model = toy(partition=['layer1.1', 'layer2.0'], num_blocks=3)
        turn_on_activation_checkpointing(model, [path])
        with pytest.raises(ConfigError, match=f'^{path} contains blocks .*activation_checkpointing.*recompute=True'):
            step(model)
    inside = toy(partition=['layer1.1', 'layer2.0'], num_blocks=3)
    plain = gradients(toy(partition=['layer1.1', 'layer2.0'], num_blocks=3))
    turn_on_activation_checkpointing(inside, ['backbone.layer1.0', 'backbone.layer2.0', 'backbone.layer3.1'])
    assert all(torch.equal(plain[name], grad) for name, grad in gradients(inside).items())
