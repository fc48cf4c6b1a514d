"""Nobody waits for the dead: every process of a pipeline shows that it lives, and says why when it ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import Store

from mmman.errors import PeerError
from mmman.parallel.pipeline.place import Place

FAILURE, BEAT, LEFT = 'failure', 'beat', b'left'
GRACE_S = 10
"""Seconds that the main thread gets to end by itself once a failure is known."""


class Watchdog:
    """A thread that beats for this process and watches all others through the store they share.

    Args:
        place: This process.
        store: A connection of its own: the thread's waits must not block anybody else's.
        timeout: Seconds without a beat after which a process counts as dead.
    """

    def __init__(self, place: Place, store: Store, timeout: float) -> None:
        self._place, self._store, self._timeout = place, store, timeout
        self._others = [rank for rank in range(place.world_size) if rank != place.rank]
        self._stop = threading.Event()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def start(self) -> None:
        """Start beating and watching; :meth:`leave` ends it in order."""
        self._thread.start()

    def leave(self) -> None:
        """Say that this process is done."""
        self._stop.set()
        self._thread.join()
        self._say_goodbye()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Tells all processes of an error inside."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and 'onnection' in str(error):
                self._await_failure()  # of a peer in a collective: the beats will tell which
            self.report(f'{self._place}: {type(error).__name__}: {error}')
            self.leave()
            atexit.register(os._exit, 1)  # threads that wait for messages in C++ can't be ended otherwise
            raise

    def report(self, reason: str) -> None:
        """Tell all processes why the job ends; the first reason counts."""
        try:
            self._failure = self._store.compare_set(FAILURE, '', reason).decode()
        except RuntimeError:
            self._failure = self._failure or self._lost_store(reason)

    def check(self) -> None:
        """Raise :class:`PeerError` where another process has failed."""
        if self._failure is not None:
            raise PeerError(f'the pipeline ends because of {self._failure}')

    def _await_failure(self) -> None:
        deadline = time.monotonic() + self._timeout + GRACE_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _say_goodbye(self) -> None:
        """The process that may keep the store stays until all others have read what they need, or are dead."""
        with suppress(RuntimeError):  # the store is gone already
            self._store.set(f'{BEAT}/{self._place.rank}', LEFT)
            deadline = time.monotonic() + GRACE_S
            while self._place.rank == 0 and self._others_stay() and time.monotonic() < deadline:
                time.sleep(0.1)

    def _others_stay(self) -> bool:
        keys = [f'{BEAT}/{rank}' for rank in self._others]
        return not self._store.check(keys) or any(value != LEFT for value in self._store.multi_get(keys))

    def _lost_store(self, reason: str) -> str:
        """The store goes with the process that keeps it: the first one, unless the launcher does."""
        return f'{self._place.at(0)}, or what else keeps the store, is gone ({reason})'

    def _watch(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        try:
            while not self._stop.wait(min(1.0, self._timeout / 4)):
                count += 1
                self._store.set(f'{BEAT}/{self._place.rank}', str(count))
                now = time.monotonic()
                for rank in self._others:
                    key = f'{BEAT}/{rank}'
                    beat = self._store.get(key) if self._store.check([key]) else b''
                    last, since = seen.get(rank, (None, now))
                    seen[rank] = (beat, since if beat == last else now)
                    if beat != LEFT and now - seen[rank][1] > self._timeout:
                        self.report(f'{self._place.at(rank)}: no sign of life for {self._timeout:g} s')
                if self._store.check([FAILURE]):
                    self._failure = self._store.get(FAILURE).decode()
                if self._failure is not None:
                    break
        except RuntimeError as error:
            self._failure = self._failure or self._lost_store(str(error).splitlines()[0])
        if self._failure is not None and not self._stop.wait(GRACE_S):
            # the main thread is stuck where no exception reaches it
            print(f'{self._place}: the pipeline ends because of {self._failure}', file=sys.stderr, flush=True)
            os._exit(1)


def patient(store: Store) -> Store:
    """A connection of its own to the same store, on which waits are short."""
    store = store.clone()
    store.set_timeout(timedelta(seconds=30))
    return store
