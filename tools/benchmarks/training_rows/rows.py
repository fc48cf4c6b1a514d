"""Rows: the config of each, with its task and budget applied, and the folder of its trainings."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from pprint import pformat
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from training_rows.budget import SHARED, Budget, differences, scale_scheduler, shared_settings, take_images
from training_rows.task import Recipe, RowSource, Task

LOOPS = {'iterations': ('IterBasedTrainLoop', 'max_iters'), 'epochs': ('EpochBasedTrainLoop', 'max_epochs')}
"""The train loop of a unit, and its option for the length."""

CHECKPOINTS = 15  # of a training whose iterations are counted


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
        paper: ``value`` and ``budget`` of the paper for this row, or empty.
        iterations: Number of iterations of a training.
        validations: The iterations after which the model is validated.
        folder: Folder of its trainings.
    """

    name: str
    cfg: Config
    paper: dict
    budget: Budget
    iterations: int
    validations: list[int]
    folder: Path

    @property
    def iterations_per_epoch(self) -> int:
        """Iterations of an epoch, or 1 where iterations are counted."""
        return self.iterations // self.budget.length


def build_row(request: RowRequest, task: Task, args: argparse.Namespace) -> Row:
    """Read the config of a row, and apply the task and the command line to it."""
    cfg = request.source.read()
    paper = _paper(cfg, task)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if task.recipe:
        task.fit_model(cfg)
        task.set_data(cfg, args.data_root.resolve())
        _set_recipe(cfg, task.recipe, args)
    merge(cfg, args.cfg_options, '--cfg-options')
    budget = _set_budget(cfg, args)
    batches = _batches(cfg, budget)
    if not task.recipe:
        _scale_to_epochs(cfg, request.name, batches, args)
        budget = replace(budget, length=cfg.train_cfg.max_epochs)
    steps = batches if budget.unit == 'epochs' else 1
    _set_logs_and_checkpoints(cfg, budget, steps)
    shared = shared_settings(cfg)
    merge(cfg, request.ablation, f'--ablation {request.name}')
    if found := differences(shared, shared_settings(cfg)):
        raise SystemExit(f'--ablation {request.name} changes the budget: {found[0]}; --cfg-options changes it for all rows')
    between = cfg.train_cfg.val_interval
    validations = [steps * i for i in sorted({*range(between, budget.length, between), budget.length})]
    folder = args.work_dir / f'{task.name}_{budget.folder}' / request.name
    return Row(request.name, cfg, paper, budget, steps * budget.length, validations, folder)


def merge(cfg: Config, overrides: Mapping[str, Any], option: str) -> None:
    """Override settings of a config; end the program if it has no such section."""
    for key in overrides:
        section = key.partition('.')[0]
        if section not in cfg:
            close = difflib.get_close_matches(section, [*cfg.keys()], 1)
            raise SystemExit(f'{option}: the config has no {section}' + (f'; did you mean {close[0]}?' if close else ''))
    try:
        cfg.merge_from_dict(dict(overrides))
    except (KeyError, IndexError, TypeError) as error:
        raise SystemExit(f'{option}: {error}') from None


def _set_recipe(cfg: Config, recipe: Recipe, args: argparse.Namespace) -> None:
    """Train a row by the task's recipe, at the length, batch size and learning rate of the command line if it gives them."""
    wrong = {'iterations': 'epochs', 'epochs': 'iterations'}[recipe.unit]
    if getattr(args, wrong):
        raise SystemExit(f'--{wrong}: this task counts {recipe.unit}; give --{recipe.unit}')
    length = getattr(args, recipe.unit) or recipe.length
    loop, limit = LOOPS[recipe.unit]
    cfg.train_cfg = {'type': loop, limit: length, 'val_interval': math.ceil(length / recipe.validations)}
    cfg.val_cfg = {'type': 'ValLoop'}
    cfg.param_scheduler = recipe.schedule(length)
    cfg.optim_wrapper.optimizer = ConfigDict(recipe.optimizer)
    cfg.optim_wrapper.clip_grad = recipe.clip_grad
    cfg.train_dataloader.batch_size = recipe.batch_size
    cfg.auto_scale_lr = None


