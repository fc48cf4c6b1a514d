"""Train rows of the paper's tables in parallel processes, at any budget, and write the results beside the paper's numbers.

    python tools/benchmarks/paper_rows.py configs/paper/table7/cifar10_*.py --seeds 0 1 2 \
        --epochs 10 --train-images 2000 --batch-size 64 --npz CIFAR10_NPZ --table rows.md --plot rows.png

A row is a config, a run is a row with a seed: a process of ``tools/train.py`` in ``WORK_DIR/<row>/<budget>/seed<k>``, with its
output in ``log.txt`` and, once it has finished, what it came to in ``result.json``. The config that the seeds share, budget
included, is ``config.py`` one folder up. The same command goes on where it was interrupted, and leaves finished runs alone. An
error is that of the last epoch, never of the best one.

Fewer images are evenly spaced over the dataset, so that one that is sorted by class keeps its mix of classes. With other epochs
than the row's own, its learning rate schedule is scaled to end with them. Images from ``--images`` or ``--npz`` go through the
row's own pipelines, which do not resize them: they must have the size of the row's.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from pprint import pformat

import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import DATASETS, init_default_scope
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import mmman  # noqa: F401  registers its parts
from mmman.runtime.launch import type_name

ROOT = Path(__file__).resolve().parents[2]
SCALABLE = ('CosineAnnealingLR', 'LinearLR', 'MultiStepLR')


@dataclass(frozen=True)
class Budget:
    """What a run is given. Errors are comparable between runs of one budget only."""

    epochs: int
    train_images: int
    test_images: int
    batch_size: int
    lr: float | None = None  # None: each row's own
    images: str | None = None  # name of their folder; None: each row's own dataset
    options: tuple[str, ...] = ()  # other settings that were overridden

    def __str__(self) -> str:
        source = [f'from {self.images}'] if self.images else []
        images = ' '.join([f'{self.train_images} train and {self.test_images} test images', *source])
        rate = [f'lr {self.lr:g}'] if self.lr else []
        return ', '.join([f'{self.epochs} epochs', images, f'batch {self.batch_size}', *rate, *self.options])


@dataclass
class Row:
    """A config with a budget applied to it."""

    cfg: Config
    paper: dict
    own: Budget
    budget: Budget
    iterations: int  # of an epoch
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.parent.name


def build_row(path: Path, args: argparse.Namespace) -> Row:
    """Read a row and apply the budget of the command line to it."""
    cfg = Config.fromfile(path)
    paper = cfg.pop('paper', {})
    cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    train, val, optimizer = cfg.train_dataloader, cfg.val_dataloader, cfg.optim_wrapper.optimizer
    if not cfg.train_cfg.get('max_epochs'):
        raise SystemExit(f'{path}: a row is trained by epochs; set train_cfg.max_epochs')
    if args.images:
        use_images(cfg, args.images)
    train_images, test_images = (len(DATASETS.build(loader.dataset)) for loader in (train, val))
    # a run is one process; the batch of a row for several is that of all of them
    batch_size = (cfg.get('auto_scale_lr') or {}).get('base_batch_size', train.batch_size)
    own = Budget(cfg.train_cfg.max_epochs, train_images, test_images, batch_size)
    budget = Budget(
        epochs=args.epochs or own.epochs,
        train_images=args.train_images or own.train_images,
        test_images=args.test_images or own.test_images,
        batch_size=args.batch_size or own.batch_size,
        lr=args.lr,
        images=args.images and args.images.resolve().name,
        options=tuple(f'{key}={value}' for key, value in sorted(args.cfg_options.items())),
    )
    take_images(train.dataset, own.train_images, budget.train_images)
    take_images(val.dataset, own.test_images, budget.test_images)
    train.batch_size, optimizer.lr = budget.batch_size, budget.lr or optimizer.lr
    iterations = (math.floor if train.get('drop_last') else math.ceil)(budget.train_images / budget.batch_size)
    if not iterations:
        raise SystemExit(f'{path}: a batch of {budget.batch_size} out of {budget.train_images} images; set --batch-size')
    if budget.epochs != own.epochs:
        schedulers = cfg.get('param_scheduler') or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        cfg.param_scheduler = [scale_scheduler(one, own.epochs, budget.epochs, iterations) for one in schedulers]
    val_interval = max(1, cfg.train_cfg.get('val_interval', 1) * budget.epochs // own.epochs)
    cfg.train_cfg.update(max_epochs=budget.epochs, val_interval=val_interval)
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    # two checkpoints: mmengine deletes the one that is too many before it writes the new one
    checkpoint = {'type': 'CheckpointHook', 'interval': 1, 'max_keep_ckpts': 2}
    logger = {'type': 'LoggerHook', 'interval': max(10, iterations // 10), 'ignore_last': False}
    cfg.default_hooks = {**cfg.get('default_hooks', {}), 'checkpoint': checkpoint, 'logger': logger}
    # the loss in the last line of an epoch is the mean over the epoch
    cfg.log_processor = {'custom_cfg': [{'data_src': 'loss', 'method_name': 'mean', 'window_size': 'epoch'}]}
    rate = f'_lr{budget.lr:g}' if budget.lr else ''
    folder = f'{budget.epochs}epochs_{budget.train_images}train_{budget.test_images}test_batch{budget.batch_size}{rate}'
    return Row(cfg, paper, own, budget, iterations, args.work_dir / path.stem / folder)


def use_images(cfg: Config, folder: Path) -> None:
    """Replace the datasets of a row by the class folders in ``folder/train`` and ``folder/val``."""
    for key, split in (('train_dataloader', 'train'), ('val_dataloader', 'val')):
        pipeline = cfg[key].dataset.pipeline
        if all(type_name(step) != 'LoadImageFromFile' for step in pipeline):
            pipeline = [{'type': 'LoadImageFromFile'}, *pipeline]
            # mmpretrain's small datasets give RGB, image files are read as BGR
            for part in (cfg, cfg.model):
                if part.get('data_preprocessor'):
                    part.data_preprocessor.to_rgb = True
        cfg[key].dataset = {'type': 'CustomDataset', 'data_prefix': str(folder / split), 'pipeline': pipeline}


def take_images(dataset: ConfigDict, total: int, count: int) -> None:
    """Keep ``count`` of a dataset's ``total`` images."""
    if count > total:
        raise SystemExit(f'{count} images wanted, but {type_name(dataset)} has {total}')
    if count < total:
        if {'dataset', 'datasets', 'indices'} & set(dataset):
            raise SystemExit(f'fewer images: {type_name(dataset)} wraps or cuts a dataset already; use --images')
        dataset.indices = spread(total, count)


