"""Trains a model by mmengine's Runner and the reference beside it, and compares both bit by bit after every iteration."""

import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmman.partition import chain_of
from mmman.partition.chain import UnitSequence
from tests.parity.reference import Head, Reference

ROWS = {
    'local': {'ema': False, 'bias': False, 'scale': False},
    'ema': {'ema': True, 'bias': False, 'scale': False},
    'man': {'ema': True, 'bias': 'unit', 'scale': False},
    'manpp': {'ema': True, 'bias': 'unit', 'scale': True},
}


def with_relu(stem):
    """A ResNet's stem with the activation that its forward puts in front of the pooling."""
    if isinstance(stem[-1], torch.nn.MaxPool2d):
        stem.insert(len(stem) - 1, torch.nn.ReLU())
    return stem


def reference_of(
    backbone,
    task_modules,
    row,
    local_task,
    local_loss,
    task_loss,
    stem=None,
    wrap=lambda unit: unit,
    leaps=None,
    own_loss=None,
    **options,
):
    """The reference for a localised backbone: deep copies of its modules, cut where its plan says, without its machinery.

    Args:
        backbone: Localised, with the weights that training starts from.
        task_modules: The model's own neck and head.
        row: The ablation's switches.
        local_task: From a local head to the modules of its task head.
        local_loss: (j, task head, y, batch) to the local loss.
        task_loss: (task modules, features, batch) to the task loss.
        stem: (backbone, its modules in a Sequential) to the module that does what the backbone does in front of its units.
        wrap: From a unit's modules in a Sequential to a module that runs them, where it takes more than one after the other.
        leaps: For every local head, the names of the units that LAM samples. The first is the source of E and B; the head's
            ``units`` are like the others.
        own_loss: (independent head's classifier, x, batch) to the loss of a block alone, in windows of blocks.
    """
    hooks_free = copy.deepcopy(backbone)
    del hooks_free.local
    for module in hooks_free.modules():
        module._forward_hooks.clear()
    chain = chain_of(hooks_free)
    names = [unit.name for unit in chain.units]
    units = [torch.nn.Sequential(*(hooks_free.get_submodule(path) for path in unit.modules)) for unit in chain.units]
    units = [stem(hooks_free, units[0]) if stem else with_relu(units[0]), *map(wrap, units[1:])]
    cuts = [names.index(block[-1].name) for block in backbone.local.plan.blocks[:-1]]
    heads = []
    for j, (cut, head) in enumerate(zip(cuts, backbone.local.values(), strict=True)):
        source = units[names.index(leaps[j][0]) if leaps else cut + 1]
        heads.append(
            Head(
                source=source,
                momentum=copy.deepcopy(source).requires_grad_(False) if row['ema'] else None,
                bias=copy.deepcopy(source) if row['bias'] else None,
                delta=torch.nn.Parameter(torch.zeros_like(head.transfer.delta)) if row['scale'] else None,
                task=copy.deepcopy(local_task(head)),
                loss=lambda y, batch, j=j: local_loss(j, heads[j].task, y, batch),
                later=[*copy.deepcopy(head.units)] if leaps else [],
                own=copy.deepcopy(head.independent.head) if own_loss else None,
                own_loss=lambda x, batch, j=j: own_loss(heads[j].own, x, batch),
            )
        )
    own = [copy.deepcopy(module) for module in task_modules]
    return Reference(units, cuts, list(chain.out_units), heads, own, lambda f, batch: task_loss(own, f, batch), **options)


