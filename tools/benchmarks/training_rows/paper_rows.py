"""The rows of ``configs/paper/rows.py``: reads the table and expands a row to its config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmengine.config import Config, ConfigDict

PAPER = Path(__file__).resolve().parents[3] / 'configs' / 'paper'

OWN_HEAD = {'mmpretrain': ('head',), 'mmdet': ('bbox_head', 'train_cfg'), 'mmseg': ('decode_head',)}
"""What a local head copies from the model, by library."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the table.

    Attributes:
        table: The paper's table that has its numbers, e.g. ``'VII a'``; ``'release'`` or ``'MLAAN'``.
        network: A key of ``networks`` in ``rows.py``.
        num_blocks: K; 1 is trained end to end.
        heads: A key of the network's ``heads``; ``'-'`` for K=1.
        transfer: A key of ``transfers`` in ``rows.py``; ``'-'`` for K=1.
        window: Number of blocks that a local loss trains.
        start: ``'scratch'`` or ``'pretrained'``.
        numbers: The paper's numbers by name, e.g. ``error``, %. Empty if it has none.
    """

    name: str
    table: str
    network: str
    num_blocks: int
    heads: str
    transfer: str
    window: int
    start: str
    numbers: Mapping[str, float]


@cache
def paper_rows() -> dict[str, PaperRow]:
    """All rows by name, in the order of the tables."""
    rows = {}
    for table, text in _table().tables.items():
        columns, *lines = text.strip().splitlines()
        for line in lines:
            row = _row(table, dict(zip(columns.split(), line.split(), strict=True)))
            rows[row.name] = row
    return rows


@cache
def _table() -> Config:
    return Config.fromfile(PAPER / 'rows.py')


def _row(table: str, cells: dict[str, str]) -> PaperRow:
    """A row by its cells: the columns of all tables, ``window`` and ``start`` where they differ, and numbers of the paper."""
    name, network, num_blocks, heads, transfer = (cells.pop(key) for key in ('name', 'network', 'K', 'heads', 'transfer'))
    start, window = cells.pop('start', 'scratch'), int(cells.pop('window', 1))
    numbers = {key: float(value) for key, value in cells.items() if value != '-'}
    return PaperRow(name, table, network, int(num_blocks), heads, transfer, window, start, numbers)


def list_rows() -> str:
    """The tables as text."""
    titles = {'release': "The authors' code", 'MLAAN': 'MLAAN'}
    return '\n\n'.join(f'{titles.get(name, f"Table {name}")}{text.rstrip()}' for name, text in _table().tables.items())


def expand(name: str) -> Config:
    """The config of a row: the base config of its network, the changes of the network, and the local learning of the row.

    Raises:
        KeyError: There is no such row.
    """
    row = paper_rows()[name]
    network = copy.deepcopy(_table().networks[row.network])
    cfg = copy.deepcopy(_base(network.base))
    cfg.merge_from_dict(network.get('changes', {}))
    if row.start == 'scratch':
        cfg.merge_from_dict(network.get('scratch', {}))
    if row.num_blocks > 1:
        cfg.model.backbone = _local_backbone(row, network, cfg)
        cfg.optim_wrapper.type = 'mmman.LocalLearningOptimWrapper'
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), {'type': 'mmman.EMABiasHook', 'momentum': 0.995}]
        cfg.merge_from_dict(network.get('local', {}))
    if row.numbers:
        cfg.paper = {'table': row.table, **row.numbers}
    return cfg


@cache
def _base(name: str) -> Config:
    return Config.fromfile(PAPER / '_base_' / name)


def _local_backbone(row: PaperRow, network: ConfigDict, cfg: Config) -> dict:
    """The config of ``LocalBackbone`` around the model's own backbone."""
    head = network.heads[row.heads]
    own = copy.deepcopy({key: cfg.model[key] for key in OWN_HEAD[cfg.default_scope]})
    local_head = {'type': head.type, **own}
    for key, value in head.items():
        local_head[key] = {**own[key], **value} if key in own else value
    options = {'type': 'mmman.LocalBackbone', 'backbone': cfg.model.backbone, 'num_blocks': row.num_blocks}
    if cuts := network.get('cuts'):
        options['partition'] = cuts[row.num_blocks]
    options['local_head'] = local_head
    if transfer := _table().transfers[row.transfer]:
        options['transfer'] = copy.deepcopy(transfer)
    if row.window > 1:
        options['window'] = row.window
    return options
