"""Detects SIGTERM while the main thread is in C++ code, where Python's signal handlers do not run."""

from __future__ import annotations

import os
import select
import signal
import threading
import time


class TerminationSignal:
    """Lets a thread wait for SIGTERM.

    Python runs signal handlers in the main thread, between two bytecode instructions. They never run while the main thread
    waits in a collective. However, the signal's number is written to a pipe immediately (:func:`signal.set_wakeup_fd`).

    Attributes:
        received_at: Time at which the signal was received, by :func:`time.monotonic`. None if it has not been received.
    """

    number = signal.SIGTERM

    def __init__(self) -> None:
        self.received_at: float | None = None
        self._pipe: tuple[int, int] | None = None
        self._trapping = False

    def trap(self) -> None:
        """Stop SIGTERM from ending the process.

        Does nothing if the program has its own handler or event loop, or if called outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(self.number) is not signal.SIG_DFL:
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if before != -1:  # an event loop has set its own
            signal.set_wakeup_fd(before)
            return
        signal.signal(self.number, _ignore)
        self._trapping = True
        os.register_at_fork(after_in_child=self.release)  # SIGTERM still ends data loader workers

    def release(self) -> None:
        """Restore the default action of SIGTERM, which ends the process."""
        if self._trapping:
            self._trapping = False
            signal.signal(self.number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)

    def wait(self, seconds: float) -> bool:
        """Wait for the signal, for ``seconds`` at most. Returns whether it has been received, now or before."""
        if self._pipe is None or not self._trapping:
            time.sleep(seconds)
        elif select.select([self._pipe[0]], [], [], seconds)[0] and self.number in os.read(self._pipe[0], 4096):
            self.received_at = self.received_at or time.monotonic()
        return self.received_at is not None


def _ignore(number: int, frame: object) -> None:
    """Python-level handler. It does nothing, because the waiting thread reacts to the signal."""
