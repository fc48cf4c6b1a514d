"""Finds the checkpoint of a work folder to resume from, and checks that a file is a training checkpoint."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from mmengine.logging import print_log

from mmman.errors import CheckpointError
from mmman.messages import one_line
from mmman.runtime.archive import format_path
from mmman.runtime.checkpoint import REMEDY, load_from_local
from mmman.runtime.checkpoint_content import LOG

_NAME = re.compile(r'(epoch|iter)_(\d+)\.pth')
LAST_CHECKPOINT = 'last_checkpoint'


def latest_checkpoint(folder: str | Path, out_dir: str | None = None) -> Path | str | None:
    """Return the newest checkpoint of a run: the one named in ``last_checkpoint``, else the one with the highest number.

    The file ``last_checkpoint`` is used if it names a file in the work folder or in ``out_dir``. Any other content (the
    checkpoint of another run, a missing file, a URL that the config doesn't name, no text) is ignored, and a warning is logged.
    If the folder was moved or copied, the file with the same name in the folder is used.

    Args:
        folder: The work folder.
        out_dir: ``out_dir`` of the run's checkpoint hook, if checkpoints are not written to the work folder.

    Returns:
        A path, a URL below ``out_dir`` (a str), or None if there is no checkpoint.
    """
    numbered = next(iter(_numbered(folder)), None)
    recorded = _read_last_checkpoint(folder)
    if recorded is None:
        return numbered
    if '://' in recorded and out_dir and recorded.startswith(f'{out_dir.rstrip("/")}/') and '..' not in recorded.split('/'):
        return recorded
    homes = [folder, *([out_dir] if out_dir and '://' not in out_dir else [])]
    if Path(recorded).is_file() and any(_is_below(recorded, home) for home in homes):
        return Path(recorded)
    moved = Path(folder, os.path.basename(recorded))
    found = moved if recorded and moved.is_file() and _NAME.fullmatch(moved.name) else numbered
    if recorded:
        _warn_ignored(folder, f'names {format_path(recorded)}, which is not a checkpoint of this work folder', found)
    return found


def previous_checkpoint(folder: str | Path, out_dir: str | None = None) -> Path | None:
    """Return the newest checkpoint older than :func:`latest_checkpoint`, or None. Also None if checkpoints are remote."""
    latest = latest_checkpoint(folder, out_dir)
    if isinstance(latest, str):
        return None
    older = [path for path in _numbered(folder) if latest is None or path.name != latest.name]
    if latest is not None and (match := _NAME.fullmatch(latest.name)):
        older = [path for path in older if path.name.startswith(match[1]) and _number(path) < int(match[2])]
    return next(iter(older), None)


def check_training_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint file is complete and is a training checkpoint.

    Raises:
        CheckpointError: The file is truncated or damaged, or no checkpoint that a run can resume from.
    """
    checkpoint = load_from_local(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    reason = ''
    if not isinstance(meta, dict) or not {'epoch', 'iter'} <= meta.keys():
        reason = "is not from a training run of mmengine: it has no meta with 'epoch' and 'iter'"
    elif odd := [name for name in ('epoch', 'iter') if type(meta[name]) is not int or meta[name] < 0]:
        reason = f'is not from a training run of mmengine: its {odd[0]} is {meta[odd[0]]!r}'
    elif type(meta.get('seed')) not in (int, type(None)):
        reason = f'is not from a training run of mmengine: its seed is {meta["seed"]!r}'
    elif not all(part in checkpoint.get('message_hub', dict.fromkeys(LOG)) for part in LOG):
        reason = f'has a message_hub that lacks a part of an mmengine log: {", ".join(LOG)}'
    if reason:
        raise CheckpointError(one_line(f'{format_path(path)} {reason}; {REMEDY}'))


def _read_last_checkpoint(folder: str | Path) -> str | None:
    """Return the content of ``last_checkpoint``: None without such a file; '' if it holds no path."""
    file = Path(folder, LAST_CHECKPOINT)
    if not os.path.lexists(file):
        return None
    try:
        text = file.read_bytes()[:4097].decode().strip()
        if len(text) <= 4096 and text.isprintable():
            return text
        reason = 'does not contain a path'
    except (OSError, UnicodeDecodeError) as error:
        reason = f'cannot be read ({type(error).__name__})'
    _warn_ignored(folder, reason, next(iter(_numbered(folder)), None))
    return ''


def _is_below(path: str, folder: str | Path) -> bool:
    """Whether a path is below a folder. Links inside the folder are not resolved."""
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def _warn_ignored(folder: str | Path, reason: str, found: Path | None) -> None:
    instead = f'using {format_path(found)} instead' if found else 'the folder has no other checkpoint'
    message = one_line(f'{format_path(Path(folder, LAST_CHECKPOINT))} is ignored: it {reason}; {instead}')
    print_log(message, logger='current', level=logging.WARNING)


def _numbered(folder: str | Path) -> list[Path]:
    """Return the checkpoints that mmengine names by epoch or iteration, newest first; if both exist, the kind written last."""
    found = [path for path in Path(folder).glob('*.pth') if _NAME.fullmatch(path.name)]
    if not found:
        return []
    kind = max(found, key=lambda path: path.stat().st_mtime_ns).name.partition('_')[0]
    return sorted((path for path in found if path.name.startswith(kind)), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[2])
