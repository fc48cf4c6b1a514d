"""A pipeline by the tools: a process that dies ends all others, which say who and why; its checkpoints resume and evaluate."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from mmengine.registry import MODELS

from tests.conftest import ROOT
from tests.parity.pipeline_runs import environment, free_port, last_checkpoint, toy_run, with_epochs

STAGES = 4
TIMEOUT = 15
STARTED = []


@pytest.fixture
def config(tmp_path):
    cfg = toy_run(tmp_path / 'run', iters=10**6)
    cfg.default_hooks.checkpoint.update(interval=5, max_keep_ckpts=1)
    cfg.pipeline.timeout = TIMEOUT
    cfg.dump(tmp_path / 'config.py')
    return tmp_path / 'config.py'


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()


def start(config, *arguments):
    """One process a stage, as a launcher would, but without one that would end the others by itself."""
    port = free_port()
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--launcher', 'pytorch', *arguments]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **environment(rank, STAGES, port)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(STAGES)
    ]
    STARTED.extend(processes)
    return processes


def finish(processes, seconds, suspended=None):
    """What each process wrote to stderr; none may outlive the deadline, but one that is suspended."""
    deadline = time.monotonic() + seconds
    try:
        if suspended is not None:
            others = [process for i, process in enumerate(processes) if i != suspended]
            for process in others:
                process.wait(max(deadline - time.monotonic(), 0.1))
            processes[suspended].kill()
        return [process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(('victim', 'number'), [(0, signal.SIGKILL), (2, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_killed_process_ends_all_and_the_run_resumes(victim, number, config, tmp_path):
    work_dir = tmp_path / 'run'
    processes = start(config)
    wait_for(lambda: (work_dir / 'last_checkpoint').is_file())
    processes[victim].send_signal(number)
    errors = finish(processes, seconds=3 * TIMEOUT, suspended=victim if number == signal.SIGSTOP else None)
    for rank, (process, text) in enumerate(zip(processes, errors, strict=True)):
        if rank != victim:
            assert process.returncode == 1
            assert f'stage {victim} (rank {victim})' in text.strip().splitlines()[-1], text[-2000:]

    if victim == 0:
        return
    saved = last_checkpoint(work_dir)['meta']['iter']
    last = saved + 7
    processes = start(config, '--resume', '--cfg-options', f'train_cfg.max_iters={last}')
    errors = finish(processes, seconds=120)
    assert [process.returncode for process in processes] == [0] * STAGES, errors
    assert last_checkpoint(work_dir)['meta']['iter'] == last


def test_a_checkpoint_is_evaluated_in_one_piece(tmp_path):
    cfg = toy_run(tmp_path / 'run')
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'weights.pth')
    cfg = with_epochs(cfg, epochs=1)
    cfg.merge_from_dict(
        {'test_cfg': {'type': 'TestLoop'}, 'test_dataloader': cfg.val_dataloader, 'test_evaluator': cfg.val_evaluator}
    )
    cfg.dump(tmp_path / 'config.py')
    command = [sys.executable, 'tools/test.py', tmp_path / 'config.py', tmp_path / 'weights.pth', '--work-dir', tmp_path]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=True)
    scores = json.loads(next(tmp_path.rglob('*.json')).read_text())
    assert 0 <= scores['toy/accuracy'] <= 1


def test_error_of_a_stage_is_told_to_all(config):
    processes = start(config, '--cfg-options', 'optim_wrapper.optimizer.lr=1e30')
    for process, text in zip(processes, finish(processes, seconds=120), strict=True):
        assert process.returncode == 1
        assert 'NonFiniteLossError: a local loss is not finite: local/' in text
