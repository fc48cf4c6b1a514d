"""Memory, FLOPs and seconds of one training step of configs of mmdet, mmseg or mmpretrain, side by side.

    python tools/analysis_tools/measure_training.py CONFIG [KEY=VALUE ...] [CONFIG ...] --shape 608 1024 --batch 2

A KEY=VALUE overrides the config in front of it, in the syntax of --cfg-options; the same config may come several times. End to
end, with activation checkpointing, under autocast, InfoPro, MAN and MAN++ in one run (num_blocks=1 is end-to-end training):

    C=configs/paper/resnet101_manpp_k4_imagenet.py B=model.backbone
    E2E="$C $B.num_blocks=1 $B.partition=stage"
    python tools/analysis_tools/measure_training.py \\
        $E2E  $E2E $B.backbone.with_cp=True  $E2E optim_wrapper.dtype=bfloat16 \\
        $C $B.transfer.ema=False $B.transfer.bias=False $B.transfer.scale=False  $C $B.transfer.scale=False  $C \\
        --names E2E checkpointing bf16 InfoPro MAN MAN++ --shape 224 224 --batch 8 --picture memory.png

Bytes are those of live tensors, counted exactly: on the CPU the same command gives the same numbers everywhere. On a GPU the
peak of torch's allocator is told as well, and how long kernels take without the time in which the GPU waits for the CPU. The
step is the second one, so that optimizer state is there. docs/results.md says what the floor is; in brackets, where neck and
heads run on a few images at a time, that of all images at once.

Operators are those of the device, views left out. What a GPU pays for is counted on any device, by part of the step: launches
(operators that start kernels, an optimizer step as one), how often the CPU waits for the GPU, with the source lines, and bytes
that operators read and write. Copies to the GPU are not seen.

On a CPU mmdet's focal loss is a chain of operators that keeps several maps of (anchors x classes). With --fused-focal-loss it
has, in all that is measured, the memory of the one operator that a GPU runs. Seconds then say nothing about the loss.

With --sizes-only nothing is computed: bytes and FLOPs of classifiers and segmentors at any batch, without its memory. They are
those of the CPU's kernels, to the byte; a list read from the GPU counts as a wait for each of its numbers. What a detector
allocates depends on its data.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.table import Table

import mmman  # noqa: F401  registers what the configs name
from mmman import LocalLearningError
from mmman.analysis.attribute_memory import TASK, block_outputs
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.roofline import DEVICES, Device, step_time
from mmman.analysis.sizes_only import SizesOnly
from mmman.analysis.training import Memory, StepMeter
from mmman.memory.detection.focal_loss import fused_focal_loss
from mmman.messages import errors_end_the_program
from mmman.runtime.stock_config import config_path

CONSOLE = Console(width=140)
MB = 1e6
HELD = ('parameters', 'buffers', 'momentum copies', 'optimizer state', 'gradients', 'input')


@dataclass(frozen=True)
class Asked:
    """A config with overrides, and its name in tables."""

    path: str
    options: dict
    name: str


def read_configs(words: list[str], names: list[str] | None = None) -> list[Asked]:
    """Configs from the words of the command line, each followed by its overrides.

    Raises:
        ValueError: An override without a config, or another number of names than of configs.
        ConfigError: A config doesn't exist.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if '=' not in word:
            groups.append((word, []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise ValueError(f'{word} overrides the config in front of it, and there is none')
    for name, _ in groups:
        config_path(name)
    if names and len(names) != len(groups):
        raise ValueError(f'--names gives {len(names)} names for {len(groups)} configs')
    names = names or [' '.join([Path(path).stem, *(word.split('.')[-1] for word in words)]) for path, words in groups]
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction)
    options = [parser.parse_args(['--options', *words]).options for _, words in groups]
    return [Asked(path, given, name) for (path, _), given, name in zip(groups, options, names, strict=True)]


def build_meters(
    asked: list[Asked], batch: int, height: int, width: int, sizes_only: SizesOnly | None = None
) -> list[StepMeter]:
    """A meter for every config. Where a model has no blocks, they are those of the first model that has some and fits."""
    trials = []
    for one in asked:
        cfg = Config.fromfile(config_path(one.path))
        cfg.merge_from_dict(one.options)
        model, optim_wrapper = build_dummy_model(cfg, height, width, sizes_only)
        if sizes_only is None and torch.cuda.is_available():
            model.cuda()
        trials.append((model, optim_wrapper, random_batch(model, cfg.default_scope, batch, height, width)))
    outputs = next(filter(None, (block_outputs(model) for model, _, _ in trials)), [])
    with sizes_only or nullcontext():
        return [StepMeter(*trial, outputs) for trial in trials]


def timed(meters: list[StepMeter], iterations: int) -> list[list[float]]:
    """Seconds of ``iterations`` steps of each meter, taken in rounds of one step each, in changing order."""
    seconds: list[list[float]] = [[] for _ in meters]
    for turn in range(iterations):
        for k in range(len(meters)):
            i = (turn + k) % len(meters)
            seconds[i].append(meters[i].seconds())
    return seconds


def median_and_quartiles(values: list[float]) -> list[float]:
    """[median, lower quartile, upper quartile]; of a single value three times that."""
    lower, median, upper = statistics.quantiles(values, method='inclusive') if len(values) > 1 else values * 3
    return [median, lower, upper]


def row_of(
    one: Asked, meter: StepMeter, memory: Memory, seconds: list[float], base: list[float], devices: Sequence[Device]
) -> dict:
    """What was measured of a config, in bytes, FLOPs and seconds; ``ratio`` is to the first config, within a round."""
    floor, in_chunks = meter.floor(), getattr(meter.optim_wrapper, 'images_per_chunk', None) is not None
    row = {
        'config': one.name,
        'path': one.path,
        'options': one.options,
        'peak': memory.peak,
        'floor': floor,
        'floor_at_once': meter.floor(in_chunks=False) if in_chunks else floor,
        'parameters': sum(p.numel() * p.element_size() for p in meter.model.parameters()),
        'allocator_peak': meter.allocator_peak(),
        'kernel_seconds': meter.kernel_seconds(),
        'parts': {part: memory.parts[part] for part in in_order(memory.parts)},
        'flops': memory.flops,
        'operators': memory.operators,
        'gpu': {
            part: {
                'launches': memory.work[part].launches,
                'moved': memory.work[part].moved,
                'waits': dict(memory.work[part].waits),
            }
            for part in in_order({*memory.work})
        },
    }
    times = {device.name: step_time(memory.timeline, device) for device in devices}
    row['predicted'] = {name: {'step': time.step, 'kernels': time.kernels} for name, time in times.items()}
    if seconds:
        row['seconds'] = median_and_quartiles(seconds)
        row['ratio'] = median_and_quartiles([own / first for own, first in zip(seconds, base, strict=True)])
    return row


def in_order(parts: set[str] | dict[str, int]) -> list[str]:
    """Parts as a reader looks for them: what is always there, the blocks, their heads, the task."""
    numbered = {'block': 0, 'local head': 1}

    def key(part: str) -> tuple:
        kind, _, number = part.rpartition(' ')
        if part in HELD:
            return (0, HELD.index(part))
        return (1 + numbered[kind], int(number)) if kind in numbered else (3, (TASK, 'optimizer step', 'rest').index(part))

    return sorted(parts, key=key)


def tables(rows: list[dict], title: str) -> list[Table]:
    """Memory, and work, one line a config; and the parts of the peaks, one line a part."""

    def spread(values: list[float] | None, digits: str) -> str:
        if values is None:
            return ''
        median, lower, upper = (f'{value:{digits}}' for value in values)
        return median if lower == upper else f'{median} ({lower}-{upper})'

    def change(row: dict, key: str) -> str:
        return '' if row[key] is None else f'{row[key] / rows[0][key] - 1:+.1%}'

    first = rows[0]
    on_gpu = first['allocator_peak'] is not None
    memory = _table(title, 'config', 'peak, MB', 'to first', 'floor, MB', 'parameters, MB')
    work = _table('work of the step', 'config', 'GFLOPs', 'to first', 'operators', 'to first', 'seconds', 'to first')
    if on_gpu:
        for table, name in ((memory, 'allocator, MB'), (memory, 'to first'), (work, 'kernels, s'), (work, 'to first')):
            table.add_column(name, justify='right', no_wrap=True)
    for row in rows:
        memory.add_row(
            row['config'],
            f'{row["peak"] / MB:.1f}',
            change(row, 'peak'),
            f'{row["floor"] / MB:.1f}'
            + (f' ({row["floor_at_once"] / MB:.1f})' if row['floor_at_once'] != row['floor'] else ''),
            f'{row["parameters"] / MB:.1f}',
            *([f'{row["allocator_peak"] / MB:.1f}', change(row, 'allocator_peak')] if on_gpu else []),
        )
        work.add_row(
            row['config'],
            f'{row["flops"] / 1e9:.2f}',
            change(row, 'flops'),
            str(row['operators']),
            change(row, 'operators'),
            spread(row.get('seconds'), '.3f'),
            spread(row.get('ratio'), '.2f'),
            *([f'{row["kernel_seconds"]:.3f}', f'{row["kernel_seconds"] / first["kernel_seconds"]:.2f}'] if on_gpu else []),
        )
    parts = _table('parts of the peak, MB', 'part', *(row['config'] for row in rows))
    for part in in_order({part for row in rows for part in row['parts']}):
        parts.add_row(part, *(f'{row["parts"][part] / MB:.1f}' if part in row['parts'] else '' for row in rows))
    parts.add_section()
    parts.add_row('peak', *(f'{row["peak"] / MB:.1f}' for row in rows))
    return [memory, work, parts, *gpu_tables(rows)]


def gpu_tables(rows: list[dict]) -> list[Table]:
    """What a GPU pays for: launches, waits and bytes by part, and the source lines that wait."""
    names = in_order({part for row in rows for part in row['gpu']})
    work = _table('launches / waits for the GPU / GB moved', 'part', *(row['config'] for row in rows))
    for part in names:
        cells = (row['gpu'].get(part) for row in rows)
        work.add_row(part, *(_gpu_cell([cell]) if cell else '' for cell in cells))
    work.add_section()
    work.add_row('step', *(_gpu_cell([*row['gpu'].values()]) for row in rows))
    for device, first in rows[0]['predicted'].items():
        work.add_section()
        for name in ('step', 'kernels'):
            seconds = [row['predicted'][device][name] for row in rows]
            work.add_row(
                f'{name}, predicted for {device}', *(f'{1e3 * own:.1f} ms, {own / first[name]:.2f}' for own in seconds)
            )
    waits = [sum((Counter(part['waits']) for part in row['gpu'].values()), Counter()) for row in rows]
    lines = _table('waits for the GPU by source line', 'line', *(row['config'] for row in rows))
    for line, _ in sum(waits, Counter()).most_common():
        lines.add_row(line, *(str(own[line] or '') for own in waits))
    return [work, lines] if lines.rows else [work]


def _gpu_cell(parts: list[dict]) -> str:
    launches, moved = (sum(part[key] for part in parts) for key in ('launches', 'moved'))
    return f'{launches} / {sum(sum(part["waits"].values()) for part in parts)} / {moved / 1e9:.2f}'


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify='right' if i else 'left', no_wrap=i > 0, overflow='fold')
    return table


