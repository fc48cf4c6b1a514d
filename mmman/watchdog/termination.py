"""Notices SIGTERM while the main thread is in C++, where Python's signal handlers don't run."""

from __future__ import annotations

import os
import select
import signal
import threading
import time


class TerminationSignal:
    """SIGTERM, as a thread can wait for it.

    Python runs signal handlers in the main thread, between two operations of the interpreter: never while that thread waits in
    a collective. The number of a signal is written to a pipe at once, though (:func:`signal.set_wakeup_fd`).

    Attributes:
        received_at: When it came, by :func:`time.monotonic`; None where it hasn't.
    """

    number = signal.SIGTERM

    def __init__(self) -> None:
        self.received_at: float | None = None
        self._pipe: tuple[int, int] | None = None
        self._trapping = False

    def trap(self) -> None:
        """Stop SIGTERM from ending the process, unless the program has a handler of its own, or this isn't the main thread."""
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(self.number) is not signal.SIG_DFL:
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if before != -1:  # an event loop has its own
            signal.set_wakeup_fd(before)
            return
        signal.signal(self.number, _ignore)
        self._trapping = True
        os.register_at_fork(after_in_child=self.release)  # a loader worker ends when it is told to

    def release(self) -> None:
        """Let SIGTERM end the process again."""
        if self._trapping:
            self._trapping = False
            signal.signal(self.number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)

    def wait(self, seconds: float) -> bool:
        """Wait for the signal; return whether it has come, now or before."""
        if self._pipe is None or not self._trapping:
            time.sleep(seconds)
        elif select.select([self._pipe[0]], [], [], seconds)[0] and self.number in os.read(self._pipe[0], 4096):
            self.received_at = self.received_at or time.monotonic()
        return self.received_at is not None


def _ignore(number: int, frame: object) -> None:
    """The handler in Python: the thread that waits does what is to be done."""