def _set_budget(cfg: Config, args: argparse.Namespace) -> Budget:
    """Set the images, the batch size and the learning rate of the command line. The length is that of the config."""
    loaders = cfg.train_dataloader, cfg.val_dataloader
    totals = [_images(pformat(loader.dataset.to_dict())) for loader in loaders]
    counts = [wanted or total for wanted, total in zip((args.train_images, args.val_images), totals, strict=True)]
    for loader, total, count in zip(loaders, totals, counts, strict=True):
        take_images(loader.dataset, total, count)
        if cfg.default_scope == 'mmpretrain':  # as its own tools do
            loader.setdefault('collate_fn', {'type': 'default_collate'})
    train, optimizer = cfg.train_dataloader, cfg.optim_wrapper.optimizer
    # A run is one process; the batch of a row for several processes is that of all of them
    train.batch_size = args.batch_size or (cfg.get('auto_scale_lr') or {}).get('base_batch_size', train.batch_size)
    optimizer.lr = args.lr or optimizer.lr
    unit = 'epochs' if cfg.train_cfg.get('max_epochs') else 'iterations'
    options = tuple(f'{key}={value}' for key, value in sorted(args.cfg_options.items()))
    return Budget(cfg.train_cfg.get(LOOPS[unit][1]), unit, *counts, train.batch_size, optimizer.lr, options)


def _scale_to_epochs(cfg: Config, name: str, batches: int, args: argparse.Namespace) -> None:
    """Scale the row's own schedule to ``--epochs`` of ``batches`` iterations each."""
    own = cfg.train_cfg.get('max_epochs')
    if not own or args.iterations:
        raise SystemExit(f'{name}: a row of the paper is trained by epochs; set train_cfg.max_epochs, give --epochs')
    epochs = args.epochs or own
    if epochs != own:
        schedulers = cfg.get('param_scheduler') or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        cfg.param_scheduler = [scale_scheduler(one, own, epochs, batches) for one in schedulers]
    cfg.train_cfg.update(max_epochs=epochs, val_interval=max(1, cfg.train_cfg.get('val_interval', 1) * epochs // own))


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


def _paper(cfg: Config, task: Task) -> dict:
    """Take the paper's numbers out of a config: accuracy, percent, and its budget. Empty if they are of another task."""
    error = cfg.pop('paper', {}).get('error')
    if error is None or task.metrics[0].key != 'accuracy/top1':
        return {}
    batch_size = (cfg.get('auto_scale_lr') or {}).get('base_batch_size', cfg.train_dataloader.batch_size)
    return {'value': f'{100 - error:.2f}', 'budget': f'{cfg.train_cfg.max_epochs} epochs, batch {batch_size}'}


def _set_logs_and_checkpoints(cfg: Config, budget: Budget, steps: int) -> None:
    """Log at the same iterations in all rows, and keep the checkpoints that an exact resume needs.

    Args:
        steps: Iterations of one ``budget.unit``.
    """
    by_epoch = budget.unit == 'epochs'
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    # Two checkpoints: a validation that was interrupted is run again from the one before
    every = 1 if by_epoch else max(1, budget.length // CHECKPOINTS)
    checkpoint = {'type': 'CheckpointHook', 'by_epoch': by_epoch, 'interval': every, 'max_keep_ckpts': 2}
    interval = max(1, min(50, steps * budget.length // 20))
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
    settings = shared_settings(row.cfg)
    for other in sorted(row.folder.parent.glob('*/config.py')):
        found = differences(shared_settings(Config.fromfile(other)), settings)
        if found and other.parent != row.folder:
            raise SystemExit(
                f'{row.folder.parent} has trainings of another budget: {"; ".join(found[:3])} ({other.parent.name}); '
                'choose another --work-dir'
            )
    row.folder.mkdir(parents=True, exist_ok=True)
    (row.folder / 'paper.json').write_text(json.dumps(row.paper))
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