def spread(total: int, count: int) -> list[int]:
    """``count`` indices, evenly spaced over ``range(total)``."""
    return [i * total // count for i in range(count)]


def scale_scheduler(scheduler: dict, own: int, epochs: int, iterations: int) -> dict:
    """A scheduler of a training of ``own`` epochs, scaled to one of ``epochs`` with ``iterations`` iterations each.

    Points in time are rounded to epochs or, with ``convert_to_iter_based``, to iterations; none but 0 becomes 0. A LinearLR
    lasts at least two of them, because mmengine leaves its first factor in place after one.
    """
    name, by_epoch, scheduler = type_name(scheduler), scheduler.get('by_epoch', True), dict(scheduler)
    if name not in SCALABLE or not by_epoch:
        unit = '' if by_epoch else ' that counts iterations'
        raise SystemExit(f'--epochs: cannot scale a {name}{unit}, only {", ".join(SCALABLE)} that count epochs')
    scheduler['by_epoch'] = not scheduler.pop('convert_to_iter_based', False)
    steps = 1 if scheduler['by_epoch'] else iterations

    def scale(point: float) -> int:
        return max(1, round(point * epochs * steps / own)) if point else 0

    begin = scheduler.get('begin', 0)
    if 'T_max' in scheduler:
        scheduler['T_max'] = scale(begin + scheduler['T_max']) - scale(begin)
    if 'milestones' in scheduler:
        scheduler['milestones'] = [scale(point) for point in scheduler['milestones']]
    scheduler |= {key: scale(scheduler[key]) for key in ('begin', 'end') if key in scheduler}
    if name == 'LinearLR' and 'end' in scheduler:
        scheduler['end'] = max(scheduler['end'], scale(begin) + 2)
    if scheduler.get('end', math.inf) <= scale(begin) or scheduler.get('T_max', 1) < 1:
        raise SystemExit(f'--epochs: {epochs} are too few for the {name} that begins at epoch {begin} of {own}')
    return scheduler


def store_config(row: Row) -> None:
    """Write the config that all seeds of a row share, once; refuse to mix its runs with those of another config."""
    path = row.folder / 'config.py'
    settings = row.cfg.to_dict().items()
    text = '\n'.join(f'{key} = {pformat(value, width=120, compact=True, sort_dicts=False)}' for key, value in settings)
    if not path.exists():
        row.folder.mkdir(parents=True)
        path.write_text(text)
    elif path.read_text() != text:
        changes = difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), 'trained', 'wanted', lineterm='', n=0)
        print(*list(changes)[:20], sep='\n')
        raise SystemExit(f'{path} is not what this command asks for, see above; choose another --work-dir, or --force')


