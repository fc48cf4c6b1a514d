"""Rows: the config of each, with its task and budget applied, and the folder of its trainings."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pprint import pformat
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from training_rows.budget import SHARED, Budget, differences, scale_scheduler, shared_settings, take_images
from training_rows.task import Recipe, RowSource, Task


@dataclass(frozen=True)
class RowRequest:
    """A row of the command line.

    Attributes:
        ablation: Overrides that are applied after the task's settings, by dotted key.
    """

    name: str
    source: RowSource
    ablation: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """A config with a task and a budget applied to it.

    Attributes:
        paper: The paper's numbers for this row and its budget there, if any.
        iterations: Number of iterations of a training.
        validations: The iterations after which the model is validated.
        interval: Iterations between lines of the log.
        folder: Folder of its trainings.
    """

    name: str
    cfg: Config
    paper: dict
    budget: Budget
    iterations: int
    validations: list[int]
    interval: int
    folder: Path

    @property
    def iterations_per_epoch(self) -> int:
        """Iterations of an epoch, or 1 where iterations are counted."""
        return self.iterations // self.budget.length


def build_row(request: RowRequest, task: Task, args: argparse.Namespace) -> Row:
    """Read the config of a row, and apply the task and the command line to it."""
    cfg = Config.fromfile(request.source.config)
    cfg.merge_from_dict(dict(request.source.overrides))
    paper = cfg.pop('paper', {})
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if task.recipe:
        task.fit_model(cfg)
        task.set_data(cfg, args.data_root.resolve())
        budget, iterations = _apply_recipe(cfg, task.recipe, args)
        val_interval = math.ceil(budget.length / task.recipe.validations)
    else:
        budget, iterations, val_interval = _scale_own_recipe(cfg, request, args)
    paper = {**paper, 'budget': _own_budget(request.source.config)} if paper else {}
    steps = iterations // budget.length
    validations = sorted({*range(val_interval, budget.length, val_interval), budget.length})
    interval = max(1, min(50, iterations // 20))
    _set_loops_and_logs(cfg, budget, val_interval, interval)
    merge(cfg, args.cfg_options, '--cfg-options')
    merge(cfg, request.ablation, f'--ablation {request.name}')
    folder = args.work_dir / f'{task.name}_{budget.folder}' / request.name
    return Row(request.name, cfg, paper, budget, iterations, [steps * i for i in validations], interval, folder)


def merge(cfg: Config, overrides: Mapping[str, Any], option: str) -> None:
    """Override settings of a config; end the program if it has no such section."""
    for key in overrides:
        if key.partition('.')[0] not in cfg:
            close = difflib.get_close_matches(key.partition('.')[0], [*cfg.keys()], 1)
            raise SystemExit(f'{option}: {key} is in no section of the config{f"; is it {close[0]}?" if close else ""}')
    try:
        cfg.merge_from_dict(dict(overrides))
    except (KeyError, IndexError, TypeError) as error:
        raise SystemExit(f'{option}: {error}') from None


def _apply_recipe(cfg: Config, recipe: Recipe, args: argparse.Namespace) -> tuple[Budget, int]:
    """Train a row by the task's recipe. Returns the budget and the number of iterations."""
    wrong = {'iterations': 'epochs', 'epochs': 'iterations'}[recipe.unit]
    if getattr(args, wrong):
        raise SystemExit(f'--{wrong}: this task counts {recipe.unit}; give --{recipe.unit}')
    lr = args.lr or recipe.optimizer['lr']
    length = getattr(args, recipe.unit) or recipe.length
    budget = _set_budget(cfg, recipe.unit, length, args.batch_size or recipe.batch_size, lr, args)
    cfg.optim_wrapper.optimizer = Config({**recipe.optimizer, 'lr': lr})._cfg_dict
    cfg.optim_wrapper.clip_grad = recipe.clip_grad
    cfg.auto_scale_lr = None
    cfg.param_scheduler = recipe.schedule(length)
    by_epoch = recipe.unit == 'epochs'
    cfg.train_cfg = (
        {'type': 'EpochBasedTrainLoop', 'max_epochs': length}
        if by_epoch
        else {
            'type': 'IterBasedTrainLoop',
            'max_iters': length,
        }
    )
    cfg.val_cfg = {'type': 'ValLoop'}
    return budget, length * (_batches(cfg, budget) if by_epoch else 1)


