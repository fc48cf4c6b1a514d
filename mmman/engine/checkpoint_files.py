"""Which checkpoint of a work folder a run goes on from, and whether that file is whole."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch

from mmman.errors import CheckpointError

_NAME = re.compile(r'(epoch|iter)_(\d+)\.pth')


def latest_checkpoint(folder: str | Path) -> Path | str | None:
    """The newest checkpoint of a run: the one that ``last_checkpoint`` names, or else the one with the highest number.

    The note counts only if it names a file that is there, or a URL (a str, then): mmengine's own hook can leave it empty, and a
    folder can be moved.
    """
    note = Path(folder, 'last_checkpoint')
    noted = note.read_text().strip() if note.is_file() else ''
    if '://' in noted:
        return noted
    if noted and Path(noted).is_file():
        return Path(noted)
    return next(iter(_numbered(folder)), None)


def previous_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run before :func:`latest_checkpoint`; None also where checkpoints are remote."""
    latest = latest_checkpoint(folder)
    if isinstance(latest, str):
        return None
    older = [path for path in _numbered(folder) if latest is None or path.name != latest.name]
    if latest is not None and (match := _NAME.fullmatch(latest.name)):
        older = [path for path in older if path.name.startswith(match[1]) and _number(path) < int(match[2])]
    return next(iter(older), None)


def check_whole(path: str | Path) -> None:
    """Check every byte of a checkpoint file against the checksums in it, and that ``torch.load`` reads it.

    Raises:
        CheckpointError: The file is cut short or damaged, or no checkpoint that a run can go on from.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f'{path} is cut short, damaged, or no checkpoint: {error}') from error
    if damaged:
        raise CheckpointError(f'{path} is damaged: its record {damaged} has another checksum than when it was written')
    try:
        checkpoint = torch.load(path, map_location='cpu', mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f'{path} is no checkpoint that torch.load reads: {str(error).splitlines()[0]}') from error
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if not isinstance(meta, dict) or not {'epoch', 'iter'} <= meta.keys():
        raise CheckpointError(f"{path} is not from a training run of mmengine: it has no meta with 'epoch' and 'iter'")


def _numbered(folder: str | Path) -> list[Path]:
    """The checkpoints that mmengine names by epoch or iteration, newest first; of both kinds those of the last one written."""
    found = [path for path in Path(folder).glob('*.pth') if _NAME.fullmatch(path.name)]
    if not found:
        return []
    kind = max(found, key=lambda path: path.stat().st_mtime_ns).name.partition('_')[0]
    return sorted((path for path in found if path.name.startswith(kind)), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[2])
