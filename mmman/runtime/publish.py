"""Publishes a training checkpoint: keeps weights under stock names and plain types, drops local heads and optimizer."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmman.errors import CheckpointError
from mmman.messages import one_line
from mmman.runtime.archive import format_path
from mmman.runtime.checkpoint import load_from_local
from mmman.runtime.formats import FORMATS, backbone_config, rename
from mmman.version import __version__

BACKBONE = 'backbone.'
LOCAL = 'backbone.local.'
META = ('cfg', 'dataset_meta', 'epoch', 'iter', 'mmengine_version')


def publish(
    checkpoint: Path, out: Path, backbone_only: bool = False, library: str = 'mm', ema: bool = False, force: bool = False
) -> tuple[Path, str]:
    """Write the weights of a training checkpoint without what only training needs.

    The file is a dict of ``state_dict`` and ``meta`` that ``torch.load(weights_only=True)`` can read. Its name contains the
    first 8 digits of its SHA-256 sum.

    Args:
        checkpoint: A checkpoint that mmengine's runner saved.
        out: Output path ``<folder>/<stem>.pth``. The file is written to ``<folder>/<stem>-<sum>.pth``.
        backbone_only: Write only ``backbone.*``.
        library: The library whose names are used. ``'mm'`` keeps the names; ``'torchvision'`` and ``'timm'`` write the backbone
            only, without a prefix.
        ema: Write the averaged weights of mmengine's ``EMAHook`` instead of the trained weights.
        force: Overwrite an existing file.

    Returns:
        The path of the file, and one line that describes its content.

    Raises:
        CheckpointError: The checkpoint can't be published with these arguments. The message says what to change.
    """
    loaded = read_checkpoint(checkpoint)
    weights, which = select_weights(loaded, ema)
    state = {name: tensor for name, tensor in weights.items() if LOCAL not in name}
    names = 'names as in the model'
    if backbone_only or library in FORMATS:
        state = {name: tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
        if not state:
            found = ', '.join(sorted({f'{name.split(".")[0]}.*' for name in weights}))
            raise CheckpointError(f'{checkpoint} has no tensor below {BACKBONE!r}, only {found}: publish the whole model')
        names = f"for init_cfg=dict(type='Pretrained', checkpoint=..., prefix={BACKBONE!r})"
    left = Counter('local heads' if LOCAL in name else 'neck and heads' for name in weights if name not in state)
    if library in FORMATS:
        config = backbone_config(str(loaded.get('meta', {}).get('cfg', '')))
        bare = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items()}
        state, model = rename(bare, config, library)
        names = f"names of {library}'s {model}, without its classifier"

    kept = OrderedDict((name, tensor.detach().cpu().clone()) for name, tensor in state.items())
    if library not in FORMATS:  # modules use these versions to convert old tensor names
        versions = getattr(loaded['state_dict'], '_metadata', {})
        kept._metadata = OrderedDict((name, version) for name, version in versions.items() if LOCAL not in f'{name}.')
    file, size = _write({'state_dict': kept, 'meta': plain_meta(loaded.get('meta', {}))}, out, force)
    parts = [f'{len(kept)} tensors, {size / 1e6:.1f} MB', which, names]
    if left:
        parts.append('dropped: ' + ', '.join(f'{count} tensors of {name}' for name, count in left.items()))
    return file, '; '.join(parts)


def read_checkpoint(path: Path) -> dict:
    """Read a training checkpoint, after checking its complete content (:mod:`mmman.runtime.checkpoint`)."""
    if not path.is_file():
        raise CheckpointError(one_line(f'no checkpoint at {format_path(path)}; give the path of a .pth file'))
    checkpoint = load_from_local(path)
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        found = ', '.join(map(str, [*checkpoint][:3])) if isinstance(checkpoint, dict) else 'one tensor'
        raise CheckpointError(
            one_line(
                f"{format_path(path)} has no state_dict, only {found}: give a checkpoint that mmengine's runner saved, "
                "or torch.save({'state_dict': weights}, ...)"
            )
        )
    return checkpoint


def select_weights(checkpoint: dict, ema: bool) -> tuple[dict[str, Tensor], str]:
    """Return the averaged or the trained weights, and a description of which they are.

    ``EMAHook`` swaps the two when saving: ``state_dict`` has the average, ``ema_state_dict`` the trained weights with the
    prefix ``module.``.
    """
    state, swapped = checkpoint['state_dict'], checkpoint.get('ema_state_dict')
    if swapped is None:
        if ema:
            raise CheckpointError('--ema: the checkpoint has no averaged weights; leave --ema out, or train with an EMAHook')
        return state, 'the trained weights'
    if ema:
        return state, "EMAHook's averaged weights"
    trained = {name: swapped.get(f'module.{name}', tensor) for name, tensor in state.items()}
    return trained, 'the trained weights (it also has averaged weights: use --ema to publish them)'


def plain_meta(meta: dict) -> dict:
    """Return the entries of a checkpoint's ``meta`` that inference needs, in plain types: dataset, config text and versions."""
    kept = {name: plain for name in META if (plain := _plain(meta.get(name))) is not None}
    return {**kept, 'mmman_version': __version__}


def _plain(value: object) -> object:
    """Convert ``value`` to built-in Python types; None if it can't be converted. Dict entries that can't are dropped."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain for key, item in value.items() if type(key) in (str, int) and (plain := _plain(item)) is not None}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return None if None in items else tuple(items) if isinstance(value, tuple) else items
    return value if type(value) in (str, int, float, bool) else None


def _write(content: dict, out: Path, force: bool) -> tuple[Path, int]:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    file = out.parent / f'{out.name.removesuffix(".pth")}-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    if file.exists() and not force:
        raise CheckpointError(f'{file} exists; give another OUT, or use --force to overwrite it')
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix('.part')
    unfinished.write_bytes(data)
    os.replace(unfinished, file)
    return file, len(data)