@HOOKS.register_module()
class LockStepHook(Hook):
    """After every iteration: one step of the reference on the same batch, then every number of both compared bit by bit."""

    priority = 'VERY_LOW'

    def __init__(self, make_reference, named_pairs, prepare=lambda model, batch: batch):
        self.make_reference, self.named_pairs, self.prepare = make_reference, named_pairs, prepare
        self.compared = 0

    def before_train(self, runner):
        self.reference = self.make_reference(runner.model)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batch = copy.deepcopy(data_batch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        losses = self.reference.step(self.prepare(runner.model, self.batch))
        scalars = runner.message_hub.log_scalars
        logged = [scalars[f'train/local/{j}/loss'].current() for j in range(1, len(losses))]
        logged.append(outputs['loss'].item())
        # logged in single precision
        assert logged == pytest.approx(losses, rel=1e-6), f'a loss differs after iteration {runner.iter + 1}'
        for name, ours, theirs in self.named_pairs(runner.model, self.reference):
            assert torch.equal(ours, theirs), f'{name} differs after iteration {runner.iter + 1}'
            if theirs.grad is not None:
                assert torch.equal(ours.grad, theirs.grad), f'gradient of {name} differs after iteration {runner.iter + 1}'
            self.compared += 1


def pairs(model, reference, local_task, task_modules):
    """(name, ours, theirs) for every parameter and buffer of the units, copies, local heads and the model's own modules."""
    backbone = model.backbone
    for unit, theirs in zip(chain_of(backbone).units, reference.units, strict=True):
        modules = [module for module in theirs.children() if [*module.state_dict()]]
        paths = [path for path in unit.modules if [*backbone.get_submodule(path).state_dict()]]
        for path, module in zip(paths, modules, strict=True):
            yield from _zip(path, backbone.get_submodule(path), module)
        for name in unit.tensors:
            yield name, getattr(backbone, name), getattr(theirs, name)
    for j, (head, other) in enumerate(zip(backbone.local.values(), reference.heads, strict=True), start=1):
        for name in ('momentum', 'bias'):
            if getattr(other, name) is not None:
                copied = getattr(head.transfer, name)
                copied = copied if isinstance(copied, UnitSequence) else torch.nn.ModuleList([copied])
                yield from _zip(f'head {j} {name}', copied, getattr(other, name))
        if other.delta is not None:
            yield f'head {j} delta', head.transfer.delta, other.delta
        yield from _zip(f'head {j} task', local_task(head), other.task)
        for i, later in enumerate(other.later):
            yield from _zip(f'head {j} A_{i + 2}', head.units[i], later)
        if other.own is not None:
            yield from _zip(f'head {j} independent', head.independent.head, other.own)
    for ours, theirs in zip(task_modules(model), reference.task_modules, strict=True):
        yield from _zip('model', ours, theirs)


def _zip(prefix, ours, theirs):
    a, b = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    assert a.keys() == b.keys()
    for name in a:
        yield f'{prefix}.{name}', a[name], b[name]


def run_lockstep(model, hook, loader, tmp_path, iters, optim_wrapper, momentum=0.9):
    """Train ``model`` for ``iters`` iterations through Runner, with EMABiasHook and the lock-step hook."""
    runner = Runner(
        model,
        work_dir=str(tmp_path),
        train_dataloader=loader,
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': iters, 'val_interval': iters + 1},
        optim_wrapper={'type': 'mmman.LocalLearningOptimWrapper', **optim_wrapper},
        custom_hooks=[{'type': 'mmman.EMABiasHook', 'momentum': momentum}, hook],
        default_hooks={'checkpoint': None, 'logger': None},
        experiment_name=tmp_path.name,
        log_level='WARNING',
    )
    runner.train()
    assert hook.compared > 0


def task_of(head):
    """A local head without its transfer, sharing its parameters."""
    bare = copy.copy(head)
    modules = {name: module for name, module in head._modules.items() if name != 'transfer'}
    bare._modules = modules
    return bare


def total(losses):
    return sum(value for name, value in losses.items() if 'loss' in name)


def compare_steps(model, other, batches, task_modules):
    """Train ``model`` and the reference on ``batches`` without a Runner, comparing every number and gradient bit by bit.

    Both with SGD of learning rate 0.05 and momentum 0.9, and copies of momentum 0.9.

    Returns:
        The gradients of the last step by name.
    """
    seen = []  # what the data preprocessor, which may be random, made of the batches
    model.data_preprocessor.register_forward_hook(lambda module, args, out: seen.append(copy.deepcopy(out)))
    optimizer = {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}
    wrapper = build_optim_wrapper(model, {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': optimizer})
    wrapper.initialize_count_status(model, 0, len(batches))
    wrapper.zero_grad = other.optim.zero_grad = lambda: None  # to compare the gradients after the step
    for i, batch in enumerate(batches):
        for parameter in (*model.parameters(), *other.optim.param_groups[0]['params']):
            parameter.grad = None
        outputs = model.train_step(batch, wrapper)
        losses = other.step(seen[-1])
        for head in model.backbone.local.values():
            head.transfer.ema_update_(head.source.of(model.backbone), 0.9)
        assert outputs['loss'].item() == losses[-1]
        compared = 0
        for name, ours, theirs in pairs(model, other, task_of, task_modules):
            assert torch.equal(ours, theirs), f'{name} differs after iteration {i + 1}'
            if theirs.grad is not None:
                assert torch.equal(ours.grad, theirs.grad), f'gradient of {name} differs after iteration {i + 1}'
            compared += 1
    assert compared >= len([*model.state_dict()])
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
