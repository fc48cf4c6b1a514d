"""The results of all rows of a budget: a table in Markdown, and learning curves."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from training_rows.budget import Budget
from training_rows.task import Metric, Task

LOCAL = 'LocalBackbone'


@dataclass(frozen=True)
class RowResults:
    """Results of the finished runs of a row.

    Attributes:
        runs: ``result.json`` of each.
        cost: ``cost.json``, or empty.
        paper: The paper's numbers, or empty.
        is_e2e: Whether the row is trained end to end.
    """

    name: str
    runs: list[dict]
    cost: dict
    paper: dict
    is_e2e: bool


def collect(folder: Path, order: list[str]) -> list[RowResults]:
    """The rows of a table's folder that have results, those of ``order`` first."""
    rows = []
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name in dict.fromkeys([*(name for name in order if name in names), *names]):
        paths = sorted((folder / name).glob('seed*/result.json'))
        if not paths:
            continue
        cost, paper = (_read(folder / name / f'{part}.json') for part in ('cost', 'paper'))
        backbone = Config.fromfile(folder / name / 'config.py').model.backbone
        is_e2e = LOCAL not in str(backbone.get('type')) or backbone.get('num_blocks') == 1
        rows.append(RowResults(name, [_read(path) for path in paths], cost, paper, is_e2e))
    return rows


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def markdown(rows: list[RowResults], metrics: tuple[Metric, ...]) -> str:
    """The results as a Markdown table. Ratios are to the first row that is trained end to end."""
    reference = next((row for row in rows if row.is_e2e), None)
    measured = [metric for metric in metrics if any(metric.key in run for row in rows for run in row.runs)]
    has_paper = any(row.paper for row in rows)
    header = ['row', *(f'{metric.label}, mean ± standard error (n)' for metric in measured), f'{metrics[0].label} / E2E']
    header += ['peak memory, MB', 'to E2E', 'FLOPs to E2E', 's / iteration', 'to E2E', 'budget', 'commit']
    header += ['paper (its budget)'] * has_paper
    lines = [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
    for row in rows:
        cells = [row.name, *(_mean_and_error(row, metric) for metric in measured)]
        cells += [_ratio(row, reference, lambda one: _mean(one, metrics[0].key), '.3f')]
        cells += [f'{row.cost["peak_bytes"] / 1e6:.1f}' if row.cost else '']
        cells += [_ratio(row, reference, _cost(key), '+.1%') for key in ('peak_bytes', 'flops_per_image')]
        cells += [f'{_seconds(row):.3f}', _ratio(row, reference, _seconds, '.2f')]
        cells += [str(Budget.of(row.runs[0])), ', '.join(dict.fromkeys(run['commit'] for run in row.runs))]
        cells += [f'{row.paper["value"]} ({row.paper["budget"]})' if row.paper else ''] * has_paper
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def _mean(row: RowResults, key: str) -> float:
    return statistics.mean(run[key] for run in row.runs)


def _seconds(row: RowResults) -> float:
    """Seconds of an iteration, mean over the runs."""
    return statistics.mean(run['seconds'] / run['curve'][-1]['iteration'] for run in row.runs)


def _cost(key: str) -> Callable[[RowResults], float | None]:
    return lambda row: row.cost.get(key)


def _mean_and_error(row: RowResults, metric: Metric) -> str:
    """Mean over the seeds and, for several, its standard error."""
    values = [run[metric.key] for run in row.runs if metric.key in run]
    error = f' ± {standard_error(values):.{metric.digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{metric.digits}f}{error} ({len(values)})'


def standard_error(values: list[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _ratio(row: RowResults, reference: RowResults | None, value: Callable[[RowResults], float | None], form: str) -> str:
    own, base = value(row), reference and value(reference)
    if own is None or not base:
        return ''
    return f'{own / base - 1:{form}}' if form.endswith('%') else f'{own / base:{form}}'


def draw(rows: list[RowResults], metric: Metric, path: Path, title: str) -> None:
    """Draw the metric over iterations and over seconds: the mean of a row's seeds, and a band of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        points = defaultdict(list)
        for run in row.runs:
            for point in run['curve']:
                if metric.key in point:
                    points[point['iteration']].append(point[metric.key])
        iterations = sorted(points)
        mean = [statistics.mean(points[i]) for i in iterations]
        error = [standard_error(points[i]) for i in iterations]
        for axes, scale in ((left, 1.0), (right, _seconds(row))):
            x = [i * scale for i in iterations]
            (line,) = axes.plot(x, mean, marker='o', markersize=3, label=f'{row.name} (n={len(row.runs)})')
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    left.set(xlabel='iterations', ylabel=f'{metric.label} on validation images')
    right.set(xlabel='seconds of training')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize='small')
    figure.suptitle(title, fontsize='small')
    figure.savefig(path, dpi=120)


def report(folder: Path, task: Task, order: list[str]) -> str:
    """Write ``table.md`` and ``curves.png`` of a table's folder. Returns the table, or '' if no run has finished."""
    rows = collect(folder, order)
    if not rows:
        return ''
    table = markdown(rows, task.metrics)
    (folder / 'table.md').write_text(table)
    draw(rows, task.metrics[0], folder / 'curves.png', f'{task.name}: {Budget.of(rows[0].runs[0])}')
    return table
