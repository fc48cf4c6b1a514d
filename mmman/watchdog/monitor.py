"""Ends a distributed run in which a process is lost or stuck, and names that process in all others."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mmman.errors import PeerError
from mmman.watchdog.peers import LOST_S, Beat, Peers
from mmman.watchdog.progress import Progress, code_of_thread
from mmman.watchdog.termination import TerminationSignal

FAILURE, BEAT = 'failure', 'beat'
GRACE_S = 10.0
"""Seconds that the main thread gets to end by itself once a failure is known."""
YEAR_S = 365 * 24 * 3600.0
LINGER_S = 3.0
"""Seconds by which a process that fails ends before the others, so that the launcher takes it for the cause. It waits as long
for the others to print why they end."""


class Watchdog:
    """Heartbeat-based failure detection among the processes of a job.

    One thread sends heartbeats through a store and reads those of the others; a heartbeat says where the process is in its run.
    Another thread waits for a verdict, prints it, and ends the process where its main thread doesn't: the main thread may be in
    a collective, where no exception reaches it. The training thread does nothing but assign to ``progress``.

    Args:
        rank: This process.
        world_size: How many there are.
        store: A connection to the store that all share, for this object alone.
        timeout: Seconds without a heartbeat after which a process is lost, and without progress after which it is stuck.
        name: What a rank is called in messages.
        job: What the job is called in messages.

    Attributes:
        progress: Where this process is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        timeout: float,
        name: Callable[[int], str] = 'rank {}'.format,
        job: str = 'run',
    ) -> None:
        self.progress = Progress()
        self._rank, self._store, self._timeout, self._name, self._job = rank, store, timeout, name, job
        store.set_timeout(timedelta(seconds=min(timeout, YEAR_S) + GRACE_S))
        self._others = [other for other in range(world_size) if other != rank]
        self._interval = min(max(1.0, world_size / 64), timeout / 4)
        self._peers = Peers(world_size, timeout, time.monotonic(), name)
        self._beat = Beat()
        self._answered = time.monotonic()  # when the store answered last
        self._store_error: str | None = None
        self._failure: str | None = None
        self._own_failure: str | None = None
        self._hurry = threading.Event()  # a process is lost: find out soon which
        self._told = threading.Lock()
        self._stop = threading.Event()
        self._signal = TerminationSignal()
        self._listener = threading.Thread(target=self._listen, name='heartbeats', daemon=True)
        self._judge = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def start(self) -> None:
        """Start beating and watching; :meth:`leave` ends it in order. Called in the training thread."""
        self._main_thread = threading.get_ident()
        self._signal.trap()
        self._listener.start()
        self._judge.start()

    def leave(self) -> None:
        """Say that this process is done."""
        self._stop.set()
        self._listener.join(LINGER_S)
        self._judge.join(LINGER_S)
        self._signal.release()
        if not self._listener.is_alive() and self._store_error is None:  # else the store doesn't answer
            self._say_goodbye()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell all processes of an error inside.

        Raises:
            PeerError: In place of an error of a connection, where another process has failed.
        """
        try:
            yield
        except BaseException as error:
            peer_error = self.fail(error)
            if peer_error is not None:
                raise peer_error from None
            raise

    def fail(self, error: BaseException) -> PeerError | None:
        """Tell all processes that this one ends with an error.

        Returns:
            What to raise in place of ``error``, where that is only what another process's failure looks like from here.
        """
        if isinstance(error, SystemExit) and not error.code:
            self.leave()
            return None
        broken = _is_of_connection(error)
        if broken:
            self._await_failure()
        place = self.progress.position.text
        self._own_failure = reason = f'{self._name(self._rank)}: {_describe(error)}' + (f', in {place}' if place else '')
        self.report(reason)
        if self._failure == reason:
            _record_for_launcher(error)
            self._await_readers()
        else:
            self._tell()
            time.sleep(LINGER_S)
        self.leave()
        # Threads that wait in C++ can't be ended otherwise.
        atexit.register(os._exit, error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        return PeerError(self._message()) if broken and self._failure != reason else None

    def report(self, reason: str) -> None:
        """Tell all processes why the job ends; the first reason counts."""
        if self._failure is None:
            try:
                self._failure = self._store.compare_set(FAILURE, '', reason).decode()
            except RuntimeError:
                self._failure = reason

    def check(self) -> None:
        """Raise :class:`PeerError` where another process has failed."""
        if self._failure is not None:
            raise PeerError(self._message())

    def _message(self) -> str:
        return f'the {self._job} ends because of {self._failure}'

    def _await_failure(self) -> None:
        """A connection broke, as it does when the process at its other end dies: wait until it is known which, if any."""
        self._hurry.set()
        deadline = time.monotonic() + LOST_S + 3 * self._interval + LINGER_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _await_readers(self) -> None:
        deadline = time.monotonic() + LINGER_S
        while not self._peers.all_others(self._rank, 'told') and time.monotonic() < deadline:
            time.sleep(0.05)

    def _say_goodbye(self) -> None:
        """The process that may keep the store stays until all others have read what they need, or are dead."""
        with suppress(RuntimeError):  # the store is gone already
            self._store.set(f'{BEAT}/{self._rank}', replace(self._beat, left=True).encode())
            deadline = time.monotonic() + GRACE_S
            while self._rank == 0 and not _launcher_keeps_store() and time.monotonic() < deadline:
                self._hear()
                if self._peers.all_others(self._rank, 'left', time.monotonic() - LOST_S):
                    break
                time.sleep(0.1)

    # -- the thread that listens -------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        before = time.monotonic()
        try:
            while not self._stop.is_set():
                self._send()
                self._hear()
                now = self._answered = time.monotonic()
                if now - before > self._timeout / 2:
                    self._peers.restart(now)  # this process was suspended itself: its knowledge is old
                elif self._failure is None:
                    self._find_failure(now)
                before = now
                if self._beat.told and self._failure != self._own_failure:
                    return  # nothing more to learn, from a store that may go any time
                urgent = self._failure is not None or self._hurry.is_set()
                self._stop.wait(min(0.1, self._interval) if urgent else self._interval)
        except RuntimeError as error:
            self._store_error = str(error).splitlines()[0]

    def _make_beat(self) -> Beat:
        position, code = self.progress.position, code_of_thread(self._main_thread)
        marks = {'told': self._told.locked(), 'terminated': self._signal.received_at is not None}
        return Beat(self._beat.count + 1, *position, *code, **marks)

    def _send(self) -> None:
        self._beat = self._make_beat()
        self._store.set(f'{BEAT}/{self._rank}', self._beat.encode())

    def _hear(self) -> None:
        keys = {rank: f'{BEAT}/{rank}' for rank in self._others}
        if keys and not self._store.check([*keys.values()]):  # some have not begun yet
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        beats = self._store.multi_get([*keys.values()]) if keys else []
        now = time.monotonic()
        self._peers.hear(self._rank, self._beat, now)
        for rank, beat in zip(keys, beats, strict=True):
            self._peers.hear(rank, Beat.decode(beat), now)

    def _find_failure(self, now: float) -> None:
        if self._store.check([FAILURE]):
            self._failure = self._store.get(FAILURE).decode()
        elif reason := self._peers.find_lost(now, self._hurry.is_set()) or self._peers.find_stuck(now):
            self.report(reason)

    # -- the thread that ends the process ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.is_set():
            self._signal.wait(min(0.5, self._interval))
            now = time.monotonic()
            if now - before > self._timeout / 2:
                self._answered = now  # this process was suspended itself
            before = now
            if self._failure is None and self._store_error is not None:
                self._failure = self._blame_store_keeper(f'the store that it keeps is gone ({self._store_error})', now)
            elif self._failure is None and now - self._answered > self._timeout:
                self._failure = self._blame_store_keeper(f'no answer for {self._timeout:g} s from the store that it keeps', now)
            if self._failure is not None:
                self._end()
            elif self._signal.received_at is not None:
                self._end_if_nobody_is_lost(now)

    def _end(self) -> None:
        self._tell()
        # Others' connections break where the process ends that keeps the store, or that they wait for: these end last.
        keeps_store = self._rank == 0 and not _launcher_keeps_store()
        is_named = self._failure.startswith(f'{self._name(self._rank)}:')
        deadline = time.monotonic() + GRACE_S + LINGER_S * (2 if is_named else keeps_store)
        while time.monotonic() < deadline and not self._signal.wait(0.1):
            if self._stop.is_set():
                return  # the main thread ends by itself
        os._exit(1)

    def _end_if_nobody_is_lost(self, now: float) -> None:
        """On SIGTERM: the launcher may have noticed earlier than the others' heartbeats that a process is gone."""
        self._hurry.set()
        everyone = self._peers.all_others(self._rank, 'terminated')
        if everyone or now - self._signal.received_at > LOST_S + 2 * self._interval:
            os._exit(128 + self._signal.number)

    def _tell(self) -> None:
        """Print once why the job ends, where the main thread doesn't, and write it where the launcher's report looks for it."""
        if self._told.acquire(blocking=False) and self._failure != self._own_failure:
            print(f'{self._name(self._rank)}: {self._message()}', file=sys.stderr, flush=True)
            error = PeerError(self._message())
            error.__suppress_context__ = True
            _record_for_launcher(error)

    def _blame_store_keeper(self, what: str, now: float) -> str:
        if _launcher_keeps_store():
            return f'the launcher: {what}'
        self._peers.hear(self._rank, self._make_beat(), now)
        return self._peers.describe(0, what)


def _launcher_keeps_store() -> bool:
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


def _is_of_connection(error: BaseException) -> bool:
    """Whether an error may be how another process's failure looks from this one. Gloo raises bare RuntimeErrors."""
    text = str(error)
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or 'gloo' in text or 'onnection' in text)


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f'it exits with code {error.code}' if isinstance(error.code, int) else str(error.code).splitlines()[0]
    return ': '.join([type(error).__name__, *str(error).splitlines()[:1]])


def _record_for_launcher(error: BaseException) -> None:
    """Let the table that torch.distributed.run prints of failed processes show this error."""
    with suppress(OSError):
        try:
            raise error
        except BaseException as raised:
            get_error_handler().record_exception(raised)
