"""Which checkpoint of a work folder a run goes on from, and whether a run can go on from a file."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from mmengine.logging import print_log

from mmman.errors import CheckpointError
from mmman.messages import one_line
from mmman.runtime.archive import shown
from mmman.runtime.checkpoint import REMEDY, load_from_local
from mmman.runtime.checkpoint_content import LOG

_NAME = re.compile(r'(epoch|iter)_(\d+)\.pth')
NOTE = 'last_checkpoint'


def latest_checkpoint(folder: str | Path, out_dir: str | None = None) -> Path | str | None:
    """The newest checkpoint of a run: the one that ``last_checkpoint`` names, or else the one with the highest number.

    The note counts where it names a file in the folder, or one in ``out_dir``. Anything else it says (the checkpoint of
    another run, a file that is gone, a URL that the config doesn't name, no text at all) is ignored, which one line of the log
    says. Of a folder that was moved or copied, the file of the noted name is taken.

    Args:
        folder: The work folder.
        out_dir: ``out_dir`` of the run's checkpoint hook, where checkpoints go that are not kept in the work folder.

    Returns:
        A path, a URL below ``out_dir`` (a str), or None where there is no checkpoint.
    """
    numbered = next(iter(_numbered(folder)), None)
    noted = _noted(folder)
    if noted is None:
        return numbered
    if '://' in noted and out_dir and noted.startswith(f'{out_dir.rstrip("/")}/') and '..' not in noted.split('/'):
        return noted
    homes = [folder, *([out_dir] if out_dir and '://' not in out_dir else [])]
    if Path(noted).is_file() and any(_is_below(noted, home) for home in homes):
        return Path(noted)
    moved = Path(folder, os.path.basename(noted))
    found = moved if noted and moved.is_file() and _NAME.fullmatch(moved.name) else numbered
    if noted:
        _say(folder, f'names {shown(noted)}, which is no checkpoint file of this work folder', found)
    return found


def previous_checkpoint(folder: str | Path, out_dir: str | None = None) -> Path | None:
    """The newest checkpoint of a run before :func:`latest_checkpoint`; None also where checkpoints are remote."""
    latest = latest_checkpoint(folder, out_dir)
    if isinstance(latest, str):
        return None
    older = [path for path in _numbered(folder) if latest is None or path.name != latest.name]
    if latest is not None and (match := _NAME.fullmatch(latest.name)):
        older = [path for path in older if path.name.startswith(match[1]) and _number(path) < int(match[2])]
    return next(iter(older), None)


def check_whole(path: str | Path) -> None:
    """Check all of a checkpoint file, and that it is a training checkpoint.

    Raises:
        CheckpointError: The file is cut short or damaged, or no checkpoint that a run can go on from.
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
        reason = f'has a message_hub without the parts of a log of mmengine: {", ".join(LOG)}'
    if reason:
        raise CheckpointError(one_line(f'{shown(path)} {reason}; {REMEDY}'))


def _noted(folder: str | Path) -> str | None:
    """What the note says; None where there is none; an empty text where mmengine's own hook was killed in writing it."""
    note = Path(folder, NOTE)
    if not os.path.lexists(note):
        return None
    try:
        text = note.read_bytes()[:4097].decode().strip()
        if len(text) <= 4096 and text.isprintable():
            return text
        reason = 'holds no path'
    except (OSError, UnicodeDecodeError) as error:
        reason = f'cannot be read ({type(error).__name__})'
    _say(folder, reason, next(iter(_numbered(folder)), None))
    return ''


def _is_below(path: str, folder: str | Path) -> bool:
    """Whether a path names a file below a folder. A link in the folder is the folder's own affair."""
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def _say(folder: str | Path, reason: str, found: Path | None) -> None:
    instead = f'taking {shown(found)} instead' if found else 'there is no other checkpoint in this folder'
    message = one_line(f'{shown(Path(folder, NOTE))} is ignored: it {reason}; {instead}')
    print_log(message, logger='current', level=logging.WARNING)


def _numbered(folder: str | Path) -> list[Path]:
    """The checkpoints that mmengine names by epoch or iteration, newest first; of both kinds those of the last one written."""
    found = [path for path in Path(folder).glob('*.pth') if _NAME.fullmatch(path.name)]
    if not found:
        return []
    kind = max(found, key=lambda path: path.stat().st_mtime_ns).name.partition('_')[0]
    return sorted((path for path in found if path.name.startswith(kind)), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[2])
