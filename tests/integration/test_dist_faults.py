"""Data parallel runs: a process that is lost or stuck ends the job, in bounded time, and is named by all others."""

import os
import signal
import time

import pytest

from tests.integration.fault_runs import TIMEOUT, Job, dist_config, evaluated

BOUND = 4 * TIMEOUT


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_named(job, victim, words, seconds=BOUND):
    """All but the victim end with an error, and their last line names it."""
    codes, errors = job.finish(seconds, but=[victim])
    for rank, (code, text) in enumerate(zip(codes, errors, strict=True)):
        if rank != victim:
            last = text.strip().splitlines()[-1]
            assert last.startswith(f'rank {rank}: the run ends because of rank {victim}: '), text[-3000:]
            assert all(word in last for word in words), last
            assert code == 1, (code, text)
    return codes[victim]


@pytest.mark.parametrize(
    ('victim', 'ranks', 'number'), [(0, 2, signal.SIGSTOP), (1, 3, signal.SIGSTOP), (1, 2, signal.SIGKILL)]
)
def test_a_suspended_or_killed_rank_is_named(victim, ranks, number, tmp_path):
    job = Job(dist_config(tmp_path), tmp_path, ranks)
    wait_for(tmp_path / 'run' / 'last_checkpoint')
    time.sleep(1.5)  # for a heartbeat from the training
    os.kill(job.processes[victim].pid, number)
    began = time.monotonic()
    words = {signal.SIGSTOP: f'{TIMEOUT:g} s', signal.SIGKILL: 'no sign of life'}[number]
    assert_named(job, victim, [words, 'of iteration'])
    print('ended after', time.monotonic() - began)


@pytest.mark.parametrize(('fault', 'words', 'code'), [('exit', 'it exits with code 3', 3), ('loop', 'no progress', None)])
def test_a_rank_that_exits_or_loops_is_named(fault, words, code, tmp_path):
    job = Job(dist_config(tmp_path, fault=fault), tmp_path, ranks=2)
    assert assert_named(job, 1, [words, 'the loading of the data of iteration 11'], seconds=120) == code


def test_a_long_evaluation_is_waited_for(tmp_path):
    job = Job(evaluated(dist_config(tmp_path)), tmp_path, ranks=2)
    codes, errors = job.finish(120)
    assert codes == [0, 0], errors
