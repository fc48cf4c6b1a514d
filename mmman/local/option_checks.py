"""Check the options of the momentum transfer and the local heads before either is built."""

from __future__ import annotations

from collections.abc import Mapping

from mmman.errors import ConfigError
from mmman.local.local_head import INJECTED_ARGS, LocalHead
from mmman.local.transfer import MomentumTransfer, check_transfer_options
from mmman.options import check_options
from mmman.registry import resolve_type


def check_local_options(
    transfer: Mapping | None,
    local_head: Mapping | None,
    where: str = 'model.backbone',
    independent_head: Mapping | None = None,
) -> None:
    """Check the options of the transfer and the local heads; also for K = 1, where neither is built."""
    if transfer:
        check_options(MomentumTransfer, transfer, f'{where}.transfer')
        check_transfer_options(**transfer)
    if local_head is not None:
        _check_local_head(local_head, f'{where}.local_head')
    if independent_head is not None:
        _check_local_head(independent_head, f'{where}.independent_head')


def _check_local_head(local_head: Mapping, where: str) -> None:
    if 'type' not in local_head:
        raise ConfigError(f"{where} requires a type, e.g. dict(type='mmman.DetLocalHead', ...)")
    kind = resolve_type(local_head['type'])
    if not (isinstance(kind, type) and issubclass(kind, LocalHead)):
        raise ConfigError(
            f'{where}.type={local_head["type"]!r} is not a subclass of mmman.LocalHead: use e.g. mmman.DetLocalHead'
        )
    for option in INJECTED_ARGS:
        if option in local_head:
            place = (
                'is determined automatically: remove it'
                if option == 'boundary'
                else f'is an option of the backbone: set model.backbone.{option}'
            )
            raise ConfigError(f'{where}.{option} {place}')
    check_options(kind, {name: value for name, value in local_head.items() if name != 'type'}, where, injected=INJECTED_ARGS)
