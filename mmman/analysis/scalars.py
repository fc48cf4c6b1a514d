"""Reads what mmengine's runs logged: the scalars of a work folder, over iterations."""

from __future__ import annotations

import json
from pathlib import Path

from mmman.errors import ConfigError


def read_scalars(work_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that the runs of a work folder logged, from every ``<time>/vis_data/scalars.json``.

    A run that was resumed, or started anew, replaces what an earlier one logged from its first iteration on.

    Args:
        work_dir: The work folder of a run, which mmengine's ``LocalVisBackend`` wrote to (the default).

    Returns:
        By name, as in ``local/1/loss`` or ``coco/bbox_mAP``, pairs (iteration, value) in order. mmengine gives validations the
        number of the epoch, unless ``log_metric_by_epoch=False``: they get the last iteration that was logged before.

    Raises:
        ConfigError: There is no such file, or a line of it can't be read.
    """
    paths = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not paths:
        raise ConfigError(
            f"{work_dir} has no */vis_data/scalars.json: give the work folder of a run with 'LocalVisBackend' (the default)"
        )
    curves: dict[str, dict[int, float]] = {}
    for path in paths:
        points = _points(path)
        first = min((step for step, _, _ in points), default=0)
        curves = {name: {step: v for step, v in curve.items() if step < first} for name, curve in curves.items()}
        for step, name, value in points:
            curves.setdefault(name, {})[step] = value
    return {name: sorted(curve.items()) for name, curve in curves.items() if curve}


def _points(path: Path) -> list[tuple[int, str, float]]:
    """Triples (iteration, name, value) of a file. The seconds of validations are left out."""
    points, last = [], 0
    lines = path.read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = {name: value for name, value in json.loads(line).items() if isinstance(value, (int, float))}
            step = values.pop('step')
        except (ValueError, KeyError, AttributeError):
            if number == len(lines):  # a run that goes on, or was killed, may have written a part of a line
                break
            raise ConfigError(f'{path}, line {number}: no scalars of mmengine; remove the line') from None
        is_training = 'iter' in values
        last = step if is_training else max(step, last)
        left_out = ('iter', 'epoch') if is_training else ('time', 'data_time')
        points += [(last, name, float(value)) for name, value in values.items() if name not in left_out]
    return points


def by_block(curves: dict[str, list[tuple[int, float]]], name: str) -> dict[int, list[tuple[int, float]]]:
    """The curves ``local/<block>/<name>``, by block from 1, in order."""
    found = {}
    for key, curve in curves.items():
        local, _, rest = key.removeprefix('train/').partition('/')
        block, _, own = rest.partition('/')
        if local == 'local' and own == name and block.isdigit():
            found[int(block)] = curve
    return dict(sorted(found.items()))