def draw(path: Path, names: list[str], memories: list[Memory], title: str) -> None:
    """Stacked areas of the live bytes over one step, a panel a config, the peak marked."""
    count, tallest = len(names), max(memory.peak for memory in memories) / MB
    figure = Figure(figsize=(7, 1 + 2.2 * count), layout='constrained')
    parts = in_order({part for memory in memories for part, curve in memory.curves.items() if curve.any()})
    kinds = {kind: [part for part in parts if part.startswith(f'{kind} ')] for kind in ('block', 'local head')}
    colours = dict(zip(HELD, mpl.colormaps['Greys']([0.75, 0.35, 0.6, 0.45, 0.3, 0.15]), strict=True))
    colours |= {TASK: 'tab:green', 'optimizer step': 'tab:purple', 'rest': 'tab:pink'}
    for kind, shades in (('block', 'Blues'), ('local head', 'Oranges')):
        own = kinds[kind]
        colours |= {part: mpl.colormaps[shades](0.35 + 0.55 * i / len(own)) for i, part in enumerate(own)}
    areas = {}
    for axes, name, memory in zip(figure.subplots(count, squeeze=False)[:, 0], names, memories, strict=True):
        own = [part for part in parts if part in memory.curves]
        layers = [memory.curves[part] / MB for part in own]
        areas |= dict(zip(own, axes.stackplot(range(len(layers[0])), layers, colors=[colours[p] for p in own]), strict=True))
        moment = sum(layers).argmax()
        axes.plot(moment, memory.peak / MB, 'rv', markersize=5)
        axes.annotate(f'{memory.peak / MB:.1f}', (moment, memory.peak / MB), (4, 3), textcoords='offset points', color='red')
        axes.set(title=name, ylabel='MB', xticks=[], xlim=(0, len(layers[0]) - 1), ylim=(0, 1.15 * tallest))
    axes.set_xlabel('one training step, in allocations and releases')
    figure.suptitle(title)
    figure.legend([areas[p] for p in parts[::-1]], parts[::-1], loc='outside right upper', fontsize='small')
    figure.savefig(path, dpi=150)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n\n')[0],
        epilog=__doc__.partition('\n\n')[2],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG [KEY=VALUE ...]', help='ratios are to the first')
    parser.add_argument('--names', nargs='+', metavar='NAME', help='what to call the configs, one name for each')
    parser.add_argument('--shape', type=int, nargs=2, default=(608, 1024), metavar=('H', 'W'), help='pixels, multiples of 32')
    parser.add_argument('--batch', type=int, default=2, help='images')
    parser.add_argument('--iterations', type=int, default=5, help='timed steps of each config, by turns; 0: no times')
    parser.add_argument('--fused-focal-loss', action='store_true', help="mmdet's focal loss has the memory of a GPU's kernel")
    parser.add_argument('--sizes-only', action='store_true', help='compute nothing: bytes and FLOPs of any batch; no times')
    parser.add_argument(
        '--device', nargs='+', choices=DEVICES, default=[], help='also predict the time of the step on these GPUs'
    )
    parser.add_argument('--out', type=Path, metavar='JSON', help='also write the rows, in bytes, FLOPs and seconds')
    parser.add_argument('--picture', type=Path, metavar='PNG', help='also draw the parts of memory over the step')
    given = parser.parse_args(args)
    try:
        given.asked = read_configs(given.configs, given.names)
    except (ValueError, LocalLearningError) as error:
        parser.error(str(error))
    return given