def unpack(npz: Path, folder: Path) -> Path:
    """Write the JPEG files in ``npz/{train,test}.npz`` to class folders in ``folder/{train,val}``, once.

    The arrays are ``jpeg`` (uint8, all files in a row), ``offsets`` (N+1,), ``labels`` (N,) and ``classes`` (names).
    """
    if folder.exists():
        return folder
    part = folder.with_name(folder.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    for source, split in (('train', 'train'), ('test', 'val')):
        arrays = np.load(npz / f'{source}.npz')
        data, offsets = arrays['jpeg'].tobytes(), arrays['offsets']
        classes = [part / split / str(name) for name in arrays['classes']]
        for class_folder in classes:
            class_folder.mkdir(parents=True)
        for i, label in enumerate(arrays['labels']):
            (classes[label] / f'{i:06d}.jpg').write_bytes(data[offsets[i] : offsets[i + 1]])
    return part.rename(folder)


class Run:
    """A row with a seed, and the process that trains it."""

    def __init__(self, row: Row, seed: int) -> None:
        self.row, self.seed = row, seed
        self.name = f'{row.name} seed {seed}'
        self.folder = row.folder / f'seed{seed}'
        self.result = self.folder / 'result.json'
        self.state, self.process = 'waiting', None
        self.read()

    def read(self) -> None:
        """Read how far the run is: ``curve`` so far, and ``epoch`` and ``iteration`` that it is at."""
        self.curve = curve(read_scalars(self.folder))
        self.epoch, self.iteration = (self.curve[-1][key] if self.curve else 0 for key in ('epoch', 'iteration'))

    def launch(self, gpu: str | None, threads: int, workers: int | None) -> None:
        """Start the training, or go on from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        options = [f'randomness.seed={self.seed}']
        if workers is not None:
            loaders = [f'{split}_dataloader' for split in ('train', 'val')]
            options += [f'{loader}.num_workers={workers}' for loader in loaders]
            options += [f'{loader}.persistent_workers={workers > 0}' for loader in loaders]
        checkpoint = resume_from(self.folder, self.row.budget.epochs)
        command = [sys.executable, ROOT / 'tools' / 'train.py', self.row.folder / 'config.py', '--work-dir', self.folder]
        command += [*(['--resume', checkpoint] if checkpoint else []), '--cfg-options', *options]
        variables = os.environ | {'OMP_NUM_THREADS': str(threads)} | ({'CUDA_VISIBLE_DEVICES': gpu} if gpu else {})
        self.state, self.gpu, self.start, self.first = 'running', gpu, time.time(), self.iteration
        with (self.folder / 'log.txt').open('a') as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training inherits the lock and holds it to its end
            except BlockingIOError:
                raise SystemExit(f'{self.folder} is being trained by another process') from None
            # a session of its own: Ctrl-C is for this program, which then ends the trainings
            self.process = subprocess.Popen(
                [*map(str, command)], env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

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
        """Write the result, if the last epoch has been tested."""
        if self.epoch != self.row.budget.epochs or 'error' not in self.curve[-1]:
            return False
        errors = {key: value for key, value in self.curve[-1].items() if key.startswith('error')}
        result = {'row': self.row.name, 'seed': self.seed, **errors, 'seconds': training_seconds(self.folder)}
        result |= {'lr': self.row.cfg.optim_wrapper.optimizer.lr, 'budget': asdict(self.row.budget), **environment()}
        part = self.result.with_suffix('.part')
        part.write_text(json.dumps(result | {'curve': self.curve}, indent=1))
        part.rename(self.result)
        return True

    def seconds_left(self) -> float:
        """Remaining time at the speed since the launch."""
        done, left = self.iteration - self.first, self.row.budget.epochs * self.row.iterations - self.iteration
        return (time.time() - self.start) / done * left if done else math.inf


def resume_from(folder: Path, epochs: int) -> Path | None:
    """The newest complete checkpoint with an epoch left to train: that of the last epoch is written before its test."""
    name = folder / 'last_checkpoint'
    epoch = int(re.search(r'epoch_(\d+)\.pth', name.read_text())[1]) if name.exists() else 0
    checkpoint = folder / f'epoch_{min(epoch, epochs - 1)}.pth'
    return checkpoint if checkpoint.exists() else None


def read_scalars(folder: Path) -> list[dict]:
    """What mmengine's local backend logged in all attempts at a run, in the order of time."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith('}\n')]  # the last one may be half written


