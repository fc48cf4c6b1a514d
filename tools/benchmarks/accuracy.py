"""Train rows of a table, with several seeds each, and compare them on validation images that they haven't seen.

    python tools/benchmarks/accuracy.py detection --data-root BCCD --rows e2e manpp light --seeds 0 1 2
    python tools/benchmarks/accuracy.py segmentation --data-root CAMVID --rows e2e infopro manpp light --seeds 0 1 2
    python tools/benchmarks/accuracy.py classification --data-root CIFAR10 --rows e2e dgl ema man manpp light --seeds 0 1
    python tools/benchmarks/accuracy.py paper --list
    python tools/benchmarks/accuracy.py paper --rows 'table1/svhn_*' --epochs 10 --train-images 2000
    python tools/benchmarks/accuracy.py paper --write table1/svhn_resnet32_k16_dgl_manpp svhn.py

A row is a config: a name that its task knows, a pattern of names, or the path of a config file. Detection, segmentation and
classification replace its data and its recipe, so that all rows of a table get the same; ``paper``, whose rows are those of
``configs/paper/rows.py``, keeps both, and scales the schedule to --epochs. An ablation is another row with overrides in the
syntax of --cfg-options:

    --ablation light_m999 light custom_hooks.0.momentum=0.999

A run is a row with a seed: a process of ``tools/train.py`` in WORK_DIR/<task and budget>/<row>/seed<k>, with its output in
``log.txt`` and, once it has finished, ``result.json``. The same command goes on where it was interrupted, and on a CPU the
resumed run is bitwise the uninterrupted one. ``table.md`` and ``curves.png`` have all rows of the folder that have results,
which share one budget. A result is that of the last iteration, never of the best one.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import os
import shutil
import signal
import textwrap
from collections import Counter
from pathlib import Path

import torch
from mmengine.config import DictAction
from rich.console import Console

import mmman  # noqa: F401  registers its parts
from training_rows import classification, detection, paper, segmentation
from training_rows.environment import commit
from training_rows.paper_rows import list_rows
from training_rows.progress import measure_costs, train
from training_rows.report import report
from training_rows.rows import RowRequest, build_row, check_equal_budgets, store_config
from training_rows.runs import Run
from training_rows.task import RowSource, Task

TASKS = {module.TASK.name: module.TASK for module in (detection, segmentation, classification, paper)}


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=[*TASKS])
    parser.add_argument('--data-root', type=Path, help="folder of the task's data")
    parser.add_argument('--rows', nargs='+', default=[], metavar='ROW', help='names of the task, patterns, or config files')
    parser.add_argument(
        '--ablation', nargs='+', action='append', default=[], metavar=('NAME', 'ROW'), help='NAME ROW KEY=VALUE [KEY=VALUE ...]'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/accuracy'))
    parser.add_argument('--force', action='store_true', help='delete what the rows have at this budget, and start anew')
    table = parser.add_argument_group('rows of the paper', 'for the task paper; nothing is trained')
    table = table.add_mutually_exclusive_group()
    table.add_argument('--list', action='store_true', help='print the rows by table, with the numbers of the paper')
    table.add_argument(
        '--write', nargs='+', metavar=('ROW', 'FILE'), help='write the config of a row; default: to its name in this folder'
    )
    budget = parser.add_argument_group('budget', "default: the task's, or the row's own; the same for all rows")
    for name, kind in (('iterations', int), ('epochs', int), ('train-images', int), ('val-images', int), ('batch-size', int)):
        budget.add_argument(f'--{name}', type=kind, metavar='N')
    budget.add_argument('--lr', type=float, help='learning rate')
    budget.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='any other')
    machine = parser.add_argument_group('machine')
    machine.add_argument('--jobs', type=int, help='runs at once; default: one a GPU, or as many as there are cores for')
    machine.add_argument('--gpus', nargs='+', help='ids of the GPUs that the runs share; default: all that are visible')
    machine.add_argument('--threads', type=int, default=1, help='threads of a run')
    machine.add_argument('--workers', type=int, default=0, help='data loaders of a run')
    given = parser.parse_args(args)
    task = TASKS[given.task]
    try:
        if given.list or given.write:
            check_table_options(given)
            return given
        given.requests = read_rows(given.rows, given.ablation, task)
        check_data(given.data_root, task)
    except ValueError as error:
        parser.error(str(error))
    if given.gpus is None and torch.cuda.is_available():
        visible = ','.join(map(str, range(torch.cuda.device_count())))
        given.gpus = os.environ.get('CUDA_VISIBLE_DEVICES', visible).split(',')
    given.jobs = given.jobs or len(given.gpus or []) or max(1, len(os.sched_getaffinity(0)) // given.threads)
    return given


def check_table_options(given: argparse.Namespace) -> None:
    """Make a row and a path of ``given.write``.

    Raises:
        ValueError: ``--list`` or ``--write`` cannot be done, or something is to be trained, too.
    """
    if given.task != paper.TASK.name:
        raise ValueError(f'--list and --write are for the task {paper.TASK.name}')
    if given.rows or given.ablation:
        raise ValueError('--list and --write train nothing: leave out --rows and --ablation')
    if given.write:
        row, *file = given.write
        if len(file) > 1:
            raise ValueError(f'--write takes a row and a file, not {" ".join(given.write)}')
        if row not in paper.TASK.rows:
            raise ValueError(_unknown(row, paper.TASK))
        path = Path(*file) if file else Path(f'{Path(row).name}.py')
        if path.suffix != '.py':
            raise ValueError(f'--write: {path} is not a .py file')
        if not path.parent.is_dir():
            raise ValueError(f'--write: there is no folder {path.parent}')
        if path.exists():
            raise ValueError(f'--write: {path} exists; give another file')
        given.write = row, path


def read_rows(words: list[str], ablations: list[list[str]], task: Task) -> list[RowRequest]:
    """The rows of the command line.

    Raises:
        ValueError: No row, a name that the task doesn't know, two rows of one name, or an ablation without overrides.
    """
    names = [name for word in words for name in fnmatch.filter(task.rows, word) or [word]]
    requests = [RowRequest(Path(name).stem, _source(name, task)) for name in names]
    for name, *rest in ablations:
        if len(rest) < 2 or '=' in name or '=' in rest[0] or not all('=' in word for word in rest[1:]):
            raise ValueError(f'--ablation {" ".join([name, *rest])}: give NAME ROW KEY=VALUE [KEY=VALUE ...]')
        reader = argparse.ArgumentParser()
        reader.add_argument('--options', nargs='+', action=DictAction)
        overrides = reader.parse_args(['--options', *rest[1:]]).options
        requests.append(RowRequest(name, _source(rest[0], task), overrides))
    if not requests:
        raise ValueError(f'--rows: none given; {task.name} knows {textwrap.shorten(", ".join(task.rows), 100)}')
    repeated = [name for name, count in Counter(request.name for request in requests).items() if count > 1]
    if repeated:
        raise ValueError(f'several rows are called {repeated[0]}')
    return requests


def _source(word: str, task: Task) -> RowSource:
    if word in task.rows:
        return task.rows[word]
    if not Path(word).is_file():
        raise ValueError(_unknown(word, task))
    return RowSource(Path(word))


def _unknown(word: str, task: Task) -> str:
    nearest = difflib.get_close_matches(word, task.rows, 3, cutoff=0)
    return f'there is no row or file {word}; the nearest rows of {task.name} are {", ".join(nearest)}'


def check_data(root: Path | None, task: Task) -> None:
    """Raise ValueError if the task's data isn't there."""
    if task.files and root is None:
        raise ValueError(f"--data-root: give the folder of {task.name}'s data, with {', '.join(task.files)}")
    if missing := [name for name in task.files if not (root / name).exists()]:
        raise ValueError(f'--data-root: {root} has no {missing[0]}')


def main() -> None:
    args = parse_args()
    task = TASKS[args.task]
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if args.list:
        return console.print(list_rows())
    if args.write:
        return paper.write_row(*args.write, console)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(ending, signal.default_int_handler)  # like Ctrl-C
    rows = [build_row(request, task, args) for request in args.requests]
    check_equal_budgets(rows)
    for row in rows:
        if args.force:
            shutil.rmtree(row.folder, ignore_errors=True)
        store_config(row)
    if commit().endswith('-dirty'):
        console.print(f'tracked files differ from the commit: results will be marked {commit()}')
    runs = [Run(row, seed, task.metrics) for seed in args.seeds for row in rows]
    for run in runs:
        if run.result.exists() or run.finish():
            run.state = 'done'
    try:
        measure_costs(rows, args, console)
        train(runs, args, console)
    except KeyboardInterrupt:
        raise SystemExit('interrupted; the same command goes on') from None
    table_folder = rows[0].folder.parent
    if table := report(table_folder, task, [*task.rows, *(row.name for row in rows)]):
        console.print(f'{table}\n{table_folder / "table.md"}, {table_folder / "curves.png"}')
    raise SystemExit(any(run.state != 'done' for run in runs))


if __name__ == '__main__':
    main()
