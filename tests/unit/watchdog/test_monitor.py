"""Processes that are silent, fail or leave, as the watchdogs of others see them."""

import signal
import time

import pytest
import torch.distributed as dist

from mmman.errors import PeerError
from mmman.parallel.pipeline.stage_rank import StageRank
from mmman.watchdog import monitor as watchdog_module
from mmman.watchdog.monitor import Watchdog


@pytest.fixture(autouse=True)
def signals():
    """SIGTERM is the test runner's again where a watchdog did not leave."""
    handler, descriptor = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    yield
    signal.signal(signal.SIGTERM, handler)
    signal.set_wakeup_fd(descriptor)


def watched(ranks, timeout):
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    name = [str(StageRank.from_rank(rank, ranks, ranks)) for rank in range(ranks)].__getitem__
    return [Watchdog(rank, ranks, store, timeout, name) for rank in range(ranks)]


def failure_of(watchdog, seconds=5):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        watchdog.check()
        time.sleep(0.05)


def test_a_silent_process_is_noticed():
    first, _ = watched(2, timeout=0.4)
    first.start()
    with pytest.raises(PeerError, match=r'stage 1 \(rank 1\): no heartbeat for 0.4 s'):
        failure_of(first)
    first._stop.set()


def test_an_error_is_told_to_all(monkeypatch):
    monkeypatch.setattr(watchdog_module.atexit, 'register', lambda *args: None)
    first, second = watched(2, timeout=2)
    first.start()
    second.start()

    def fail():
        with second.reporting():
            raise ValueError('no such thing')

    with pytest.raises(ValueError, match='no such thing'):
        fail()
    with pytest.raises(PeerError, match=r'stage 1 \(rank 1\): ValueError: no such thing'):
        failure_of(first)
    first._stop.set()


def test_who_leaves_in_order_is_not_missed():
    first, second = watched(2, timeout=0.4)
    first.start()
    second.start()
    second.leave()
    failure_of(first, seconds=1)
    first.leave()
