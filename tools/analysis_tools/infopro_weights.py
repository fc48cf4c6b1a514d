"""Print the weights of InfoPro's two losses, lambda_1 and lambda_2, at every local head of the given configs.

python tools/analysis_tools/infopro_weights.py    # every row of the paper with InfoPro's local heads
python tools/analysis_tools/infopro_weights.py configs/deeplabv3_r50_manpp_k2.py

The heads are built as for training. Neighbouring blocks with equal weights share a line.
"""

from __future__ import annotations

import argparse
import copy
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
from mmman.runtime.launch import config_argument

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

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


def make_table(paths: Iterable[Path]) -> Table:
    table = Table('row', 'block', 'λ1, reconstruction', 'λ2, task')
    for path in paths:
        lines = [*merge_equal(loss_weights(Config.fromfile(path)))]
        path = path.resolve()
        name = str(path.relative_to(CONFIGS) if path.is_relative_to(CONFIGS) else path)
        for i, (blocks, rec, task) in enumerate(lines, start=1):
            table.add_row(name if i == 1 else '', blocks, f'{rec:.4g}', f'{task:.4g}', end_section=i == len(lines))
    return table


def default_rows() -> list[Path]:
    """The paper's rows with InfoPro's local heads: those named so, and Table VII's on ImageNet."""
    paper = CONFIGS / 'paper'
    return sorted({*paper.glob('*/*infopro*.py'), *paper.glob('table7/imagenet_*.py')})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', type=config_argument, nargs='*', help="default: the paper's rows with InfoPro's local heads")
    args = parser.parse_args()
    MMLogger.get_instance('mmengine').setLevel(logging.ERROR)
    paths = args.configs or default_rows()
    table = make_table(track(paths, 'Reading configs', console=Console(stderr=True), transient=True))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == '__main__':
    main()
