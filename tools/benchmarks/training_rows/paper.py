"""The rows of the paper as their configs say: their own data and recipe, with the schedule scaled to other epochs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from training_rows.paper_rows import expand, paper_rows
from training_rows.task import Metric, RowSource, Task

TASK = Task(
    name='paper',
    rows={name: RowSource(name) for name in paper_rows()},
    metrics=(Metric('accuracy/top1', 'top-1 accuracy, %'), Metric('accuracy/top5', 'top-5 accuracy, %')),
)


def write_row(name: str, path: Path, console: Console) -> None:
    """Write the config of a row as a file that inherits from none."""
    row = paper_rows()[name]
    numbers = ', '.join(f'{key} {value:g}' for key, value in row.numbers.items())
    title = f'# {name} of configs/paper/rows.py' + (f'. Table {row.table} of the paper: {numbers}.' if numbers else '.')
    path.write_text(f'{title}\n{expand(name).pretty_text}')
    console.print(f'{path}: train it by python tools/train.py {path}')
