"""Data parallel runs: a process that is lost or stuck ends the job, in bounded time, and is named by all others."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.integration.fault_runs import Job, dist_config, evaluated, stock_train, tools_train
from tests.parity.pipeline_runs import free_port


@pytest.fixture
def start(tmp_path):
    """Starts jobs whose processes don't outlive the test."""
    jobs = []

    def job(cfg, ranks, train=tools_train):
        jobs.append(Job(cfg, tmp_path, ranks, train))
        return jobs[-1]

    yield job
    for job in jobs:
        job.kill()


def wait_for_training(folder, seconds=300):
    deadline = time.monotonic() + seconds
    while not (folder / 'run' / 'last_checkpoint').is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.5)  # for a heartbeat from the training


def assert_named(job, victim, words, seconds=60):
    """All but the victim end with an error, and their last line names it. Returns the victim's exit code."""
    codes, errors = job.finish(seconds, but=[victim])
    for rank, (code, text) in enumerate(zip(codes, errors, strict=True)):
        if rank != victim:
            last = text.strip().splitlines()[-1]
            assert last.startswith(f'rank {rank}: the run ends because of rank {victim}: {words}'), text[-3000:]
            assert code == 1, (code, text)
    return codes[victim]


@pytest.mark.parametrize(
    ('victim', 'ranks', 'is_local', 'words'),
    [(0, 2, True, 'no answer for 8 s from the store that it hosts'), (1, 3, False, 'no heartbeat for 8 s')],
)
def test_a_suspended_rank_is_named(victim, ranks, is_local, words, start, tmp_path):
    job = start(dist_config(tmp_path, is_local=is_local), ranks)
    wait_for_training(tmp_path)
    os.kill(job.processes[victim].pid, signal.SIGSTOP)
    assert_named(job, victim, words)
    text = job.errors[-1].read_text()
    assert re.search(r'last seen in the .* of iteration \d+ .*; rank \d waits for it in the .* of iteration \d+', text), text


@pytest.mark.parametrize(
    ('fault', 'train', 'words', 'code'),
    [
        ('exit', tools_train, 'exited with code 3, in the data loading of iteration 11', 3),
        ('loop', stock_train, 'no progress for 8 s, last seen in the data loading of iteration 11', None),
    ],
)
def test_a_rank_that_exits_or_loops_is_named(fault, train, words, code, start, tmp_path):
    job = start(dist_config(tmp_path, fault), 2, train)
    assert assert_named(job, 1, words, seconds=300) == code


def test_a_long_evaluation_is_waited_for(start, tmp_path):
    job = start(evaluated(dist_config(tmp_path)), 2)
    codes, errors = job.finish(300)
    assert codes == [0, 0], errors


def test_the_launchers_report_names_a_killed_rank(tmp_path):
    dist_config(tmp_path).dump(tmp_path / 'config.py')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    variables = {'PATH': path, 'PORT': str(free_port()), 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = ['tools/dist_train.sh', str(tmp_path / 'config.py'), '2']
    with (tmp_path / 'log').open('w') as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, stdout=log, stderr=log)
    try:
        wait_for_training(tmp_path)
        ranks = {process.environ()['RANK']: process for process in psutil.Process(launcher.pid).children()}
        ranks['0'].kill()
        assert launcher.wait(120) == 1
    finally:
        launcher.terminate()  # it ends its processes
        launcher.wait()
    log = (tmp_path / 'log').read_text()
    assert re.search(r'^rank 1: the run ends because of rank 0: no heartbeat for 5 s', log, re.MULTILINE), log[-3000:]
    assert re.search(r'rank +: 0 ', log.partition('Root Cause')[2]), log[-3000:]
