"""Which loss trains which parameter."""

from __future__ import annotations

from torch import nn

from mmman.errors import MisuseError
from mmman.local.blocks import localized_backbone


def trained_parameters(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The trainable parameters of a model by the block whose loss trains them.

    Args:
        model: A model with one localised backbone.

    Returns:
        K dicts of parameters by their name in the model. The first K-1 are a block with its local head; the last is all that
        the task loss trains: the last block, neck and head.

    Raises:
        MisuseError: A parameter belongs to two of them.
    """
    backbone = localized_backbone(model)
    local = backbone.local
    path = next(name for name, module in model.named_modules() if module is backbone)
    roots = {}
    for j, (block, key) in enumerate(zip(local.plan.blocks[:-1], local, strict=True)):
        for below in (f'local.{key}', *(part for unit in block for part in (*unit.modules, *unit.tensors))):
            roots[f'{path}.{below}' if path else below] = j
    scopes = [{} for _ in local.plan.blocks]
    first: dict[nn.Parameter, tuple[str, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        parts = name.split('.')
        j = next((roots[root] for i in range(len(parts)) if (root := '.'.join(parts[: i + 1])) in roots), len(scopes) - 1)
        other, owner = first.setdefault(parameter, (name, j))
        if owner != j:
            raise MisuseError(
                f'{other} and {name} are one parameter, which the losses of blocks {owner + 1} and {j + 1} train: give each '
                'block its own, or cut the backbone so that both are in one block'
            )
        if other == name:
            scopes[j][name] = parameter
    return scopes
