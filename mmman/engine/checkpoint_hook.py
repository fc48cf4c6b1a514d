"""mmengine's checkpoint hook, made safe against a kill at any moment: the last complete checkpoint is always there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMCheckpointHook
from mmengine.runner import Runner

from mmman.registry import HOOKS

UNFINISHED = '.unfinished'
ATOMIC_BACKEND = 'mmman.atomic'
SUPERSEDED = 'superseded_ckpts'  # in the message hub, and so in each checkpoint: the files that it replaces


def write_atomically(data: bytes, path: str | os.PathLike) -> None:
    """Write a file that appears under its name only when all of it is on the disk; the old one stays until then."""
    unfinished = f'{os.fspath(path)}{UNFINISHED}'
    with open(unfinished, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class AtomicBackend(LocalBackend):
    """mmengine's local file backend with atomic writes."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(filepath)), exist_ok=True)
        write_atomically(obj, filepath)


register_backend(ATOMIC_BACKEND, AtomicBackend, force=True)


class DeferredRemovals:
    """A file backend that notes what it is asked to remove, and does it later.

    Args:
        backend: The backend that does the work; everything but ``remove`` and ``rmtree`` is its own.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._removals: dict[str, Callable] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @property
    def paths(self) -> list[str]:
        return [*self._removals]

    def remove(self, path: str) -> None:
        self._removals[str(path)] = self._backend.remove

    def rmtree(self, path: str) -> None:
        self._removals[str(path)] = self._backend.rmtree

    def keep(self, path: str) -> None:
        """Forget to remove a path: it is written anew."""
        self._removals.pop(str(path), None)

    def flush(self) -> None:
        """Remove what was noted."""
        for path, remove in self._removals.items():
            remove(path)
        self._removals = {}


@HOOKS.register_module()
class CheckpointHook(MMCheckpointHook):
    """mmengine's hook with local files written atomically, and old ones removed when the new one is complete.

    So there are, while a checkpoint is written, ``max_keep_ckpts + 1`` of them. What a killed run left is removed by the next
    one: unfinished files, and the checkpoints that the resumed one had replaced. The arguments are mmengine's.
    """

    def before_train(self, runner: Runner) -> None:
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir or ''):
            self.backend_args = {'backend': ATOMIC_BACKEND}
        super().before_train(runner)
        self.file_backend = DeferredRemovals(self.file_backend)
        if not is_main_process():
            return
        for path in runner.message_hub.runtime_info.get(SUPERSEDED, []):
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
        self.file_backend.flush()
        if (self.backend_args or {}).get('backend') == ATOMIC_BACKEND:
            for unfinished in Path(self.out_dir).glob(f'*{UNFINISHED}'):
                unfinished.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """mmengine's order of things, but old files go last and the note of the latest checkpoint is replaced atomically."""
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        if self.max_keep_ckpts > 0 and [*self.keep_ckpt_ids][-1:] != [step]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._supersede(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids[0])))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', [*self.keep_ckpt_ids])
        self._keep_current()
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.message_hub.update_info(SUPERSEDED, self.file_backend.paths)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_atomically(self.last_ckpt.encode(), os.path.join(runner.work_dir, 'last_checkpoint'))
            self.file_backend.flush()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        if is_main_process():
            self._keep_current()
            self.file_backend.flush()

    def _keep_current(self) -> None:
        """A file may be written anew under the name of the one that it replaces."""
        for path in (self.last_ckpt, getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()):
            self.file_backend.keep(path)

    def _supersede(self, path: str) -> None:
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # DeepSpeed's checkpoints are folders
            self.file_backend.rmtree(path)
