"""Convert a stock backbone into a locally trained one in place, and undo it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmman.errors import ConfigError, LocalLearningError
from mmman.local.blocks import LocalBlocks
from mmman.local.local_head import Boundary, LocalHead
from mmman.local.option_checks import check_local_options
from mmman.local.transfer import MomentumTransfer
from mmman.memory.output_relu import output_relus_of
from mmman.memory.recompute import disable_recompute_, recompute_unit_, units_to_recompute
from mmman.options import Count, Positive, checked
from mmman.partition import Chain, Feature, Measured, Plan, chain_of, find_source, measure, plan_trained_blocks
from mmman.registry import MODELS

NO_TRANSFER = {'ema': False, 'bias': False, 'scale': False}


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
    window: Count = 1,
    independent_head: dict | None = None,
) -> nn.Module:
    """Cut ``backbone`` in place into K gradient-isolated blocks with a local head on each of the first K-1.

    Parameters that the backbone freezes in its ``train()`` are frozen first, so that they are excluded when blocks are counted.
    All additions are under ``backbone.local``; the class, the forward and the state-dict keys don't change. Outside a training
    step driven by :class:`mmman.LocalLearningOptimWrapper`, the backbone's outputs are bitwise unchanged. Planning comes first,
    then building; an error leaves no local head, hook or recomputed unit behind.

    Args:
        backbone: A backbone of a known family (:func:`mmman.register_chain`).
        num_blocks: K, counted over blocks with trainable parameters; 1 is end-to-end training. Optional with named cuts.
        local_head: Config of the local heads, e.g. ``dict(type='mmman.DetLocalHead', ...)``. Required for K > 1.
        partition: ``'stage'``, ``'uniform'`` or the names of the first K-1 blocks' last units; see
            :func:`mmman.partition.plan_blocks`.
        transfer: Options of :class:`mmman.MomentumTransfer`: ``ema``, ``bias``, ``scale``, ``source_unit``. Default: MAN++.
        loss_weight: Weight of the local losses: one number, or one for each of the first K-1 blocks.
        recompute: Units that save only their input and are recomputed in the backward pass, along with their copies in local
            heads: names of units or stages, or True for all but the stem. Results are bitwise equal. A ``'stem'`` in the list
            runs in chunks of the batch and is equal up to the order of summation (:mod:`mmman.memory.stem`).
        selective_recompute: Units that also save outputs that are expensive to recompute for their size
            (:func:`mmman.memory.selective.should_save`). Normalisations, activations and layers that widen are recomputed.
        window: Number of blocks that a local loss trains, from 1 to K. 1: each block is isolated. More: the windows of MLAAN
            (:class:`mmman.engine.window.WindowSession`), whose graphs are alive at a time.
        independent_head: Config of the head, without transfer, whose loss trains a block alone in windows of several blocks.
            Default: an ``mmman.LinearLocalHead`` with the ``head`` of ``local_head``.

    Returns:
        ``backbone`` itself.

    Raises:
        UnsupportedBackboneError: The family is not known, or the backbone accepts none of the dry run's images.
        PartitionError: The cuts don't fit, the last block makes no output, a block has no trainable parameter, or no such unit.
        ConfigError: The backbone is already localised, or options contradict each other.
    """
    check_local_options(transfer, local_head, independent_head=independent_head)
    if hasattr(backbone, 'local'):
        raise ConfigError(f'{type(backbone).__name__} already has a module named `local`: it can be localised only once')
    chain = chain_of(backbone)
    plan = plan_trained_blocks(backbone, chain, num_blocks, partition)
    weights = _loss_weights(plan, local_head, loss_weight)
    if window > 1:
        _check_window(plan, chain, window, selective_recompute)
    independent_head = _independent_head(local_head, window, independent_head)
    recomputed = units_to_recompute(backbone, chain, recompute, selective_recompute)
    measured = measure(backbone, chain)
    output_relus = output_relus_of(recomputed, backbone, measured.run)
    try:
        for unit, selective in recomputed.items():  # before they are copied: the copies are recomputed too
            recompute_unit_(backbone, unit, output_relus, selective)
        heads = _build_heads(backbone, chain, plan, measured, local_head, transfer or {}, weights)
        if independent_head is not None:
            others = _build_heads(backbone, chain, plan, measured, independent_head, NO_TRANSFER, weights)
            for head, other in zip(heads, others, strict=True):
                head.independent = other
        _attach(backbone, chain, plan, heads, window)
    except BaseException:
        _detach(backbone)
        raise
    print_log(f'Split {type(backbone).__name__} into {len(plan.blocks)} blocks: {plan}', logger='current')
    return backbone


def _loss_weights(plan: Plan, local_head: dict | None, loss_weight: float | Sequence[float]) -> list[float]:
    """The weight of each local loss."""
    count = len(plan.blocks) - 1
    if count and local_head is None:
        raise ConfigError("more than one block requires local heads: set local_head, e.g. dict(type='mmman.DetLocalHead', ...)")
    weights = [float(loss_weight)] * count if isinstance(loss_weight, (int, float)) else list(loss_weight)
    if len(weights) != count:
        raise ConfigError(
            f'loss_weight has {len(weights)} values for {count} local heads: give one for each block but the last'
        )
    return weights


def _check_window(plan: Plan, chain: Chain, window: int, selective_recompute: bool | Sequence[str]) -> None:
    """Raise :class:`ConfigError` if losses can't train ``window`` blocks of this backbone."""
    if window > len(plan.blocks):
        raise ConfigError(f'window={window}, but the backbone has {len(plan.blocks)} blocks: choose from 1 to that')
    if selective_recompute:
        raise ConfigError(
            f'selective_recompute back-propagates through a unit once, but window={window} more often: use recompute'
        )
    if any(chain.units[chain.out_units[i]] not in plan.blocks[-1] for i in chain.norms):
        raise ConfigError(
            f'window={window} does not support norms on outputs from inside the first K-1 blocks: take these outputs out of '
            'out_indices'
        )


