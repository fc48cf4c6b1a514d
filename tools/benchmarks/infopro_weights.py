"""Print the weights of InfoPro's two losses, lambda_1 and lambda_2, at every local head of the given configs.

python tools/benchmarks/infopro_weights.py    # every row of the paper with InfoPro's local heads
python tools/benchmarks/infopro_weights.py table1/cifar10_resnet32_k8_infopro configs/paper/deeplabv3_r50_manpp_k2.py

The heads are built as for training. Neighbouring blocks with equal weights share a line.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mmman  # noqa: F401  registers its components
from training_rows.paper_rows import expand, paper_rows

Weights = list[tuple[int, float, float]]
"""For each local head its block, lambda_1 (reconstruction) and lambda_2 (task)."""


def loss_weights(cfg: Config) -> Weights:
    """The weights at all local heads of a config; empty if they don't have InfoPro's losses."""
    head = cfg.model.backbone.get('local_head') or {}
    if str(head.get('type')).rpartition('.')[-1] not in ('InfoProLocalHead', 'SegLocalHead'):
        return []
    init_default_scope(cfg.default_scope)
    options = copy.deepcopy(cfg.model.backbone)
    options.transfer = {'ema': False, 'bias': False, 'scale': False}  # the weights don't depend on it
    key = str(options)
    if key not in _KNOWN:
        heads = MODELS.build(options).local.values()
        _KNOWN[key] = [(head.block, head.lambda_rec, head.lambda_task) for head in heads]
    return _KNOWN[key]


_KNOWN: dict[str, Weights] = {}
"""Weights by config of the backbone, which rows for other datasets and transfers share."""


def merge_equal(weights: Weights) -> Iterator[tuple[str, float, float]]:
    """Merge neighbouring blocks of equal weights into ranges, e.g. ``2 to 5``."""
    for (rec, task), group in groupby(weights, key=lambda one: one[1:]):
        blocks = [block for block, *_ in group]
        yield (f'{blocks[0]} to {blocks[-1]}' if len(blocks) > 1 else str(blocks[0])), rec, task


def make_table(names: Iterable[str]) -> Table:
    """The weights of rows of the paper, by name, and of config files."""
    table = Table('row', 'block', 'λ1, reconstruction', 'λ2, task')
    for name in names:
        cfg = expand(name) if name in paper_rows() else Config.fromfile(name)
        lines = [*merge_equal(loss_weights(cfg))]
        for i, (blocks, rec, task) in enumerate(lines, start=1):
            table.add_row(name if i == 1 else '', blocks, f'{rec:.4g}', f'{task:.4g}', end_section=i == len(lines))
    return table


def default_rows() -> list[str]:
    """The paper's rows with InfoPro's local heads."""
    return [name for name, row in paper_rows().items() if row.heads == 'infopro']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'rows',
        nargs='*',
        metavar='ROW_OR_CONFIG',
        help="rows of the paper by name, or config files; default: the paper's rows with InfoPro's local heads",
    )
    args = parser.parse_args()
    MMLogger.get_instance('mmengine').setLevel(logging.ERROR)
    for name in args.rows:
        if name not in paper_rows() and not Path(name).is_file():
            nearest = difflib.get_close_matches(name, paper_rows(), 3, cutoff=0)
            parser.error(f'{name} is no config file and no row of the paper; the nearest rows are {", ".join(nearest)}')
    rows = args.rows or default_rows()
    table = make_table(track(rows, 'Reading configs', console=Console(stderr=True), transient=True))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == '__main__':
    main()
