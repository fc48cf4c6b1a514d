"""Checks and logs what ``init_cfg=dict(type='Pretrained', ...)`` loads into a localised backbone.

mmengine loads the tensors that match by name and shape. If none matches, for example because ``prefix`` is missing, mmengine
continues with random weights; this module raises an error instead.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmman.errors import ConfigError


def check_prefix(backbone: nn.Module) -> None:
    """Check, before weights are initialised, that the file has tensors below the configured prefix.

    Raises:
        ConfigError: No tensor of the file has the prefix. The message names the file and what to change.
    """
    config = _config(backbone)
    if config and config.get('prefix'):
        tensors = _read(config)
        if not any(name.startswith(_prefix(config)) for name in tensors):
            raise ConfigError(
                f'{config["checkpoint"]} has no tensor below {_prefix(config)!r}; {_suggest_fix(backbone, config, tensors)}'
            )


def report_pretrained(backbone: nn.Module) -> None:
    """Log in one line, after weights are initialised, which tensors were loaded and which were not.

    Raises:
        ConfigError: No tensor was loaded.
    """
    config, missing_pretrained = _config(backbone), backbone.local.missing_pretrained
    if config is None or missing_pretrained is None:
        return
    own, tensors = _stock_tensors(backbone), _read(config)
    counted = [name for name in own if not name.endswith('num_batches_tracked')]  # optional for BatchNorm and for mmengine
    missing = [name for name in counted if name in missing_pretrained]
    num_loaded = len(counted) - len(missing)
    if not num_loaded:
        raise ConfigError(f'no tensor was loaded from {config["checkpoint"]}; {_suggest_fix(backbone, config, tensors)}')
    prefix = _prefix(config) or _find_prefix(tensors, own) or ''
    expected = {prefix + name for name in own}
    unused = Counter(_top_level_key(name, prefix) for name in tensors if name not in expected)
    parts = [f'loaded {num_loaded} of {len(counted)} backbone tensors from {config["checkpoint"]}']
    if missing:
        parts.append(f'missing, or of another shape: {", ".join(missing[:3])}{", ..." if len(missing) > 3 else ""}')
    if len(expected & tensors.keys()) < num_loaded:
        parts.append(f'{type(backbone).__name__} converts names, so the unused tensors are not known')
    else:
        parts.append(f'unused: {", ".join(f"{count} of {name}" for name, count in unused.items()) or "nothing"}')
    print_log('; '.join(parts), logger='current', level=logging.WARNING if missing else logging.INFO)


def _config(backbone: nn.Module) -> dict | None:
    configs = getattr(backbone, 'init_cfg', None) or []
    configs = [configs] if isinstance(configs, dict) else configs
    return next((config for config in reversed(configs) if config['type'] in ('Pretrained', PretrainedInit)), None)


def _prefix(config: dict) -> str:
    prefix = config.get('prefix') or ''
    return f'{prefix}.' if prefix and not prefix.endswith('.') else prefix


def _read(config: dict) -> dict[str, Tensor]:
    checkpoint = CheckpointLoader.load_checkpoint(config['checkpoint'], map_location='cpu', logger='silent')
    return checkpoint.get('state_dict', checkpoint)


def _stock_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith('local.')}


def _find_prefix(names: Iterable[str], own: dict[str, Tensor]) -> str | None:
    """Return the prefix below which at least half of the backbone's names are found, or None."""
    counts = Counter()
    for name in names:
        parts = name.split('.')
        counts.update('.'.join([*parts[:i], '']) for i in range(len(parts)) if '.'.join(parts[i:]) in own)
    prefix, count = counts.most_common(1)[0] if counts else ('', 0)
    return prefix if 2 * count >= len(own) else None


def _top_level_key(name: str, prefix: str) -> str:
    inner = prefix if name.startswith(prefix) else ''
    return f'{inner}{name.removeprefix(inner).split(".")[0]}.*'


def _suggest_fix(backbone: nn.Module, config: dict, tensors: dict[str, Tensor]) -> str:
    """Say what to change so that the file fits the backbone."""
    own, kind = _stock_tensors(backbone), type(backbone).__name__
    prefix = _find_prefix(tensors, own)
    if prefix is None:
        return (
            f'{kind} has {next(iter(own))}, ..., the file {next(iter(tensors), None)}, ...: use a checkpoint of this backbone'
        )
    if prefix != _prefix(config):
        return f'the file has the tensors of {kind} below {prefix!r}: set prefix={prefix or None!r} in its init_cfg'
    name = next(name for name in own if prefix + name in tensors)
    shapes = [tuple(tensor.shape) for tensor in (own[name], tensors[prefix + name])]
    return f'{name} of {kind} has the shape {shapes[0]}, in the file {shapes[1]}: use a checkpoint of this depth and width'
