"""mmengine's checkpoint hook with atomic writes: if a run is killed at any time, its last complete checkpoint is kept."""

from __future__ import annotations

import logging
import os
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as MMCheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner, find_latest_checkpoint

from mmman.registry import HOOKS
from mmman.runtime.atomic_files import ATOMIC_BACKEND, UNFINISHED, check_folder, converting_write_errors, write_atomically
from mmman.runtime.ledger import Ledger

SUPERSEDED = 'superseded_ckpts'  # in the message hub, and thus in each checkpoint: the files that the checkpoint replaces
KEPT, BEST = 'keep_ckpt_ids', 'best_ckpt'  # keys of mmengine: numbers of existing checkpoints; path of the best


class DeferredRemovals:
    """A file backend that records removals and executes them later, if they are allowed.

    Args:
        backend: The wrapped backend. Every method except ``remove`` and ``rmtree`` is forwarded to it.
        is_own: Whether a path may be removed.
    """

    def __init__(self, backend: Any, is_own: Callable[[str], bool]) -> None:
        self._backend = backend
        self._is_own = is_own
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

    def keep(self, path: str | None) -> None:
        """Cancel the removal of a path, because it is written again."""
        self._removals.pop(str(path), None)

    def flush(self) -> None:
        """Execute the recorded removals. A file that is not removed is named in the log."""
        for path, remove in self._removals.items():
            if not self._is_own(path):
                print_log(f'Kept {path}: this run did not write it', logger='current')
                continue
            try:
                remove(path)
            except OSError as error:
                print_log(f'Kept {path}, remove it by hand: {error}', logger='current', level=logging.WARNING)
        self._removals = {}


@HOOKS.register_module()
class CheckpointHook(MMCheckpointHook):
    """mmengine's hook that writes local files atomically and removes old ones only when the new one is complete.

    While a checkpoint is written, ``max_keep_ckpts + 1`` files exist. A resumed run removes what a killed run left behind:
    unfinished files, and checkpoints that the resumed one had replaced. The arguments are those of mmengine's hook.

    Only files that this run wrote into its own folder are removed, whatever a checkpoint lists. A run that is resumed from a
    checkpoint of its folder continues the run that wrote that checkpoint, which the folder's :class:`Ledger` records. In a
    storage other than a local folder, only files that this process wrote are removed.

    Raises:
        CheckpointWriteError: A checkpoint can't be written, or the folder isn't writable. Existing checkpoints are kept.
    """

    def before_train(self, runner: Runner) -> None:
        """Find the folder and the files in it that belong to this run, and remove what a killed run left behind."""
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir or ''):
            self.backend_args = {'backend': ATOMIC_BACKEND}
        self._is_atomic = (self.backend_args or {}).get('backend') == ATOMIC_BACKEND
        self._written: set[str] = set()
        listed = _take_lists(runner)  # mmengine's hook would remove the listed files unchecked
        super().before_train(runner)
        self.file_backend = DeferredRemovals(self.file_backend, self._is_own)
        if not is_main_process():
            return
        resumed = None
        if getattr(runner, '_resume', False):
            resumed = runner._load_from or find_latest_checkpoint(runner.work_dir)
        unfinished = []
        if self._is_atomic:
            check_folder(self.out_dir)
            self._ledger = Ledger(self.out_dir)
            self._run = self._ledger.run_of(resumed) or uuid.uuid4().hex
            self.backend_args = {**self.backend_args, 'run': self._run}
            unfinished = self._ledger.unfinished_files(self._run, UNFINISHED)
        steps = self._restore_lists(runner, listed)
        kept = steps[-self.max_keep_ckpts :] if self.max_keep_ckpts > 0 else steps
        needed = {os.path.basename(path) for path in (resumed, *map(self._path, kept), *self._best_paths()) if path}
        for path in [*listed.get(SUPERSEDED, []), *map(self._path, steps), *unfinished]:
            if self._is_own(path) and os.path.basename(path) not in needed:
                self.file_backend.remove(path)
        self.file_backend.flush()

    def _restore_lists(self, runner: Runner, listed: dict[str, Any]) -> list[int]:
        """Restore the lists of files from a checkpoint, limited to files that this run wrote.

        Returns:
            The numbers of this run's checkpoints.
        """
        steps = [step for step in listed.get(KEPT, []) if self._is_own(self._path(step))]
        runner.message_hub.update_info(KEPT, steps)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
        for key, path in listed.items():
            if not key.startswith(BEST) or not self._is_own(path):
                continue
            runner.message_hub.update_info(key, path)
            indicator = key.removeprefix(f'{BEST}_')
            if key == BEST and hasattr(self, 'best_ckpt_path'):
                self.best_ckpt_path = path
            elif indicator in getattr(self, 'best_ckpt_path_dict', {}):
                self.best_ckpt_path_dict[indicator] = path
        return steps

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save as mmengine does, but remove old files last and replace ``last_checkpoint`` atomically."""
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self._path(step)
        if self.max_keep_ckpts > 0 and [*self.keep_ckpt_ids][-1:] != [step]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._supersede(self._path(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info(KEPT, [*self.keep_ckpt_ids])
        self._keep_current()
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.message_hub.update_info(SUPERSEDED, self.file_backend.paths)
        with converting_write_errors(self.last_ckpt):
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
        self._written.add(self.last_ckpt)
        if is_main_process():
            write_atomically(self.last_ckpt.encode(), os.path.join(runner.work_dir, 'last_checkpoint'))
            self.file_backend.flush()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with converting_write_errors(self.out_dir):
            super()._save_best_checkpoint(runner, metrics)
        self._written.update(filter(None, self._best_paths()))
        if is_main_process():
            self._keep_current()
            self.file_backend.flush()

    def after_train(self, runner: Runner) -> None:
        """Publish the checkpoint if ``published_keys`` is set."""
        with converting_write_errors(self.out_dir):
            super().after_train(runner)

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _best_paths(self) -> list[str | None]:
        return [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]

    def _is_own(self, path: str | os.PathLike) -> bool:
        """Whether this run wrote a file, and the file hasn't changed since."""
        if self._is_atomic and os.path.isfile(path):
            return self._ledger.run_of(path) == self._run
        return path in self._written

    def _keep_current(self) -> None:
        """Cancel removals of files that were written again under the same name."""
        for path in (self.last_ckpt, *self._best_paths()):
            self.file_backend.keep(path)

    def _supersede(self, path: str) -> None:
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # DeepSpeed's checkpoints are folders
            self.file_backend.rmtree(path)


def _take_lists(runner: Runner) -> dict[str, Any]:
    """Remove a checkpoint's lists of files from the message hub, so that no code uses them unchecked.

    Returns:
        The lists by name: :data:`SUPERSEDED` is a list of paths and :data:`KEPT` a list of numbers; names that begin with
        :data:`BEST` are paths. Values of other types are left out.
    """
    hub = runner.message_hub
    listed: dict[str, Any] = {}
    for key in [key for key in hub.runtime_info if str(key).startswith((SUPERSEDED, KEPT, BEST))]:
        value = hub.get_info(key)
        if str(key).startswith(BEST):
            hub.update_info(key, None)
            listed |= {key: value} if isinstance(value, str) else {}
        else:
            hub.update_info(key, [])
            kind = str if key == SUPERSEDED else int
            listed[key] = [item for item in value if type(item) is kind] if isinstance(value, (list, tuple)) else []
    return listed