def _scale_own_recipe(cfg: Config, request: RowRequest, args: argparse.Namespace) -> tuple[Budget, int, int]:
    """Train a row as its config says, scaled to the budget. Returns the budget, and numbers of iterations and epochs."""
    own = cfg.train_cfg.get('max_epochs')
    if not own or args.iterations:
        raise SystemExit(f'{request.name}: a row of the paper is trained by epochs; set train_cfg.max_epochs, give --epochs')
    epochs = args.epochs or own
    # a run is one process; the batch of a row for several processes is that of all of them
    batch_size = args.batch_size or (cfg.get('auto_scale_lr') or {}).get('base_batch_size', cfg.train_dataloader.batch_size)
    optimizer = cfg.optim_wrapper.optimizer
    optimizer.lr = args.lr or optimizer.lr
    budget = _set_budget(cfg, 'epochs', epochs, batch_size, optimizer.lr, args)
    batches = _batches(cfg, budget)
    if epochs != own:
        schedulers = cfg.get('param_scheduler') or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        cfg.param_scheduler = [scale_scheduler(one, own, epochs, batches) for one in schedulers]
    cfg.train_cfg.max_epochs = epochs
    return budget, epochs * batches, max(1, cfg.train_cfg.get('val_interval', 1) * epochs // own)


def _set_budget(cfg: Config, unit: str, length: int, batch_size: int, lr: float, args: argparse.Namespace) -> Budget:
    """Set the images and the batch size of a config."""
    loaders = cfg.train_dataloader, cfg.val_dataloader
    totals = [_images(pformat(loader.dataset.to_dict())) for loader in loaders]
    counts = [wanted or total for wanted, total in zip((args.train_images, args.val_images), totals, strict=True)]
    for loader, total, count in zip(loaders, totals, counts, strict=True):
        take_images(loader.dataset, total, count)
    cfg.train_dataloader.batch_size = batch_size
    options = tuple(f'{key}={value}' for key, value in sorted(args.cfg_options.items()))
    return Budget(length, unit, *counts, batch_size, lr, options)


@cache
def _images(dataset: str) -> int:
    """Number of images of a dataset, given its config as text."""
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        return len(DATASETS.build(Config.fromstring(f'dataset = {dataset}', '.py').dataset))


def _batches(cfg: Config, budget: Budget) -> int:
    """Iterations of an epoch."""
    batches = (math.floor if cfg.train_dataloader.get('drop_last') else math.ceil)(budget.train_images / budget.batch_size)
    if not batches:
        raise SystemExit(f'a batch of {budget.batch_size} out of {budget.train_images} images; set --batch-size')
    return batches


def _own_budget(path: Path) -> str:
    """The budget that a config of the paper's rows has by itself, for a table."""
    cfg = Config.fromfile(path)
    batch_size = (cfg.get('auto_scale_lr') or {}).get('base_batch_size', cfg.train_dataloader.batch_size)
    return f'{cfg.train_cfg.get("max_epochs")} epochs, batch {batch_size}'


def _set_loops_and_logs(cfg: Config, budget: Budget, val_interval: int, interval: int) -> None:
    """Validate and log at the same iterations in all rows, and keep the checkpoints that an exact resume needs."""
    cfg.train_cfg.val_interval = val_interval
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    by_epoch = budget.unit == 'epochs'
    between = 1 if by_epoch else max(1, budget.length // 15)
    # Two checkpoints: a validation that was interrupted is run again from the one before
    checkpoint = {'type': 'CheckpointHook', 'by_epoch': by_epoch, 'interval': between, 'max_keep_ckpts': 2}
    logger = {'type': 'LoggerHook', 'interval': interval, 'log_metric_by_epoch': False}
    hooks = {key: value for key, value in (cfg.get('default_hooks') or {}).items() if key != 'visualization'}
    cfg.default_hooks = {**hooks, 'checkpoint': checkpoint, 'logger': logger}
    cfg.log_processor = {'type': 'LogProcessor', 'window_size': interval, 'by_epoch': by_epoch}


def check_equal_budgets(rows: list[Row]) -> None:
    """End the program if the rows of a table would not all be given the same."""
    first = rows[0]
    for row in rows[1:]:
        if found := differences(shared_settings(first.cfg), shared_settings(row.cfg)):
            raise SystemExit(
                f'{row.name} has another budget than {first.name}: {"; ".join(found[:3])}. Rows of a table share '
                f'{", ".join(SHARED)} and the optimizer; override them for all rows by --cfg-options or the budget options'
            )


def store_config(row: Row) -> None:
    """Write the config that all seeds of a row share, once; refuse to mix trainings of two configs or budgets in a table."""
    table = row.folder.parent / 'budget.json'
    settings = json.loads(json.dumps(shared_settings(row.cfg), default=str))
    if table.exists() and (found := differences(json.loads(table.read_text()), settings)):
        raise SystemExit(f'{table.parent} has trainings of another budget: {"; ".join(found[:3])}; choose another --work-dir')
    row.folder.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(settings, indent=1))
    path, text = row.folder / 'config.py', _text(row.cfg)
    if not path.exists():
        path.write_text(text)
    elif path.read_text() != text:
        changes = difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), 'trained', 'wanted', lineterm='', n=0)
        print(*list(changes)[:20], sep='\n')
        raise SystemExit(f'{path} is not what this command asks for, see above; choose another --work-dir, or --force')


def _text(cfg: Config) -> str:
    """A config as Python text, without mmengine's formatter, which does not take every value."""
    settings = cfg.to_dict().items()
    return '\n'.join(f'{key} = {pformat(value, width=120, compact=True, sort_dicts=False)}' for key, value in settings)
