"""Checks a model before the first step, and rejects combinations that would train it incorrectly."""

from __future__ import annotations

from mmengine.model import is_model_wrapper
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.parallel import DistributedDataParallel

from mmman.errors import ConfigError
from mmman.local.blocks import localized_backbone
from mmman.local.local_head import LocalHead


def check_model(model: nn.Module, update: str = 'synchronous') -> None:
    """Check a model, or its DDP wrapper, before its first local training step.

    Args:
        model: The model.
        update: The ``update`` option of :class:`mmman.LocalLearningOptimWrapper`.

    Raises:
        ConfigError: The model has no localised backbone, or more than one; local heads don't fit the model, are frozen or were
            never initialised; a block has no trainable parameter; momentum copies were never initialised; DDP, its options or
            activation checkpointing break local backward passes.
    """
    module = model
    if is_model_wrapper(model):
        module = model.module
        _check_ddp(model, update)
    backbone = localized_backbone(module)
    _check_checkpointing(module, backbone)
    _check_blocks_train(backbone)
    if heads := backbone.local.uninitialised():
        raise ConfigError(
            f'the local heads after {", ".join(heads)} are not initialised: call model.init_weights() before the first step, '
            'or load a state dict that contains them; if the model overrides init_weights without calling '
            'super().init_weights(), call backbone.local.init_weights() as well'
        )
    if backbone.local.window > 1 and is_model_wrapper(model):
        raise ConfigError(
            f'window={backbone.local.window} back-propagates through a block several times, which {type(model).__name__} does '
            'not support: train in one process, or set window=1'
        )
    for head in backbone.local.trained_heads():
        _check_trainable(head)
    for head in backbone.local.values():
        head.check_model(module)
        if head.independent is not None:
            head.independent.check_model(module)
        if not head.transfer.is_initialized:
            raise ConfigError(
                "the momentum copies are not initialised: add dict(type='mmman.EMABiasHook') to custom_hooks, or, in a "
                'custom training loop, call init_from_ and ema_update_ of every head.transfer as that hook does'
            )


def check_window(window: int, update: str, images_per_chunk: int | None, cuda_graphs: bool) -> None:
    """Raise :class:`ConfigError` if options of the optim wrapper contradict windows of several blocks.

    Args:
        window: Number of blocks that a local loss trains.
        update, images_per_chunk, cuda_graphs: Options of :class:`mmman.LocalLearningOptimWrapper`.
    """
    if window == 1:
        return
    reason = f'window={window} completes the gradients of a block after later boundaries'
    if update == 'immediate':
        raise ConfigError(f"{reason}: set optim_wrapper.update='synchronous'")
    for option, value in (('images_per_chunk', images_per_chunk), ('cuda_graphs', cuda_graphs)):
        if value:
            raise ConfigError(f'{reason}, so optim_wrapper.{option}={value} is not supported: remove it, or set window=1')


def _check_blocks_train(backbone: nn.Module) -> None:
    """Raise if a block has no trainable parameter because it was frozen after the blocks were planned."""
    local = backbone.local
    if (frozen := local.plan.frozen_block(backbone, local.trained_index)) is not None:
        raise ConfigError(
            f'{frozen} of {type(backbone).__name__} has no trainable parameter: it was frozen after its blocks were planned. '
            'Freeze with frozen_stages of the stock backbone (model.backbone.backbone), or before localize_ is called, so that '
            'the blocks are planned without it'
        )


def _check_trainable(head: LocalHead) -> None:
    """Raise if a local head was frozen as a whole, e.g. by an adapter around the backbone that trains its own layers alone."""
    parameters = [p for name, p in head.named_parameters() if not name.startswith('transfer.momentum.')]
    if parameters and not any(p.requires_grad for p in parameters):
        raise ConfigError(
            f'the local head after {head.unit} is frozen, so it would learn nothing: leave backbone.local trainable, and put '
            'no wrapper that freezes (LoRAModel) around mmman.LocalBackbone'
        )


def _check_ddp(model: nn.Module, update: str) -> None:
    """Raise if a model wrapper, or one of its options, doesn't support local backward passes."""
    ours = "model_wrapper_cfg = dict(type='mmman.LocalDistributedDataParallel')"
    if hasattr(model, 'block_reducers'):  # LocalDistributedDataParallel, or a wrapper with the same attributes
        return
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(f'{type(model).__name__} cannot train a localised model: set {ours}')
    if model.static_graph:
        raise ConfigError(
            'static_graph=True leaves the gradients of local losses unreduced from the second step on: set it to False'
        )
    if not model.find_unused_parameters:
        raise ConfigError(
            'local losses are back-propagated inside the forward pass, which DDP accepts only with '
            f'{ours}, or with MMDistributedDataParallel and find_unused_parameters=True'
        )
    if update == 'immediate':
        raise ConfigError(
            f"{type(model).__name__} reduces gradients after forward, but update='immediate' steps during it: set {ours}"
        )


def _check_checkpointing(model: nn.Module, backbone: nn.Module) -> None:
    """Raise if a module that contains a boundary is checkpointed, as the boundary would run twice. Inside a unit it is fine."""
    path = next(name for name, module in model.named_modules() if module is backbone)
    for block in backbone.local.plan.blocks[:-1]:
        parts = [*filter(None, [*path.split('.'), *block[-1].output.split('.')])]
        for depth in range(len(parts)):
            module = model.get_submodule('.'.join(parts[:depth]))
            if isinstance(module, CheckpointWrapper) or (module is not model and 'forward' in vars(module)):
                raise ConfigError(
                    f'{".".join(parts[:depth])} contains blocks with local heads, but its forward was wrapped '
                    '(activation_checkpointing?): local learning frees these activations already; to checkpoint units set '
                    'recompute=True of LocalBackbone'
                )
