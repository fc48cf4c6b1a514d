"""A run: a row with a seed, the process that trains it, and what its folder says."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from training_rows.environment import ROOT, environment
from training_rows.rows import Row
from training_rows.task import Metric


class Run:
    """A row with a seed, and the process that trains it.

    Attributes:
        state: ``'waiting'``, ``'running'``, ``'failed'`` or ``'done'``.
        curve: Points of the training so far; see :func:`curve_of`.
    """

    def __init__(self, row: Row, seed: int, metrics: tuple[Metric, ...]) -> None:
        self.row, self.seed, self.metrics = row, seed, metrics
        self.name = f'{row.name} seed {seed}'
        self.folder = row.folder / f'seed{seed}'
        self.result = self.folder / 'result.json'
        self.log = self.folder / 'log.txt'
        self.attempts = self.folder / 'attempts.json'
        self.state, self.process = 'waiting', None
        self.read()

    def read(self) -> None:
        """Read how far the run is."""
        self.curve = curve_of(read_scalars(self.folder), self.metrics)
        self.iteration = max((point['iteration'] for point in self.curve), default=0)

    def last(self, key: str) -> float | None:
        """The last value of ``key`` in the curve."""
        return next((point[key] for point in reversed(self.curve) if key in point), None)

    def launch(self, gpu: str | None, threads: int, workers: int) -> None:
        """Start the training, or go on from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        loaders = [f'{split}_dataloader' for split in ('train', 'val')]
        options = [f'randomness.seed={self.seed}', *(f'{loader}.num_workers={workers}' for loader in loaders)]
        options += [f'{loader}.persistent_workers={workers > 0}' for loader in loaders]
        checkpoint = resume_from(self)
        command = [sys.executable, ROOT / 'tools' / 'train.py', self.row.folder / 'config.py', '--work-dir', self.folder]
        command += [*(['--resume', checkpoint] if checkpoint else []), '--cfg-options', *options]
        self.state, self.gpu, self.start, self.first = 'running', gpu, time.time(), self.iteration
        with self.log.open('a') as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training inherits the lock and holds it to its end
            except BlockingIOError:
                raise SystemExit(f'{self.folder} is being trained by another process') from None
            attempts = [*self._attempts(), {**environment(), 'threads': threads, 'from_iteration': self.first}]
            self.attempts.write_text(json.dumps(attempts, indent=1))
            # A session of its own: Ctrl-C goes to this program, which then ends the trainings
            self.process = subprocess.Popen(
                [*map(str, command)],
                env=variables(gpu, threads),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _attempts(self) -> list[dict]:
        return json.loads(self.attempts.read_text()) if self.attempts.exists() else []

    def stop(self) -> None:
        """End the training, if it started, and its data loaders; its checkpoints stay."""
        if not self.process:
            return
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def finish(self) -> bool:
        """Write the result, if the end of the training has been validated."""
        key = self.metrics[0].key
        if not self.curve or self.curve[-1]['iteration'] != self.row.iterations or key not in self.curve[-1]:
            return False
        attempts = self._attempts()
        result = {
            'row': self.row.name,
            'seed': self.seed,
            **{metric.key: self.curve[-1][metric.key] for metric in self.metrics if metric.key in self.curve[-1]},
            'seconds': self.curve[-1]['seconds'],
            'loading': self.last('loading'),
            'budget': asdict(self.row.budget),
            'commit': ', '.join(dict.fromkeys(str(attempt['commit']) for attempt in attempts)),
            'attempts': attempts,
            'curve': self.curve,
        }
        write_whole(self.result, json.dumps(result, indent=1))
        return True

    def seconds_left(self) -> float:
        """Remaining time at the speed since the launch."""
        done, left = self.iteration - self.first, self.row.iterations - self.iteration
        return (time.time() - self.start) / done * left if done > 0 else math.inf


def variables(gpu: str | None, threads: int) -> dict[str, str]:
    """Environment of a training, which finds this project's packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tools' / 'benchmarks'), os.environ.get('PYTHONPATH', '')])
    chosen = {'CUDA_VISIBLE_DEVICES': gpu} if gpu else {}
    return {**os.environ, 'PYTHONPATH': path.rstrip(os.pathsep), 'OMP_NUM_THREADS': str(threads), **chosen}


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears under its name when it is complete."""
    part = path.with_suffix('.part')
    part.write_text(text)
    part.replace(path)


def resume_from(run: Run) -> Path | None:
    """The newest checkpoint from which no validation is missed: it is written before the validation of its iteration."""
    validated = {point['iteration'] for point in run.curve if run.metrics[0].key in point}
    missing = {*run.row.validations} - validated
    checkpoints = {}
    for path in run.folder.glob('*.pth'):
        if match := re.fullmatch(r'(iter|epoch)_(\d+)', path.stem):
            checkpoints[int(match[2]) * (run.row.iterations_per_epoch if match[1] == 'epoch' else 1)] = path
    usable = [iteration for iteration in checkpoints if not any(point <= iteration for point in missing)]
    return checkpoints[max(usable)] if usable else None


def read_scalars(folder: Path) -> list[dict]:
    """What mmengine's local backend logged in all attempts at a run, in the order of time."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith('}\n')]  # the last one may be half written


def curve_of(scalars: Iterable[dict], metrics: Iterable[Metric]) -> list[dict]:
    """Points of a training by iteration: ``loss``, ``seconds`` and metrics; of what was trained again, the last time's.

    Seconds are iterations times the median time of an iteration: validations, interruptions and other guests of the machine
    for a while do not count. ``loading`` is the median share of it that loading takes.
    """
    points, times, shares = defaultdict(dict), {}, {}
    for line in scalars:
        step = line['step']
        if 'loss' in line:
            points[step]['loss'] = line['loss']
            times[step], shares[step] = line['time'], line['data_time'] / line['time']
        else:
            found = {metric.key: line[metric.key] for metric in metrics if metric.key in line}
            points[step] |= found or {metric.key: 0.0 for metric in metrics}  # CocoMetric gives none where nothing is found
    if times:
        seconds, loading = statistics.median(times.values()), statistics.median(shares.values())
        for step, point in points.items():
            point |= {'seconds': round(step * seconds, 3), 'loading': round(loading, 4)}
    return [{'iteration': step, **points[step]} for step in sorted(points)]
