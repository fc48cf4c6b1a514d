"""Ends a distributed run if a process is lost or stuck. All other processes report which one it was."""

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
"""Seconds that the main thread has to exit by itself once a failure is known."""
YEAR_S = 365 * 24 * 3600.0
LINGER_S = 3.0
"""Seconds by which a failed process exits before the others, so that the launcher reports it as the root cause. The failed
process waits up to this time for the others to print why they exit."""


class Watchdog:
    """Heartbeat-based failure detection among the processes of a job.

    One thread sends heartbeats through a store and reads those of the other processes. A heartbeat holds the position of the
    process in its run. Another thread waits for a failure, prints it, and ends the process if its main thread does not: the
    main thread may be in a collective, which no exception can interrupt. The training thread only assigns to ``progress``.

    Args:
        rank: Rank of this process.
        world_size: Number of processes.
        store: A connection to the store that all processes share. It must not be used elsewhere.
        timeout: Seconds without a heartbeat after which a process is lost, and without progress after which it is stuck.
        name: Returns the name of a rank for messages.
        job: Name of the job in messages.

    Attributes:
        progress: Position of this process.
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
        self._answered = time.monotonic()  # time of the last answer of the store
        self._store_error: str | None = None
        self._failure: str | None = None
        self._own_failure: str | None = None
        self._urgent = threading.Event()  # there is evidence of a lost process: use the short timeout
        self._printed = threading.Lock()
        self._stop = threading.Event()
        self._signal = TerminationSignal()
        self._heartbeat_thread = threading.Thread(target=self._exchange_heartbeats, name='heartbeats', daemon=True)
        self._watch_thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def start(self) -> None:
        """Start the heartbeat and watch threads. Must be called in the training thread. :meth:`leave` stops the threads."""
        self._main_thread = threading.get_ident()
        self._signal.trap()
        self._heartbeat_thread.start()
        self._watch_thread.start()

    def leave(self) -> None:
        """Stop the threads and announce that this process is done."""
        self._stop.set()
        self._heartbeat_thread.join(LINGER_S)
        self._watch_thread.join(LINGER_S)
        self._signal.release()
        if not self._heartbeat_thread.is_alive() and self._store_error is None:  # otherwise the store does not answer
            self._announce_exit()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report an error that occurs in this context to all processes, and raise it.

        Raises:
            PeerError: Instead of a connection error, if another process has failed.
        """
        try:
            yield
        except BaseException as error:
            peer_error = self.fail(error)
            if peer_error is not None:
                raise peer_error from None
            raise

    def fail(self, error: BaseException) -> PeerError | None:
        """Report to all processes that this one exits with an error.

        Args:
            error: The error. A ``SystemExit`` with code 0 counts as a normal exit.

        Returns:
            The error to raise instead if ``error`` is a connection error that another process's failure has caused, else None.
        """
        if isinstance(error, SystemExit) and not error.code:
            self.leave()
            return None
        is_connection_error = _is_connection_error(error)
        if is_connection_error:
            self._wait_for_failure()
        position = self.progress.position.text
        self._own_failure = reason = f'{self._name(self._rank)}: {_describe(error)}' + (f', in {position}' if position else '')
        self.report(reason)
        if self._failure == reason:
            _record_for_launcher(error)
            self._wait_until_printed()
        else:
            self._print_failure()
            time.sleep(LINGER_S)
        self.leave()
        # os._exit, because threads that wait in C++ code cannot be ended otherwise.
        atexit.register(os._exit, error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        return PeerError(self._message()) if is_connection_error and self._failure != reason else None

    def report(self, reason: str) -> None:
        """Report to all processes why the job ends. The first reason in the store counts."""
        if self._failure is None:
            try:
                self._failure = self._store.compare_set(FAILURE, '', reason).decode()
            except RuntimeError:
                self._failure = reason

    def check(self) -> None:
        """Check for failures.

        Raises:
            PeerError: A process has failed.
        """
        if self._failure is not None:
            raise PeerError(self._message())

    def _message(self) -> str:
        return f'the {self._job} ends because of {self._failure}'

    def _wait_for_failure(self) -> None:
        """Wait until the failed process is known. Called after a connection error, which may mean that the peer has died."""
        self._urgent.set()
        deadline = time.monotonic() + LOST_S + 3 * self._interval + LINGER_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _wait_until_printed(self) -> None:
        """Wait until all other processes have printed the failure, for :data:`LINGER_S` seconds at most."""
        deadline = time.monotonic() + LINGER_S
        while not self._peers.all_others(self._rank, 'printed') and time.monotonic() < deadline:
            time.sleep(0.05)

    def _announce_exit(self) -> None:
        """Set the ``left`` flag. A process that hosts the store waits until all others have left or are lost.

        It waits for :data:`GRACE_S` seconds at most.
        """
        with suppress(RuntimeError):  # the store may be gone already
            self._store.set(f'{BEAT}/{self._rank}', replace(self._beat, left=True).encode())
            deadline = time.monotonic() + GRACE_S
            while self._rank == 0 and not _launcher_hosts_store() and time.monotonic() < deadline:
                self._read_heartbeats()
                if self._peers.all_others(self._rank, 'left', time.monotonic() - LOST_S):
                    break
                time.sleep(0.1)

    # -- heartbeat thread --------------------------------------------------------------------------------------------------

    def _exchange_heartbeats(self) -> None:
        before = time.monotonic()
        try:
            while not self._stop.is_set():
                self._send_heartbeat()
                self._read_heartbeats()
                now = self._answered = time.monotonic()
                if now - before > self._timeout / 2:
                    self._peers.reset_clocks(now)  # this process was suspended, so its data is outdated
                elif self._failure is None:
                    self._find_failure(now)
                before = now
                if self._beat.printed and self._failure != self._own_failure:
                    return  # nothing more to read, and the store may close at any time
                poll_fast = self._failure is not None or self._urgent.is_set()
                self._stop.wait(min(0.1, self._interval) if poll_fast else self._interval)
        except RuntimeError as error:
            self._store_error = str(error).splitlines()[0]

    def _make_beat(self) -> Beat:
        position, code = self.progress.position, code_of_thread(self._main_thread)
        flags = {'printed': self._printed.locked(), 'terminated': self._signal.received_at is not None}
        return Beat(self._beat.count + 1, *position, *code, **flags)

    def _send_heartbeat(self) -> None:
        self._beat = self._make_beat()
        self._store.set(f'{BEAT}/{self._rank}', self._beat.encode())

    def _read_heartbeats(self) -> None:
        keys = {rank: f'{BEAT}/{rank}' for rank in self._others}
        if keys and not self._store.check([*keys.values()]):  # some have not started yet
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        beats = self._store.multi_get([*keys.values()]) if keys else []
        now = time.monotonic()
        self._peers.update(self._rank, self._beat, now)
        for rank, beat in zip(keys, beats, strict=True):
            self._peers.update(rank, Beat.decode(beat), now)

    def _find_failure(self, now: float) -> None:
        if self._store.check([FAILURE]):
            self._failure = self._store.get(FAILURE).decode()
        elif reason := self._peers.find_lost(now, self._urgent.is_set()) or self._peers.find_stuck(now):
            self.report(reason)

    # -- watch thread ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.is_set():
            self._signal.wait(min(0.5, self._interval))
            now = time.monotonic()
            if now - before > self._timeout / 2:
                self._answered = now  # this process was suspended
            before = now
            if self._failure is None and self._store_error is not None:
                self._failure = self._describe_store_failure(f'the store that it hosts is gone ({self._store_error})', now)
            elif self._failure is None and now - self._answered > self._timeout:
                self._failure = self._describe_store_failure(
                    f'no answer for {self._timeout:g} s from the store that it hosts', now
                )
            if self._failure is not None:
                self._end()
            elif self._signal.received_at is not None:
                self._end_if_no_process_is_lost(now)

    def _end(self) -> None:
        self._print_failure()
        # The host of the store and the failed process exit last, because the others' connections to them break then.
        hosts_store = self._rank == 0 and not _launcher_hosts_store()
        is_named = self._failure.startswith(f'{self._name(self._rank)}:')
        deadline = time.monotonic() + GRACE_S + LINGER_S * (2 if is_named else hosts_store)
        while time.monotonic() < deadline and not self._signal.wait(0.1):
            if self._stop.is_set():
                return  # the main thread exits by itself
        os._exit(1)

    def _end_if_no_process_is_lost(self, now: float) -> None:
        """Exit on SIGTERM unless a process is lost. The launcher may notice a lost process before its heartbeats time out."""
        self._urgent.set()
        everyone = self._peers.all_others(self._rank, 'terminated')
        if everyone or now - self._signal.received_at > LOST_S + 2 * self._interval:
            os._exit(128 + self._signal.number)

    def _print_failure(self) -> None:
        """Print once why the job ends and write it to the launcher's error file, unless this process reported the failure."""
        if self._printed.acquire(blocking=False) and self._failure != self._own_failure:
            print(f'{self._name(self._rank)}: {self._message()}', file=sys.stderr, flush=True)
            error = PeerError(self._message())
            error.__suppress_context__ = True
            _record_for_launcher(error)

    def _describe_store_failure(self, what: str, now: float) -> str:
        if _launcher_hosts_store():
            return f'the launcher: {what}'
        self._peers.update(self._rank, self._make_beat(), now)
        return self._peers.describe(0, what)


def _launcher_hosts_store() -> bool:
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


def _is_connection_error(error: BaseException) -> bool:
    """Whether an error may be the result of another process's failure. Gloo raises plain RuntimeErrors."""
    text = str(error)
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or 'gloo' in text or 'onnection' in text)


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f'exited with code {error.code}' if isinstance(error.code, int) else str(error.code).splitlines()[0]
    return ': '.join([type(error).__name__, *str(error).splitlines()[:1]])


def _record_for_launcher(error: BaseException) -> None:
    """Write an error to the file from which torch.distributed.run prints its table of failed processes."""
    with suppress(OSError):
        try:
            raise error
        except BaseException as raised:
            get_error_handler().record_exception(raised)
