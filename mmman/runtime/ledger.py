"""Records which run wrote which file of a folder, in a list in the folder, because a checkpoint's content may be forged."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path


class Ledger:
    """A list of the files that runs wrote into a folder, with their size and modification time when complete.

    An entry has the run, the file's size and its modification time. An entry without size and time belongs to a file whose
    write has begun. Entries stay valid in a copy of the folder that preserves modification times.

    Args:
        folder: The folder. The list is stored in its file ``.mmman_checkpoints.json``.
    """

    NAME = '.mmman_checkpoints.json'

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = Path(folder)
        self.path = self._folder / self.NAME

    def with_entry(self, name: str, run: str, status: os.stat_result | None = None) -> bytes:
        """Return the content of the list with one more entry, and without entries of files that no longer exist.

        Args:
            name: The name of a file in the folder.
            run: The run that writes it.
            status: The status of the complete file, or None if its write begins.
        """
        kept = {other: entry for other, entry in self._entries().items() if os.path.lexists(self._folder / other)}
        kept[name] = {'run': run} if status is None else {'run': run, 'size': status.st_size, 'mtime_ns': status.st_mtime_ns}
        return json.dumps(kept, indent=1).encode()

    def run_of(self, path: object) -> str | None:
        """Return the run that wrote a file.

        Args:
            path: Any value.

        Returns:
            The run; None if ``path`` is no regular file directly in this folder, isn't in the list, or has changed since it
            was written.
        """
        if not isinstance(path, (str, os.PathLike)):
            return None
        try:
            folder, name = os.path.split(os.fspath(path))
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) or not os.path.samefile(folder or os.curdir, self._folder):
                return None
        except (OSError, ValueError):
            return None
        entry = self._entries().get(name, {})
        written = (entry.get('size', status.st_size), entry.get('mtime_ns', status.st_mtime_ns))
        return entry.get('run') if written == (status.st_size, status.st_mtime_ns) else None

    def unfinished_files(self, run: str, suffix: str) -> list[Path]:
        """Return the files of a run whose write began but didn't complete.

        Args:
            run: The run.
            suffix: The suffix of the names of unfinished files.
        """
        paths = [self._folder / name for name in self._entries() if name.endswith(suffix)]
        return [path for path in paths if self.run_of(path) == run]

    def _entries(self) -> dict[str, dict]:
        try:
            entries = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(entries, dict):
            return {}
        names = {name: entry for name, entry in entries.items() if name == os.path.basename(name)}
        return {name: entry for name, entry in names.items() if isinstance(entry, dict) and isinstance(entry.get('run'), str)}