def _independent_head(local_head: dict | None, window: int, given: dict | None) -> dict | None:
    """The config of the heads of the independent losses; None without windows."""
    if window == 1:
        if given is not None:
            raise ConfigError('independent_head has an effect in windows of several blocks only: set window, or remove it')
        return None
    if given is None and 'head' not in (local_head or {}):
        raise ConfigError(
            f'window={window} requires independent_head, because local_head has no option head for an mmman.LinearLocalHead'
        )
    return given or {'type': 'mmman.LinearLocalHead', 'head': local_head['head']}


def _build_heads(
    backbone: nn.Module,
    chain: Chain,
    plan: Plan,
    measured: Measured,
    local_head: dict | None,
    transfer: Mapping[str, Any],
    weights: Sequence[float],
) -> list[LocalHead]:
    """Build the local heads of the first K-1 blocks, with copies of the units that follow."""
    features = measured.features
    modules = [unit.of(backbone) for unit in chain.units]
    applies_unit = transfer.get('ema', True) or transfer.get('bias', 'unit') == 'unit'
    cuts = [chain.units.index(block[-1]) for block in plan.blocks[:-1]]
    sources = [_source(chain, features, cut, transfer) for cut in cuts]
    positions = sources if applies_unit else cuts
    heads = []
    for j, (cut, source, position, weight) in enumerate(zip(cuts, sources, positions, weights, strict=True), start=1):
        boundary = Boundary(
            block=j,
            num_blocks=len(plan.blocks),
            unit=chain.units[cut].name,
            source=chain.units[source],
            output=features[cut],
            feature=features[position],
            needs_hw_shape=chain.needs_hw_shape,
            strides=tuple(features[other].stride for other in positions),
            image_channels=measured.image_channels,
            following_units=tuple(modules[position + 1 :]),
            following_features=tuple(features[position + 1 :]),
            position=position,
            next_stage=chain.units[cut + 1].stage,
            all_units=chain.units,
        )
        head = MODELS.build(
            local_head,
            default_args={
                'boundary': boundary,
                'transfer': MomentumTransfer(modules[source], features[source], has_grid=chain.needs_hw_shape, **transfer),
                'loss_weight': weight,
            },
        )
        if head.transfer.channel_bias is not None and not head.supports_channel_bias:
            raise ConfigError(
                f"transfer.bias='channel' requires a local head with supports_channel_bias=True, not {type(head).__name__}: a "
                "head that begins with a convolution and BatchNorm cancels this bias; choose 'depthwise' or 'unit'"
            )
        heads.append(head)
    return heads


def _source(chain: Chain, features: Sequence[Feature], cut: int, transfer: Mapping[str, Any]) -> int:
    """Index of the unit that the transfer behind unit ``cut`` copies, checked to take that unit's output."""
    source = find_source(chain.units, cut, transfer.get('source_unit', 'next'))
    if not features[source - 1].fits(features[cut]):
        raise ConfigError(
            f'transfer.source_unit: {chain.units[source].name} takes {features[source - 1]}, but the block that ends with '
            f'{chain.units[cut].name} returns {features[cut]}: name a unit that takes this, or cut elsewhere'
        )
    return source


def _attach(backbone: nn.Module, chain: Chain, plan: Plan, heads: list[LocalHead], window: int) -> None:
    """Add the local heads and the hooks that call them. Units are copied before this, since they may carry hooks after it."""
    keys = set(backbone.state_dict())
    backbone.local = LocalBlocks(chain, plan, heads, window)
    for block, head in zip(plan.blocks[:-1], heads, strict=True):
        backbone.get_submodule(block[-1].output).register_forward_hook(head.at_boundary)
    for path in backbone.local.inner_norms:
        backbone.get_submodule(path).register_forward_pre_hook(backbone.local.detach_norm_input)
    backbone.register_forward_hook(backbone.local.detach_outputs)
    moved = keys.symmetric_difference(key for key in backbone.state_dict() if not key.startswith('local.'))
    if moved:
        raise LocalLearningError(f'localising changed keys of the stock state dict: {sorted(moved)}')


def _detach(backbone: nn.Module) -> None:
    """Remove everything that localising added: local heads, hooks, and the replaced forwards of recomputed units."""
    local = getattr(backbone, 'local', None)
    ours = {id(local), *(id(head) for head in local.values())} if isinstance(local, LocalBlocks) else set()
    for module in list(backbone.modules()):
        disable_recompute_(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if id(getattr(hook, '__self__', None)) in ours:
                    del hooks[key]
    if ours:
        del backbone.local


def delocalize_(backbone: nn.Module) -> nn.Module:
    """Undo :func:`localize_` in place: remove the local heads and all hooks, and so restore the stock backbone.

    Returns:
        ``backbone`` itself, with its current weights.

    Raises:
        ConfigError: The backbone is not localised.
    """
    if not isinstance(getattr(backbone, 'local', None), LocalBlocks):
        raise ConfigError(f'{type(backbone).__name__} is not localised: call localize_ first')
    _detach(backbone)
    return backbone
