"""``mmman.LocalBackbone``: builds a stock backbone from its config and localises it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmman.errors import ConfigError
from mmman.local.localize import localize_
from mmman.local.option_checks import check_local_options
from mmman.options import Count, Positive, check_options, checked
from mmman.planning.memory_cuts import MemoryCuts
from mmman.registry import MODELS, resolve_type


def _stock_option(option: str, options: Mapping[str, Any]) -> str | None:
    """Return a hint if ``option`` belongs to the stock backbone. Stock configs set such options in ``model.backbone``."""
    stock = options.get('backbone')
    kind = resolve_type(stock.get('type')) if isinstance(stock, Mapping) else None
    if any(option in inspect.signature(cls.__init__).parameters for cls in getattr(kind, '__mro__', ())[:-1]):
        return f'this is an option of the stock backbone, {kind.__name__}: set model.backbone.backbone.{option}'
    return None


@MODELS.register_module()
@checked('model.backbone', locate_option=_stock_option)
def LocalBackbone(  # noqa: N802  named as a config writes it
    backbone: dict,
    num_blocks: Count | None = None,
    local_head: dict | None = None,
    partition: str | Sequence[str] | dict = 'stage',
    transfer: dict | None = None,
    loss_weight: Positive | Sequence[Positive] = 1.0,
    recompute: bool | Sequence[str] = False,
    selective_recompute: bool | Sequence[str] = False,
    window: Count = 1,
    independent_head: dict | None = None,
    pretrained: str | None = None,
) -> nn.Module:
    """Build a stock backbone and localise it. Used in a config as ``type='mmman.LocalBackbone'``.

    Args:
        backbone: Config of the stock backbone, built in the default scope of the config.
        pretrained: Passed to ``backbone``. mmseg's segmentors set it.
        partition: As in :func:`localize_`, or ``dict(type='memory', ...)`` with the arguments of
            :class:`mmman.planning.memory_cuts.MemoryCuts`: the cuts with the smallest peak memory of a training step.
        num_blocks, local_head, transfer, loss_weight, recompute, selective_recompute, window, independent_head: See
            :func:`localize_`.

    Returns:
        The backbone, an instance of the stock class.
    """
    check_local_options(transfer, local_head, independent_head=independent_head)
    _check_no_adapter(backbone)
    if pretrained is not None:
        backbone = {**backbone, 'pretrained': pretrained}
    if isinstance(partition, dict):
        if window > 1:
            raise ConfigError(f'cuts by memory assume that one block is alive at a time, not window={window}: name the cuts')
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
        window=window,
        independent_head=independent_head,
    )


def _check_no_adapter(backbone: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if a stock backbone is wrapped in one that freezes it, and trains layers that it adds."""
    kind = backbone.get('type')
    name = kind.rpartition('.')[-1] if isinstance(kind, str) else getattr(kind, '__name__', None)
    if name == 'LoRAModel':
        raise ConfigError(
            'model.backbone.backbone: LoRAModel cannot be cut into blocks, because it freezes the backbone and trains only '
            'what it adds: set its module as the stock backbone, without LoRA, or train it without mmman.LocalBackbone'
        )


def check_backbone_options(options: Mapping[str, Any], where: str = 'model.backbone') -> None:
    """Check the options of :func:`LocalBackbone`, including those of transfer and local heads, without building it.

    Args:
        options: The options by name, without ``type``.
        where: The place of the options in the config, for error messages.

    Raises:
        ConfigError: An option is unknown, missing or of a wrong type or value, or contradicts another.
    """
    check_options(LocalBackbone, options, where)
    check_local_options(options.get('transfer'), options.get('local_head'), where, options.get('independent_head'))
