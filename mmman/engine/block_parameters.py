"""Map each tensor of a model to its block, and each parameter to the loss that trains it."""

from __future__ import annotations

from torch import nn

from mmman.errors import ConfigError
from mmman.local.blocks import localized_backbone


def block_index(model: nn.Module) -> dict[str, int]:
    """Map the name of each parameter and buffer of a localised model to the index of its block, from 0.

    A local head belongs to its block. Frozen units before the first block belong to the first block. Everything outside the
    blocks (neck, heads, norms on outputs) belongs to the last.
    """
    backbone = localized_backbone(model)
    plan, local = backbone.local.plan, backbone.local
    path = next(name for name, module in model.named_modules() if module is backbone)
    roots: dict[str, int] = {f'local.{key}': j for j, key in enumerate(local)}
    for j, block in enumerate(((*plan.frozen, *plan.blocks[0]), *plan.blocks[1:])):
        roots |= {part: j for unit in block for part in (*unit.modules, *unit.tensors)}
    roots = {f'{path}.{root}' if path else root: j for root, j in roots.items()}

    def block_of(name: str) -> int:
        parts = name.split('.')
        prefixes = ('.'.join(parts[: i + 1]) for i in range(len(parts)))
        return next((roots[prefix] for prefix in prefixes if prefix in roots), len(plan.blocks) - 1)

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: block_of(name) for name, _ in tensors}


def parameters_by_block(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Group the trainable parameters of a model by the block whose loss trains them.

    Args:
        model: A model with one localised backbone.

    Returns:
        K dicts of parameters by their name in the model. The first K-1 hold a block with its local head. The last holds
        everything that the task loss trains: the last block, neck and head.

    Raises:
        ConfigError: A parameter belongs to two blocks.
    """
    blocks = block_index(model)
    scopes: list[dict[str, nn.Parameter]] = [{} for _ in localized_backbone(model).local.plan.blocks]
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        other = first.setdefault(parameter, name)
        if blocks[other] != blocks[name]:
            raise ConfigError(
                f'{other} and {name} are the same parameter, but belong to blocks {blocks[other] + 1} and {blocks[name] + 1}, '
                'which have different losses: give each block its own parameter, or cut so that both are in one block'
            )
        if other == name:
            scopes[blocks[name]][name] = parameter
    return scopes