def curve(scalars: Iterable[dict]) -> list[dict]:
    """Loss, iteration and test errors (percent) of each epoch; of one that was trained again, those of the last time."""
    points = defaultdict(dict)
    for line in scalars:
        if 'accuracy/top1' in line:
            keys = {'error': 'accuracy/top1', 'error_top5': 'accuracy/top5'}
            points[line['step']] |= {name: round(100 - line[key], 4) for name, key in keys.items() if key in line}
        elif 'loss' in line:
            points[line['epoch']] |= {'iteration': line['step'], 'loss': line['loss']}
    return [{'epoch': epoch, **points[epoch]} for epoch in sorted(points)]


def training_seconds(folder: Path) -> int:
    """Wall time of all attempts at a run: a folder is named after the start of one, its scalars are written to the end."""
    files = folder.glob('*/vis_data/scalars.json')
    return round(sum(f.stat().st_mtime - datetime.strptime(f.parts[-3], '%Y%m%d_%H%M%S').timestamp() for f in files))


@cache
def environment() -> dict:
    """What a result depends on beside its config."""
    cpu = Path('/proc/cpuinfo')
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    names = names or re.findall(r'model name\s*: (.*)', cpu.read_text() if cpu.exists() else '')[:1] or [platform.machine()]
    git = ['git', '-C', ROOT, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    return {
        'device': ', '.join(names),
        'versions': {package: version(package) for package in ('torch', 'mmengine', 'mmpretrain', 'mmman')},
        'date': datetime.now().isoformat(timespec='minutes'),
        'commit': subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
    }


def board(runs: list[Run]) -> Table:
    """The live table: what is running comes first."""
    table = Table('row', 'seed', 'state', 'epoch', 'train loss', 'test error', 'time left')
    for run in sorted(runs, key=lambda run: ('running', 'failed', 'waiting', 'done').index(run.state)):
        numbers = (next((f'{point[key]:.3f}' for point in run.curve[::-1] if key in point), '') for key in ('loss', 'error'))
        left = run.seconds_left() if run.state == 'running' else math.inf
        time_left = str(timedelta(seconds=round(left))) if left < math.inf else ''
        table.add_row(run.row.name, str(run.seed), run.state, f'{run.epoch}/{run.row.budget.epochs}', *numbers, time_left)
    return table


def train(runs: list[Run], args: argparse.Namespace) -> None:
    """Train what is waiting, ``args.jobs`` at once, and show how far everything is."""
    console = Console(soft_wrap=True, markup=False)
    columns = (TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, speed_estimate_period=3600)
    task = bar.add_task('all runs', total=sum(run.row.budget.epochs * run.row.iterations for run in runs))
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
                    running = (f'{run.name} epoch {run.epoch}/{run.row.budget.epochs}' for run in active)
                    console.print(f'{done} of {len(runs)} runs done; ' + ', '.join(running))
    finally:
        for run in active:
            run.stop()


def closing_words(run: Run) -> str:
    """The result of a run that ended, or the end of its log if it failed."""
    if run.state == 'done':
        return f'{run.name}: test error {run.curve[-1]["error"]:.2f} %'
    log = run.folder / 'log.txt'
    end = log.read_text().splitlines()[-15:]
    return '\n'.join([f'{run.name} failed with exit status {run.process.returncode}; the end of {log}:', *end])


def markdown(results: list[dict]) -> str:
    """The results as Markdown, one table a budget.

    Args:
        results: ``result.json`` of each run, with ``paper`` and ``own``, the budget, of its row.
    """
    tables = defaultdict(lambda: defaultdict(list))
    for result in results:
        tables[str(Budget(**result['budget']))][result['row']].append(result)
    header = ('row', 'paper error, %', 'paper budget', 'error, %', 'epochs', 'train images', 'batch', 'lr', 'seconds a run')
    lines = []
    for budget, rows in tables.items():
        is_papers = all(str(Budget(**runs[0]['own'])) == budget for runs in rows.values())
        lines += [f"### {budget}: {'' if is_papers else 'not '}the paper's budget", '']
        lines += [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
        for name, runs in rows.items():
            paper, own, spent = (runs[0][key] for key in ('paper', 'own', 'budget'))
            theirs = [f'{paper[key]:.2f}' for key in ('error', 'error_top5') if key in paper]
            ours = [mean_and_deviation([run[key] for run in runs]) for key in ('error', 'error_top5') if key in runs[0]]
            cells = [name, ' / '.join(theirs) or '-', f'{own["epochs"]} epochs, batch {own["batch_size"]}']
            cells += [f'{" / ".join(ours)} (n={len(runs)})', spent['epochs'], spent['train_images'], spent['batch_size']]
            cells += [f'{runs[0]["lr"]:g}', round(statistics.mean(run['seconds'] for run in runs))]
            lines.append(f'| {" | ".join(map(str, cells))} |')
        lines.append('')
    return '\n'.join(lines)


def mean_and_deviation(values: list[float]) -> str:
    """Mean over the seeds and, for several, their sample standard deviation."""
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{deviation}'


def plot(results: list[dict], path: Path) -> None:
    """Draw test error and train loss over the epochs: the mean of a row's seeds, and a band of one standard deviation."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for axis, key, label in zip(axes, ('error', 'loss'), ('test error, %', 'train loss'), strict=True):
        for name in dict.fromkeys(result['row'] for result in results):
            runs = [result['curve'] for result in results if result['row'] == name]
            values = defaultdict(list)
            for point in (point for points in runs for point in points if key in point):
                values[point['epoch']].append(point[key])
            mean, deviation = (np.array([function(some) for some in values.values()]) for function in (np.mean, np.std))
            (line,) = axis.plot([*values], mean, label=f'{name} (n={len(runs)})')
            axis.fill_between([*values], mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(xlabel='epoch', ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize='small')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path, help='rows')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/paper_rows'))
    parser.add_argument('--force', action='store_true', help='delete what the rows have at this budget, and start anew')
    parser.add_argument('--table', type=Path, metavar='FILE.md', help='write the table there too')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw the curves')
    budget = parser.add_argument_group('budget', "default: the row's own")
    budget.add_argument('--epochs', type=int)
    budget.add_argument('--train-images', type=int)
    budget.add_argument('--test-images', type=int)
    budget.add_argument('--batch-size', type=int)
    budget.add_argument('--lr', type=float)
    images = budget.add_mutually_exclusive_group()
    images.add_argument('--images', type=Path, metavar='FOLDER', help='read the class folders in FOLDER/{train,val}')
    images.add_argument('--npz', type=Path, metavar='FOLDER', help='unpack the JPEGs in FOLDER/{train,test}.npz, read them')
    budget.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help='any other')
    machine = parser.add_argument_group('machine')
    machine.add_argument('--jobs', type=int, help='runs at once; default: one a GPU, or as many as there are cores for')
    machine.add_argument('--gpus', nargs='+', help='ids of the GPUs that the runs share; default: all that are visible')
    machine.add_argument('--threads', type=int, default=1, help='threads of a run')
    machine.add_argument('--workers', type=int, help="data loaders of a run; default: the row's own with a GPU, else none")
    args = parser.parse_args()
    needed = [args.images / name for name in ('train', 'val')] if args.images else []
    needed += [args.npz / name for name in ('train.npz', 'test.npz')] if args.npz else []
    for path in (*args.configs, *needed):
        if not path.exists():
            parser.error(f'there is no {path}')
    repeated = [stem for stem, count in Counter(path.stem for path in args.configs).items() if count > 1]
    if repeated:
        parser.error(f'several rows are called {repeated[0]}')
    if args.gpus is None and torch.cuda.is_available():
        args.gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count())))).split(',')
    args.jobs = args.jobs or len(args.gpus or []) or max(1, len(os.sched_getaffinity(0)) // args.threads)
    args.workers = 0 if args.workers is None and not args.gpus else args.workers
    return args


def main() -> None:
    args = parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(ending, signal.default_int_handler)  # like Ctrl-C
    if args.npz:
        args.images = unpack(args.npz, args.work_dir / 'images' / args.npz.resolve().name)
    rows = [build_row(path, args) for path in args.configs]
    for row in rows:
        if args.force:
            shutil.rmtree(row.folder, ignore_errors=True)
        store_config(row)
    runs = [Run(row, seed) for seed in args.seeds for row in rows]
    for run in runs:
        if run.result.exists() or run.finish():
            run.state = 'done'
    try:
        train(runs, args)
    except KeyboardInterrupt:
        raise SystemExit('interrupted; the same command goes on') from None
    done = [run for run in runs if run.state == 'done']
    results = [json.loads(run.result.read_text()) | {'paper': run.row.paper, 'own': asdict(run.row.own)} for run in done]
    table = markdown(results)
    print(table)
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(table)
    if args.plot and results:
        plot(results, args.plot)
    raise SystemExit(len(done) < len(runs))


if __name__ == '__main__':
    main()
