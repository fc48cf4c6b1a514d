"""Fit a config of mmdet, mmseg or mmpretrain into the memory of a GPU.

    mmman fit mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --memory 8GB -o retinanet_8gb.py
    mmman fit my_config.py --as-small-as-possible --batch 4 --shape 608 1024
    mmman fit my_config.py --max-overhead 0.1 --choose 3 -o smaller.py --check
    mmman fit my_config.py --device a100 --max-slowdown 0.15

It predicts the peak memory of a training step for the config as it is, for options that train the same, and for local learning
(MAN++), and writes a config that inherits from yours for the first that fits. Batch and image size are read from the config.
Nothing runs at that size, unless the backbone attends to all positions, and no GPU is needed; it takes minutes.
docs/howto/fit_memory.md says more.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import mmman  # noqa: F401  registers what the configs name
from mmman import LocalLearningError
from mmman.analysis.roofline import DEVICES
from mmman.messages import one_line
from mmman.planning.choice import FitRow, Limits, choose_row
from mmman.planning.fit import BLOCKS
from mmman.runtime.fit_config import ConfigFit

CONSOLE = Console(width=140)
MB = 1e6
UNITS = {'kB': 1e3, 'MB': 1e6, 'GB': 1e9, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30}


def size(text: str) -> int:
    """Bytes, of a number with a unit."""
    found = re.fullmatch(r'([0-9]+(?:\.[0-9]+)?) *([kMG]i?B)', text)
    if not found or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f'{text!r}: give a size such as 8GB or 7.5GiB')
    return int(float(found[1]) * UNITS[found[2]])


def count(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: give an integer of at least 1')
    return int(text)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n\n')[0],
        epilog=__doc__.partition('\n\n')[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='library::path of a stock config, or the path of a config file')
    parser.add_argument('--memory', type=size, metavar='8GB', help='the first row whose peak is within this')
    parser.add_argument('--max-overhead', type=float, metavar='0.1', help='at most so many more FLOPs, relative to the config')
    parser.add_argument('--device', choices=DEVICES, help='estimate the time on this GPU, and plan by it in place of FLOPs')
    parser.add_argument('--max-slowdown', type=float, metavar='0.1', help='at most so much more time on --device')
    parser.add_argument('--as-small-as-possible', action='store_true', help='the row with the smallest peak')
    parser.add_argument('--choose', type=count, metavar='N', help='the row with this number, whether it fits or not')
    parser.add_argument('-o', '--out', type=Path, help='config file to write; default: print it')
    parser.add_argument('--batch', type=count, help="images per step and GPU; default: the config's own")
    parser.add_argument('--shape', type=count, nargs=2, metavar=('H', 'W'), help="pixels; default: the config's own")
    parser.add_argument('--frozen-stages', type=int, metavar='N', help="in place of the stock backbone's; -1: none is frozen")
    parser.add_argument('--images-per-chunk', type=count, metavar='N', help='for detectors; default: a quarter of the batch')
    parser.add_argument('--blocks', type=count, metavar='K', help=f'local learning in K blocks; default: {BLOCKS}')
    parser.add_argument('--cuts', nargs='+', metavar='UNIT', help="'stage', 'uniform' or the last units; default: planned")
    parser.add_argument('--check', nargs='?', const='chosen', choices=('chosen', 'all'), help='measure a step, and compare')
    parser.add_argument('--no-dry-run', action='store_true', help='write the config without a training step of it')
    given = parser.parse_args(args)
    limits = given.memory, given.max_overhead, given.max_slowdown, given.choose
    if all(limit is None for limit in limits) and not given.as_small_as_possible:
        parser.error('say what to look for: --memory, --max-overhead, --max-slowdown, --as-small-as-possible or --choose')
    if given.memory is not None and given.as_small_as_possible:
        parser.error('--memory takes the first row that fits, --as-small-as-possible the smallest: give one of them')
    for name, share in (('--max-overhead', given.max_overhead), ('--max-slowdown', given.max_slowdown)):
        if share is not None and not share >= 0:
            parser.error(f'{name} {share}: give at least 0')
    if given.max_slowdown is not None and given.device is None:
        parser.error('--max-slowdown is of the time on a GPU: say which by --device')
    if given.max_overhead is not None and given.device is not None:
        parser.error('--max-overhead is of FLOPs, and with --device time is planned in their place: give --max-slowdown')
    if given.blocks is not None and given.blocks < 2:
        parser.error('--blocks 1 is end-to-end training, which the first rows are: give at least 2')
    given.partition = given.cuts
    if given.cuts and {'stage', 'uniform'} & {*given.cuts}:
        if len(given.cuts) > 1:
            parser.error(f"--cuts {' '.join(given.cuts)}: give 'stage', 'uniform' or names of units")
        given.partition = given.cuts[0]
    elif given.cuts and given.blocks not in (None, len(given.cuts) + 1):
        parser.error(f'--cuts names the last units of {len(given.cuts)} blocks, so --blocks would be {len(given.cuts) + 1}')
    if given.out is not None:
        if given.out.exists():
            parser.error(f'-o {given.out} exists: choose another name or remove it')
        if given.out.suffix != '.py' or not given.out.absolute().parent.is_dir():
            parser.error(f'-o {given.out}: give the name of a .py file in a folder that exists')
    return given


def predict(args: argparse.Namespace, limits: Limits) -> tuple[ConfigFit, list[FitRow]]:
    """Read the config and predict the rows, behind a progress bar."""
    blocks = BLOCKS if args.blocks is None else (args.blocks,)
    folder = None if args.out is None else args.out.absolute().parent
    shape = tuple(args.shape) if args.shape else None
    columns = TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task('reading the config, choosing local heads', total=1.0)
        options = args.frozen_stages, args.images_per_chunk, not args.no_dry_run, DEVICES.get(args.device)
        fit = ConfigFit.of(args.config, folder, args.batch, shape, *options)

        def report(what: str, done: float) -> None:
            progress.update(task, description=what, completed=done)

        return fit, [*fit.rows(limits, blocks, args.partition, report)]


def table_of(rows: list[FitRow], limits: Limits, title: str) -> Table:
    """One line a row."""
    table = Table(title=title)
    for name in ('', 'what changes', 'trains'):
        table.add_column(name, justify='left' if name else 'right', overflow='fold')
    base = rows[0]
    for name in ('peak, MB', 'to as it is', 'FLOPs', 'launches', *(['time'] if base.time else []), 'fits'):
        table.add_column(name, justify='right', no_wrap=True)
    for number, row in enumerate(rows, start=1):
        if row.peak is None:
            table.add_row(str(number), f'{row.name}: {row.note}', row.trains, '?', *[''] * (4 if base.time else 3), 'no')
            continue
        table.add_row(
            str(number),
            row.name,
            row.trains,
            f'{row.peak.total / MB:.1f}',
            f'{row.peak.total / base.peak.total - 1:+.1%}',
            f'{row.flops / base.flops - 1:+.1%}',
            str(row.operators),
            *([f'{row.time / base.time - 1:+.0%}'] if base.time else []),
            'yes' if limits.fits(row, base) else 'no',
        )
    return table


def run(args: argparse.Namespace) -> tuple[list[FitRow], FitRow]:
    """Predict, print, choose, write and measure. Returns the rows and the one that was chosen."""
    limits = Limits(args.memory, args.max_overhead, args.max_slowdown)
    fit, rows = predict(args, limits)
    batch, height, width = fit.case.shape
    title = f'expected of a training step with {batch} images of {height}x{width} per GPU'
    CONSOLE.print(table_of(rows, limits, title if args.device is None else f'{title}, estimated time on {args.device}'))
    row = choose_row(rows, limits, batch, args.choose)
    text = fit.text(row, rows[0])
    notes = [] if args.no_dry_run else fit.check(row, text)
    CONSOLE.print(f'chosen: row {rows.index(row) + 1}, {row.name}', highlight=False)
    for note in notes:
        print(f'- {note}', file=sys.stderr)
    if args.out is None:
        print(text)
    else:
        try:
            args.out.write_text(text, encoding='utf-8')
        except OSError as error:
            raise SystemExit(f'{args.out} cannot be written ({error})') from None
        CONSOLE.print(f'{args.out} is written; train it:  mmman train {args.out}', highlight=False, soft_wrap=True)
    for one in {'chosen': [row], 'all': rows}.get(args.check, []):
        if one.peak is None:
            CONSOLE.print(f'row {rows.index(one) + 1}: not predicted, so not measured', highlight=False)
        else:
            print_measured(fit, one, rows)
    return rows, row


def print_measured(fit: ConfigFit, row: FitRow, rows: list[FitRow]) -> None:
    """Measure a row and print how far off its prediction is."""
    peak, allocated = fit.measured_peak(fit.text(row, rows[0]))
    text = f'row {rows.index(row) + 1}: predicted {row.peak.total / MB:.1f} MB, measured {peak / MB:.1f} MB, '
    text += f'the prediction is {row.peak.total / peak - 1:+.2%} off'
    if allocated is not None:
        text += f"; torch's allocator took {allocated / MB:.1f} MB"
    CONSOLE.print(text, highlight=False)


def main() -> None:
    args = parse_args()
    MMLogger.get_instance('fit_memory', log_level='ERROR')
    try:
        run(args)
    except LocalLearningError as error:
        message = one_line(str(error))
        raise SystemExit(
            message if args.config in message or message.startswith('--') else f'{args.config}: {message}'
        ) from None


if __name__ == '__main__':
    main()
