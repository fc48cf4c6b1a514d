"""LAM, the local head of MLAAN: copies of units of later stages after the transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmengine.model import ModuleList
from torch import Tensor, nn

from mmman.errors import ConfigError
from mmman.heads.auglocal import new_unit_like
from mmman.heads.cls import ClsLocalHead
from mmman.local.local_head import INJECTED_ARGS, Boundary
from mmman.local.transfer import MomentumTransfer
from mmman.options import Count, checked
from mmman.partition import Unit
from mmman.registry import MODELS


@MODELS.register_module()
@checked('model.backbone.local_head', injected=INJECTED_ARGS)
class LAMLocalHead(ClsLocalHead):
    """The leap augmented head of MLAAN (Zhang et al., 2024): ``z = A_1(x) + E(x)``, then A_2 to A_d, pooling, the classifier.

    A_1 and E are the bias and the momentum copy of the transfer:
    ``transfer=dict(source_unit='next_stage', scale=False)``. This head holds A_2 to A_d, built like units of the backbone that
    follow the transfer's, with weights of their own. By default these are the first unit of every later stage, then units at
    equal distances up to the last one of the backbone, so that shapes fit without adapters.

    Args:
        depth: d, the number of units with the one that the transfer copies; fewer if fewer follow.
        units: Names of A_2 to A_d, in network order, by the name of the unit that the transfer copies, e.g.
            ``{'layer3.0': ['layer4.0', 'layer4.1']}``; without transfer, A_1 to A_d by the name of the block's last unit. Heads
            without an entry follow the rule.
        boundary, transfer, head, loss_weight: See :class:`ClsLocalHead`.

    Raises:
        ConfigError: ``units`` names a unit that doesn't exist, or that doesn't follow the one before it in the network; or a
            unit takes another shape than the one before it returns.
    """

    def __init__(
        self,
        boundary: Boundary,
        transfer: MomentumTransfer,
        head: dict,
        depth: Count = 4,
        units: dict | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        names, first = [unit.name for unit in boundary.all_units], boundary.position + 1
        chosen = _named_units(names, boundary.position, units or {})
        if chosen is None:
            chosen = _leap(boundary.all_units, boundary.position, depth - bool(transfer.copies))
        shapes = [boundary.feature, *boundary.following_features]
        inputs = [shapes[i - first] for i in chosen]
        outputs = [boundary.feature, *(shapes[i - first + 1] for i in chosen)]
        for i, takes, gets in zip(chosen, inputs, outputs, strict=False):
            if not takes.fits(gets):
                raise ConfigError(
                    f'local_head.units: {names[i]} takes {takes}, but gets {gets} in the head after {boundary.unit}: name '
                    'other units, or use AugLocalHead, which has adapters'
                )
        super().__init__(boundary, transfer, head, outputs[-1].channels, loss_weight)
        self.unit_inputs, self.last_feature = inputs, outputs[-1]
        self.unit_names = [names[i] for i in chosen]
        self.units = ModuleList(new_unit_like(boundary.following_units[i - first]) for i in chosen)

    @property
    def unit_copies(self) -> list[nn.Module]:
        return [*super().unit_copies, self.units]

    def embed(self, y: Tensor, inputs: Tensor) -> Tensor:
        for feature, unit in zip(self.unit_inputs, self.units, strict=True):
            y = unit(y, *self.hw_shape_args(y, feature, inputs))
        return self.last_feature.pool(y)


def _leap(units: Sequence[Unit], position: int, count: int) -> list[int]:
    """Indices of ``count`` units behind ``position``: the first of every later stage, the rest evenly up to the last unit."""
    firsts = [i for i in range(position + 1, len(units)) if units[i].stage > units[i - 1].stage][:count]
    start = firsts[-1] if firsts else position
    behind = len(units) - 1 - start
    count = min(count - len(firsts), behind)
    return [*firsts, *(start - -behind * i // count for i in range(1, count + 1))]


def _named_units(names: Sequence[str], position: int, units: Mapping[str, Sequence[str]]) -> list[int] | None:
    """Indices of the units that ``units`` names for the transfer on unit ``position``; None if it has no entry for it."""
    for source, following in units.items():
        if not isinstance(following, (list, tuple)):
            raise ConfigError(f'local_head.units[{source!r}]={following!r}: expected a list of unit names')
        if unknown := [name for name in (source, *following) if name not in names]:
            raise ConfigError(f'local_head.units names {unknown}: choose from the units {", ".join(names)}')
        indices = [names.index(name) for name in (source, *following)]
        if indices != sorted(set(indices)):
            raise ConfigError(
                f'local_head.units: {[source, *following]} are not in the order of the network: {", ".join(names)}'
            )
    own = units.get(names[position])
    return None if own is None else [names.index(name) for name in own]
