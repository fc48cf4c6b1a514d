"""Turning a stock backbone into a locally trained one, and back, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmman.errors import LocalLearningError, MisuseError, UnsupportedBackboneError
from mmman.local.blocks import LocalBlocks
from mmman.local.heads.base import Boundary, LocalHead
from mmman.local.transfer import MomentumTransfer
from mmman.partition import Chain, chain_of, plan_blocks
from mmman.registry import MODELS

PROBE_SIZE = 64
"""Height and width in pixels of the input on which channels and strides are measured."""


@MODELS.register_module()
def LocalBackbone(  # noqa: N802  named as a config writes it
    backbone: dict,
    num_blocks: int | None = None,
    local_head: dict | None = None,
    partition: str | Sequence[str] = 'stage',
    transfer: dict | None = None,
    loss_weight: float | Sequence[float] = 1.0,
    pretrained: str | None = None,
) -> nn.Module:
    """Build a stock backbone and localise it. What a config names: ``type='mmman.LocalBackbone'``.

    Args:
        backbone: Config of the stock backbone, built in the default scope of the config.
        pretrained: Passed on to ``backbone``; mmseg's segmentors set it.
        num_blocks, local_head, partition, transfer, loss_weight: See :func:`localize_`.

    Returns:
        The backbone: an instance of its own class.
    """
    if pretrained is not None:
        backbone = {**backbone, 'pretrained': pretrained}
    return localize_(
        MODELS.build(backbone),
        num_blocks=num_blocks,
        local_head=local_head,
        partition=partition,
        transfer=transfer,
        loss_weight=loss_weight,
    )


def localize_(
    backbone: nn.Module,
    num_blocks: int | None = None,
    local_head: dict | None = None,
    partition: str | Sequence[str] = 'stage',
    transfer: dict | None = None,
    loss_weight: float | Sequence[float] = 1.0,
) -> nn.Module:
    """Cut ``backbone`` in place into K gradient-isolated blocks with a local head on each of the first K-1.

    All additions are under ``backbone.local``; class, forward and state-dict keys stay. Outside a training step driven by
    :class:`mmman.LocalLearningOptimWrapper` the backbone computes what it computed before, bit by bit.

    Args:
        backbone: A backbone whose family is known (:func:`mmman.register_chain`).
        num_blocks: K, counted over blocks with trainable parameters; 1 is end-to-end training. Optional with named cuts.
        local_head: Config of the local heads, e.g. ``dict(type='mmman.DetLocalHead', ...)``. Needed for K > 1.
        partition: ``'stage'``, ``'uniform'`` or the names of the first K-1 blocks' last units; see
            :func:`mmman.partition.plan_blocks`.
        transfer: Options of :class:`mmman.MomentumTransfer`: ``ema``, ``bias``, ``scale``. Default: MAN++.
        loss_weight: Weight of the local losses: one number, or one for each of the first K-1 blocks.

    Returns:
        ``backbone`` itself.

    Raises:
        UnsupportedBackboneError: Its family is not known.
        PartitionError: The cuts don't fit.
        MisuseError: It is localised already, or options contradict each other.
    """
    if hasattr(backbone, 'local'):
        raise MisuseError(f'{type(backbone).__name__} already has a module named `local`; localise a backbone once')
    chain = chain_of(backbone)
    plan = plan_blocks(chain, [unit.is_trainable(backbone) for unit in chain.units], num_blocks, partition)
    count = len(plan.blocks) - 1
    if count and local_head is None:
        raise MisuseError("more than one block needs local heads: set local_head, e.g. dict(type='mmman.DetLocalHead', ...)")
    if count:
        head_class = local_head['type']
        if isinstance(head_class, str):
            with MODELS.switch_scope_and_registry(None) as registry:
                head_class = registry.get(head_class)
        if not (isinstance(head_class, type) and issubclass(head_class, LocalHead)):
            raise MisuseError(f'local_head.type={local_head["type"]!r} is no mmman.LocalHead; e.g. mmman.DetLocalHead is one')
    weights = [float(loss_weight)] * count if isinstance(loss_weight, (int, float)) else list(loss_weight)
    if len(weights) != count:
        raise MisuseError(f'loss_weight has {len(weights)} values for {count} local heads (the last block has none)')

    keys = set(backbone.state_dict())
    shapes = _measure(backbone, chain)
    options = dict(transfer or {})
    has_unit = options.get('ema', True) or options.get('bias', 'unit') == 'unit'
    first_units = [block[0] for block in plan.blocks[1:]]
    seen_units = first_units if has_unit else [block[-1] for block in plan.blocks[:-1]]
    seen = [shapes[unit.name] for unit in seen_units]
    heads = []
    for j, (unit, (channels, stride), weight) in enumerate(zip(first_units, seen, weights, strict=True), start=1):
        boundary = Boundary(
            block=j,
            unit=plan.blocks[j - 1][-1].name,
            source=unit.output,
            channels=channels,
            stride=stride,
            strides=tuple(stride for _, stride in seen),
        )
        source = backbone.get_submodule(unit.output)
        head = MODELS.build(
            local_head,
            default_args={
                'boundary': boundary,
                'transfer': MomentumTransfer(source, channels, **options),
                'loss_weight': weight,
            },
        )
        heads.append(head)

    # The copies are made: from here on units may carry hooks.
    backbone.local = LocalBlocks(chain, plan, heads)
    for block, head in zip(plan.blocks[:-1], heads, strict=True):
        backbone.get_submodule(block[-1].output).register_forward_hook(head.at_boundary)
    backbone.register_forward_hook(backbone.local.detach_taps)
    moved = keys.symmetric_difference(key for key in backbone.state_dict() if not key.startswith('local.'))
    if moved:
        raise LocalLearningError(f'localising changed keys of the stock state dict: {sorted(moved)}')
    print_log(f'{type(backbone).__name__} in {len(plan.blocks)} blocks: {plan}', logger='current')
    return backbone


def delocalize_(backbone: nn.Module) -> nn.Module:
    """Undo :func:`localize_` in place: remove the local heads and every hook, so that the stock backbone is left.

    Returns:
        ``backbone`` itself, with the weights it has.

    Raises:
        MisuseError: It is not localised.
    """
    local = getattr(backbone, 'local', None)
    if not isinstance(local, LocalBlocks):
        raise MisuseError(f'{type(backbone).__name__} is not localised')
    ours = {id(local), *(id(head) for head in local.values())}
    for module in backbone.modules():
        for key, hook in list(module._forward_hooks.items()):
            if id(getattr(hook, '__self__', None)) in ours:
                del module._forward_hooks[key]
    del backbone.local
    return backbone


@torch.no_grad()
def _measure(backbone: nn.Module, chain: Chain) -> dict[str, tuple[int, int]]:
    """Channels and stride of every unit's output, from one forward pass in eval mode that leaves no trace."""
    shapes: dict[str, tuple[int, int]] = {}
    order: list[str] = []

    def note(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise UnsupportedBackboneError(
                    f'{type(backbone).__name__} cannot be cut into blocks: its unit {name} gives no single (B, C, H, W) tensor'
                )
            order.append(name)
            shapes[name] = (output.shape[1], round(PROBE_SIZE / output.shape[-1]))

        return hook

    convolution = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    if convolution is None:
        raise UnsupportedBackboneError(f'{type(backbone).__name__} has no convolution that tells its input channels')
    weight = convolution.weight
    handles = [backbone.get_submodule(unit.output).register_forward_hook(note(unit.name)) for unit in chain.units]
    modes = {module: module.training for module in backbone.modules()}
    for module in modes:
        module.training = False
    try:
        outputs = backbone(weight.new_zeros(1, convolution.in_channels, PROBE_SIZE, PROBE_SIZE))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    has_outputs = isinstance(outputs, (tuple, list)) and len(outputs) == len(chain.taps)
    if order != [unit.name for unit in chain.units] or not has_outputs:
        raise UnsupportedBackboneError(f'the units of {type(backbone).__name__} are not what its forward pass runs')
    return shapes
