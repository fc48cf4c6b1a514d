"""A signal that a thread waits for. SIGUSR1 stands for SIGTERM, which ends the program that runs the tests."""

import os
import signal
import threading
import time

import pytest

from mmman.watchdog.termination import TerminationSignal


@pytest.fixture
def trap(monkeypatch):
    """A trap that is taken back; and what it registers for child processes is only recorded."""
    monkeypatch.setattr(TerminationSignal, 'number', signal.SIGUSR1)
    at_fork = {}
    monkeypatch.setattr(os, 'register_at_fork', at_fork.update)
    trap = TerminationSignal()
    trap.at_fork = at_fork
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    descriptor = signal.set_wakeup_fd(-1)
    yield trap
    trap.release()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.set_wakeup_fd(descriptor)


def test_a_signal_wakes_the_thread_that_waits_and_is_remembered(trap):
    trap.trap()
    assert not trap.wait(0.0) and trap.received_at is None
    assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL  # which would end this process
    before = time.monotonic()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert trap.wait(60.0) and before <= trap.received_at <= time.monotonic()
    first = trap.received_at
    assert trap.wait(0.0) and trap.received_at == first


def test_released_the_default_action_returns_also_in_a_child(trap):
    trap.trap()
    assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
    assert trap.at_fork == {'after_in_child': trap.release}
    trap.release()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_a_handler_of_the_program_stays(trap):
    own = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGUSR1, own)
    trap.trap()
    assert signal.getsignal(signal.SIGUSR1) is own and not trap.wait(0.0)


def test_an_event_loop_keeps_its_descriptor(trap):
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    try:
        trap.trap()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        assert signal.set_wakeup_fd(-1) == write
        os.close(read)
        os.close(write)


def test_only_the_main_thread_can_trap(trap):
    thread = threading.Thread(target=trap.trap)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
