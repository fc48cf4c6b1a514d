"""Train runs side by side, and show how far everything is."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import nullcontext
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from training_rows.rows import Row
from training_rows.runs import Run, variables

STATES = ('running', 'failed', 'waiting', 'done')


def measure_costs(rows: list[Row], args: argparse.Namespace, console: Console) -> None:
    """Measure a training step of every row in a process of its own, once. So a row that can't be trained ends the program."""
    for row in rows:
        out = row.folder / 'cost.json'
        if out.exists():
            continue
        console.print(f'{row.name}: measuring memory and FLOPs of a training step')
        command = [sys.executable, '-m', 'training_rows.cost', row.folder / 'config.py', out.with_suffix('.part')]
        environment = variables(args.gpus[0] if args.gpus else None, args.threads)
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            (row.folder / 'cost.log').write_text(done.stdout + done.stderr)
            reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
            raise SystemExit(f'{row.name} cannot be trained: {reason} (see {row.folder / "cost.log"})')
        out.with_suffix('.part').replace(out)


def train(runs: list[Run], args: argparse.Namespace, console: Console) -> None:
    """Train what is waiting, ``args.jobs`` at once."""
    columns = (TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, speed_estimate_period=3600)
    task = bar.add_task('all runs', total=sum(run.row.iterations for run in runs))
    slots = deque(args.gpus[i % len(args.gpus)] if args.gpus else None for i in range(args.jobs))
    waiting, active = deque(run for run in runs if run.state == 'waiting'), []
    next_line = time.time()
    try:
        with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
            while waiting or active:
                while waiting and slots:
                    active.append(waiting.popleft())
                    active[-1].launch(slots.popleft(), args.threads, args.workers)
                time.sleep(0.5)
                ended = [run for run in active if run.process.poll() is not None]
                for run in active:
                    run.read()
                for run in ended:
                    active.remove(run)
                    slots.append(run.gpu)
                    run.state = 'done' if run.finish() else 'failed'
                    console.print(closing_words(run))
                if live:
                    bar.update(task, completed=sum(run.iteration for run in runs))
                    live.update(Group(bar, board(runs)), refresh=True)
                elif time.time() >= next_line:
                    next_line = time.time() + 60
                    done = Counter(run.state for run in runs)['done']
                    console.print(f'{done} of {len(runs)} runs done; ' + ', '.join(map(status, active)))
    finally:
        for run in active:
            run.stop()


def status(run: Run) -> str:
    """How far a run is, in words."""
    left = time_left(run)
    return f'{run.name}: {run.iteration}/{run.row.iterations} iterations' + (f', {left} left' if left else '')


def time_left(run: Run) -> str:
    """Remaining time of a run, or '' if unknown."""
    left = run.seconds_left() if run.state == 'running' else math.inf
    return str(timedelta(seconds=round(left))) if left < math.inf else ''


def board(runs: list[Run]) -> Table:
    """The live table: what is running comes first."""
    metric = runs[0].metrics[0]
    table = Table('row', 'seed', 'state', 'iteration', 'train loss', metric.label, 'time left')
    for run in sorted(runs, key=lambda run: STATES.index(run.state)):
        loss, value = run.last('loss'), run.last(metric.key)
        numbers = ('' if loss is None else f'{loss:.3f}', '' if value is None else f'{value:.{metric.digits}f}')
        table.add_row(run.row.name, str(run.seed), run.state, f'{run.iteration}/{run.row.iterations}', *numbers, time_left(run))
    return table


def closing_words(run: Run) -> str:
    """The result of a run that ended, or the end of its log if it failed."""
    if run.state == 'done':
        metric = run.metrics[0]
        return f'{run.name}: {metric.label} {run.last(metric.key):.{metric.digits}f}'
    end = run.log.read_text().splitlines()[-15:]
    return '\n'.join([f'{run.name} failed with exit status {run.process.returncode}; the end of {run.log}:', *end])
