"""Turning a stock backbone into a locally trained one, and back, in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmman.errors import LocalLearningError, MisuseError, PartitionError
from mmman.local.blocks import LocalBlocks
from mmman.local.heads.base import GIVEN, Boundary, LocalHead
from mmman.local.recompute import ends_told, keep_, recompute_unit_, units_to_recompute
from mmman.local.transfer import MomentumTransfer, check_switches
from mmman.options import Count, Positive, check_options, checked
from mmman.partition import chain_of, measure, plan_blocks, trainable_units
from mmman.registry import MODELS


def _stock_option(option: str, options: Mapping[str, Any]) -> str | None:
    """Say where an option of the stock backbone belongs, which a stock config sets in ``model.backbone``."""
    stock = options.get('backbone')
    kind = class_of(stock.get('type')) if isinstance(stock, Mapping) else None
    if any(option in inspect.signature(cls.__init__).parameters for cls in getattr(kind, '__mro__', ())[:-1]):
        return f'{kind.__name__} has this option, the stock backbone: set model.backbone.backbone.{option}'
    return None


@MODELS.register_module()
@checked('model.backbone', elsewhere=_stock_option)
def LocalBackbone(  # noqa: N802  named as a config writes it
    backbone: dict,
    num_blocks: Count | None = None,
    local_head: dict | None = None,
    partition: str | Sequence[str] | dict = 'stage',
    transfer: dict | None = None,
    loss_weight: Positive | Sequence[Positive] = 1.0,
    recompute: bool | Sequence[str] = False,
    selective_recompute: bool | Sequence[str] = False,
    pretrained: str | None = None,
) -> nn.Module:
    """Build a stock backbone and localise it. What a config names: ``type='mmman.LocalBackbone'``.

    Args:
        backbone: Config of the stock backbone, built in the default scope of the config.
        pretrained: Passed on to ``backbone``; mmseg's segmentors set it.
        partition: As in :func:`localize_`, or ``dict(type='memory', ...)`` with the arguments of
            :class:`mmman.analysis.memory_cuts.MemoryCuts`: the cuts with the smallest peak of a training step.
        num_blocks, local_head, transfer, loss_weight, recompute, selective_recompute: See :func:`localize_`.

    Returns:
        The backbone: an instance of its own class.
    """
    _check_parts(transfer, local_head)
    if pretrained is not None:
        backbone = {**backbone, 'pretrained': pretrained}
    if isinstance(partition, dict):
        from mmman.analysis.memory_cuts import MemoryCuts  # which builds models itself

        options = {'backbone': backbone, 'local_head': local_head, 'transfer': transfer}
        options |= {'recompute': recompute, 'selective_recompute': selective_recompute}
        partition = MemoryCuts.of(partition).plan(options, num_blocks)
    return localize_(
        MODELS.build(backbone),
        num_blocks=num_blocks,
        local_head=local_head,
        partition=partition,
        transfer=transfer,
        loss_weight=loss_weight,
        recompute=recompute,
        selective_recompute=selective_recompute,
    )


@checked('localize_')
def localize_(
    backbone: nn.Module,
    num_blocks: Count | None = None,
    local_head: dict | None = None,
    partition: str | Sequence[str] | dict = 'stage',
    transfer: dict | None = None,
    loss_weight: Positive | Sequence[Positive] = 1.0,
    recompute: bool | Sequence[str] = False,
    selective_recompute: bool | Sequence[str] = False,
) -> nn.Module:
    """Cut ``backbone`` in place into K gradient-isolated blocks with a local head on each of the first K-1.

    What the backbone freezes in its ``train()`` is frozen first, so that blocks are counted without it.
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
        recompute: The units that keep only their input for the backward pass and are computed again there, each with its copies
            in local heads: names of units or stages, or True for all but the stem. Training ends with the same bits. A
            ``'stem'`` in the list runs in chunks of the batch, equal but for the order of sums (:mod:`mmman.local.stem`).
        selective_recompute: Likewise the units that also keep what is costly to compute for its size
            (:func:`mmman.local.recompute.is_costly`), and compute the rest again: normalisation, activation, what widens.

    Returns:
        ``backbone`` itself.

    Raises:
        UnsupportedBackboneError: Its family is not known, or it accepts none of the images of the dry run.
        PartitionError: The cuts don't fit, or leave a last block that makes no output, or a block without a trainable
            parameter; a unit to recompute is none.
        MisuseError: It is localised already, or options contradict each other.
    """
    _check_parts(transfer, local_head)
    if hasattr(backbone, 'local'):
        raise MisuseError(f'{type(backbone).__name__} already has a module named `local`; localise a backbone once')
    chain = chain_of(backbone)
    plan = plan_blocks(chain, trainable_units(backbone, chain), num_blocks, partition)
    if (frozen := plan.frozen_block(backbone)) is not None:
        raise PartitionError(
            f'{frozen} of {type(backbone).__name__} has no trainable parameter, so its loss would train nothing: cut so that '
            'every block trains, or freeze from the start of the backbone on'
        )
    count = len(plan.blocks) - 1
    if count and local_head is None:
        raise MisuseError("more than one block needs local heads: set local_head, e.g. dict(type='mmman.DetLocalHead', ...)")
    weights = [float(loss_weight)] * count if isinstance(loss_weight, (int, float)) else list(loss_weight)
    if len(weights) != count:
        raise MisuseError(f'loss_weight has {len(weights)} values for {count} local heads (the last block has none)')

    if count and not any(chain.units[tap] in plan.blocks[-1] for tap in chain.taps):
        raise PartitionError(
            f'the last block ({plan}) makes none of the outputs of {type(backbone).__name__}, so no loss would train it: cut '
            'earlier, or drop the stages behind the last of out_indices (num_stages)'
        )

    recomputed = units_to_recompute(backbone, chain, recompute, selective_recompute)
    keys = set(backbone.state_dict())
    measured = measure(backbone, chain)
    features = measured.features
    ends = {}
    if recomputed:
        with ends_told(backbone.get_submodule(path) for unit in recomputed for path in unit.modules) as ends:
            measured.run(backbone)
    for unit, selective in recomputed.items():  # the copies that local heads make of them are, too
        recompute_unit_(backbone, unit, ends, selective)
    modules = [unit.of(backbone) for unit in chain.units]
    options = dict(transfer or {})
    has_unit = options.get('ema', True) or options.get('bias', 'unit') == 'unit'
    cuts = [chain.units.index(block[-1]) for block in plan.blocks[:-1]]
    seen = [features[cut + has_unit] for cut in cuts]
    heads = []
    for j, (cut, feature, weight) in enumerate(zip(cuts, seen, weights, strict=True), start=1):
        boundary = Boundary(
            block=j,
            num_blocks=len(plan.blocks),
            unit=chain.units[cut].name,
            source=chain.units[cut + 1],
            output=features[cut],
            feature=feature,
            takes_grid=chain.takes_grid,
            strides=tuple(other.stride for other in seen),
            image_channels=measured.image_channels,
            following=tuple(modules[cut + 1 + has_unit :]),
            following_features=tuple(features[cut + 1 + has_unit :]),
        )
        head = MODELS.build(
            local_head,
            default_args={
                'boundary': boundary,
                'transfer': MomentumTransfer(modules[cut + 1], features[cut + 1], **options),
                'loss_weight': weight,
            },
        )
        if head.transfer.channel_bias is not None and not head.sees_channel_bias:
            raise MisuseError(
                f"transfer.bias='channel' has no effect in front of {type(head).__name__}, whose first layers normalise each "
                "channel: choose 'depthwise' or 'unit'"
            )
        heads.append(head)

    # The copies are made: from here on units may carry hooks.
    backbone.local = LocalBlocks(chain, plan, heads)
    for cut, head in zip(cuts, heads, strict=True):
        backbone.get_submodule(chain.units[cut].output).register_forward_hook(head.at_boundary)
    for path in backbone.local.inner_norms:
        backbone.get_submodule(path).register_forward_pre_hook(backbone.local.detach_norm_input)
    backbone.register_forward_hook(backbone.local.detach_taps)
    moved = keys.symmetric_difference(key for key in backbone.state_dict() if not key.startswith('local.'))
    if moved:
        raise LocalLearningError(f'localising changed keys of the stock state dict: {sorted(moved)}')
    print_log(f'{type(backbone).__name__} in {len(plan.blocks)} blocks: {plan}', logger='current')
    return backbone


def check_backbone_options(options: Mapping[str, Any], where: str = 'model.backbone') -> None:
    """Check the options of :func:`LocalBackbone`, those of the transfer and the local heads included, without building it.

    Args:
        options: By name, without ``type``.
        where: Their place in the config, for error messages.

    Raises:
        MisuseError: An option is unknown, missing or of a wrong type or value, or contradicts another.
    """
    check_options(LocalBackbone, options, where)
    _check_parts(options.get('transfer'), options.get('local_head'), where)


def _check_parts(transfer: Mapping | None, local_head: Mapping | None, where: str = 'model.backbone') -> None:
    """Check the options of the transfer and the local heads; also for K = 1, where nothing is built from them."""
    if transfer:
        check_options(MomentumTransfer, transfer, f'{where}.transfer')
        check_switches(**transfer)
    if local_head is not None:
        _check_local_head(local_head, f'{where}.local_head')


def _check_local_head(local_head: Mapping, where: str) -> None:
    if 'type' not in local_head:
        raise MisuseError(f"{where} needs a type, e.g. dict(type='mmman.DetLocalHead', ...)")
    kind = class_of(local_head['type'])
    if not (isinstance(kind, type) and issubclass(kind, LocalHead)):
        raise MisuseError(f'{where}.type={local_head["type"]!r} is no mmman.LocalHead; e.g. mmman.DetLocalHead is one')
    for option in GIVEN:
        if option in local_head:
            place = (
                'is measured: remove it'
                if option == 'boundary'
                else f'is an option of the backbone: set model.backbone.{option}'
            )
            raise MisuseError(f'{where}.{option} {place}')
    check_options(kind, {name: value for name, value in local_head.items() if name != 'type'}, where, given=GIVEN)


def class_of(kind: str | type | None) -> type | None:
    """The class or function that a config names as ``type``; None where there is none."""
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)


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
        keep_(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if id(getattr(hook, '__self__', None)) in ours:
                    del hooks[key]
    del backbone.local
    return backbone