def run(args: argparse.Namespace) -> list[dict]:
    """Measure, print the tables, write what was asked for. Returns the rows."""
    with fused_focal_loss() if args.fused_focal_loss else nullcontext():
        sizes_only = SizesOnly() if args.sizes_only else None
        meters = build_meters(args.asked, args.batch, *args.shape, sizes_only)
        seconds = timed(meters, 0 if args.sizes_only else args.iterations)
        with sizes_only or nullcontext():
            memories = [meter.memory() for meter in meters]
            devices, measured = [DEVICES[name] for name in args.device], zip(args.asked, meters, memories, seconds, strict=True)
            rows = [row_of(*one, base=seconds[0], devices=devices) for one in measured]
    title = f'one training step, batch {args.batch}, {args.shape[0]}x{args.shape[1]}'
    if args.fused_focal_loss:
        title += ', fused focal loss'
    for row in rows:
        row['fused_focal_loss'], row['sizes_only'] = args.fused_focal_loss, args.sizes_only
    CONSOLE.print(*tables(rows, title), sep='\n')
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2))
    if args.picture:
        draw(args.picture, [one.name for one in args.asked], memories, title)
    return rows


def main() -> None:
    args = parse_args()
    with errors_end_the_program():
        run(args)


if __name__ == '__main__':
    main()
