"""Predict what the ways to train cost for the models that people use: peak memory, FLOPs and launches, relative to stock.

    python tools/benchmarks/memory_table.py --list
    python tools/benchmarks/memory_table.py --batch stock 1 8
    python tools/benchmarks/memory_table.py retinanet_r50 mask_rcnn_r50 --batch 2 --shape 416 640 --check

Every row of the table is what ``mmman fit`` predicts for a stock config: as shipped, with the backbone's own ``with_cp``, in
mixed precision, by mmman's options that train the same with the smallest peak, by chunks of images where they train as on more
GPUs, and by MAN++ with the smallest peak for at most ``--max-overhead`` more FLOPs than as shipped.

Nothing runs at the size of the table, so no GPU is needed; a model takes minutes. Each is kept as a JSON file in
``--work-dir``, and the same command goes on where it was interrupted. ``table.md`` has what the command asked for.
``--check`` measures a step as shipped and one by MAN++, as ``mmman fit --check`` does.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mmman  # noqa: F401  registers what the configs name
from mmman.messages import one_line
from mmman.planning.choice import AS_IT_IS, BY_CHUNK, LOCAL, SAME, WITH_CP, FitRow, Limits
from mmman.runtime.fit_config import ConfigFit

MIXED = 'mixed precision'
COLUMNS = (
    'model',
    'images of HxW',
    'stock as shipped',
    '`with_cp`',
    'mixed precision',
    'trains the same',
    'as on more GPUs',
    'MAN++',
    'cut after',
)
CUTS = re.compile(r'cut after (.*?)(?:, recompute|, \d+ images? a chunk|$)')


@dataclass(frozen=True)
class Model:
    """A stock config, and options that make a depth of it that no library ships."""

    config: str
    options: dict = field(default_factory=dict)


def _detectors() -> dict[str, Model]:
    found = {
        'retinanet_r18': Model('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'),
        'retinanet_r34': Model('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', {'model': {'backbone': {'depth': 34}}}),
        'retinanet_r50': Model('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
        'retinanet_r101': Model('mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'),
        'retinanet_r152': Model('mmdet::retinanet/retinanet_r101_fpn_1x_coco.py', {'model': {'backbone': {'depth': 152}}}),
        'fcos_r50': Model('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
        'atss_r50': Model('mmdet::atss/atss_r50_fpn_1x_coco.py'),
    }
    for kind in ('faster', 'mask', 'cascade'):
        for name, backbone in (('r50', 'r50'), ('r101', 'r101'), ('x101', 'x101-32x4d')):
            found[f'{kind}_rcnn_{name}'] = Model(f'mmdet::{kind}_rcnn/{kind}-rcnn_{backbone}_fpn_1x_coco.py')
    return found | {
        'mask_rcnn_swin-t': Model('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
        'deformable_detr_r50': Model('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'),
        'dino_r50': Model('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'),
    }


MODELS = _detectors() | {
    'deeplabv3_r50': Model('mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'deeplabv3plus_r50': Model('mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py'),
    'deeplabv3plus_r101': Model('mmseg::deeplabv3plus/deeplabv3plus_r101-d8_4xb2-40k_cityscapes-512x1024.py'),
    'upernet_swin-t': Model('mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'),
    'resnet50': Model('mmpretrain::resnet/resnet50_8xb32_in1k.py'),
    'resnet101': Model('mmpretrain::resnet/resnet101_8xb32_in1k.py'),
    'resnet152': Model('mmpretrain::resnet/resnet152_8xb32_in1k.py'),
    'vit-b': Model('mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py'),
    'swin-t': Model('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'),
    'convnext-t': Model('mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'),
}


@dataclass(frozen=True)
class Cost:
    """A predicted row: what it is called, how it trains, and its peak (bytes), FLOPs and launches; peak 0 if not predicted."""

    name: str
    trains: str
    peak: int
    flops: int
    operators: int
    note: str

    @classmethod
    def of(cls, row: FitRow) -> Cost:
        peak = 0 if row.peak is None or not row.is_available else row.peak.total
        return cls(row.name, row.trains, peak, row.flops, row.operators, row.note)


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        model: The key of :data:`MODELS`.
        batch, height, width: Images per step and their size, pixels.
        costs: What was predicted.
        measured: Peak bytes measured by ``--check``, by the name of the row.
        obstacle: Why nothing could be predicted.
    """

    model: str
    batch: int = 0
    height: int = 0
    width: int = 0
    costs: tuple[Cost, ...] = ()
    measured: dict[str, int] = field(default_factory=dict)
    obstacle: str = ''

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix('.part').write_text(json.dumps(asdict(self), indent=1), encoding='utf-8')
        path.with_suffix('.part').replace(path)

    @classmethod
    def read(cls, path: Path) -> Entry:
        stored = json.loads(path.read_text(encoding='utf-8'))
        return cls(**{**stored, 'costs': tuple(Cost(**cost) for cost in stored['costs'])})

    def columns(self) -> list[Cost | None]:
        """As shipped; ``with_cp``; mixed precision; exact options; chunks that train as on more GPUs; MAN++."""
        exact = (cost for cost in self.costs if cost.trains == SAME and cost.name not in (AS_IT_IS, WITH_CP))
        return [
            *(next((cost for cost in self.costs if cost.name.startswith(name)), None) for name in (AS_IT_IS, WITH_CP, MIXED)),
            _smallest(exact),
            *(_smallest(cost for cost in self.costs if cost.trains == kind) for kind in (BY_CHUNK, LOCAL)),
        ]


def _smallest(costs: Iterable[Cost]) -> Cost | None:
    return min((cost for cost in costs if cost.peak), key=lambda cost: cost.peak, default=None)


def predict(name: str, batch: int | None, shape: tuple[int, int] | None, limits: Limits, folder: Path, check: bool) -> Entry:
    """Predict, and perhaps measure, the rows of one model."""
    model = MODELS[name]
    config = model.config
    if model.options:
        config = folder / f'{name}.py'
        config.write_text(f'_base_ = {model.config!r}\n' + ''.join(f'{k} = {v!r}\n' for k, v in model.options.items()))
    try:
        fit = ConfigFit.of(str(config), batch=batch, shape=shape)
        rows = [*fit.rows(limits)]
    except Exception as error:  # the table goes on with the next model
        return Entry(name, obstacle=one_line(f'{type(error).__name__}: {error}'))
    entry = Entry(name, *fit.case.shape, tuple(map(Cost.of, rows)))
    if check:
        chosen = {rows[0].name, *(cost.name for cost in entry.columns() if cost and cost.trains == LOCAL)}
        for row in rows:
            if row.name in chosen:
                entry.measured[row.name] = fit.measured_peak(fit.text(row, rows[0]))[0]
    return entry


def markdown(entries: Iterable[Entry]) -> str:
    """The table: peaks relative to stock as shipped, FLOPs relative to it, and launches as a multiple of it."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|---' * len(COLUMNS) + '|']
    off = []
    for entry in entries:
        if entry.obstacle:
            lines.append(f'| {entry.model} | {entry.obstacle} | | | | | | | |')
            continue
        stock, *others = entry.columns()
        local = others[-1]
        cuts = CUTS.search(local.name)[1] if local else ''
        lines.append(
            f'| {entry.model} | {entry.batch} of {entry.height}x{entry.width} '
            f'| {stock.peak / 1e6:,.0f} MB, {stock.flops / 1e12:.2f} T, {stock.operators:,} | '
            + ' | '.join(_relative(cost, stock) for cost in others)
            + f' | {cuts} |'
        )
        by_name = {cost.name: cost for cost in entry.costs}
        off += [(entry, name, by_name[name].peak / peak - 1) for name, peak in entry.measured.items()]
    if off:
        lines += ['', '| model | row | predicted to measured |', '|---|---|---|']
        lines += [f'| {entry.model} | {name} | {error:+.1%} |' for entry, name, error in off]
    return '\n'.join(lines) + '\n'


def _relative(cost: Cost | None, stock: Cost) -> str:
    if cost is None or not cost.peak:
        return '-'
    return f'{cost.peak / stock.peak - 1:+.0%} / {cost.flops / stock.flops - 1:+.0%} / {cost.operators / stock.operators:.1f}x'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n\n')[0],
        epilog=__doc__.partition('\n\n')[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('models', nargs='*', metavar='MODEL', help='default: all of --list')
    parser.add_argument('--list', action='store_true', help='print the models and their configs')
    parser.add_argument('--batch', nargs='+', default=['stock'], help="images per step and GPU; 'stock': the config's own")
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help="pixels; default: the config's own")
    parser.add_argument('--max-overhead', type=float, default=0.15, help='FLOPs of the MAN++ row above those as shipped')
    parser.add_argument('--check', action='store_true', help='measure a step as shipped and one by MAN++')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/memory_table'))
    args = parser.parse_args()
    console = Console(width=128)
    if args.list:
        for name, model in MODELS.items():
            console.print(f'{name:22}{model.config} {model.options or ""}', highlight=False, soft_wrap=True)
        return
    if unknown := set(args.models) - MODELS.keys():
        parser.error(f'unknown models {sorted(unknown)}: see --list')
    if any(not (text == 'stock' or (text.isdecimal() and int(text))) for text in args.batch):
        parser.error(f"--batch {' '.join(args.batch)}: give integers of at least 1, or 'stock'")
    if args.shape and min(args.shape) < 1:
        parser.error(f'--shape {args.shape[0]} {args.shape[1]}: give pixels')
    if not args.max_overhead >= 0:
        parser.error(f'--max-overhead {args.max_overhead}: give at least 0')
    MMLogger.get_instance('memory_table', log_level='ERROR')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    size = 'x'.join(map(str, args.shape)) if args.shape else 'stock'
    asked = [(name, batch) for batch in args.batch for name in args.models or MODELS]
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    entries = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task('', total=len(asked))
        for name, batch in asked:
            progress.update(task, description=f'{name}, batch {batch}')
            path = args.work_dir / f'{name}_batch_{batch}_size_{size}_overhead_{args.max_overhead}.json'
            known = Entry.read(path) if path.exists() else None
            if known is None or known.obstacle or (args.check and not known.measured):
                number, shape = None if batch == 'stock' else int(batch), tuple(args.shape) if args.shape else None
                limits = Limits(overhead=args.max_overhead)
                predict(name, number, shape, limits, args.work_dir, args.check).write(path)
            entries.append(Entry.read(path))
            progress.advance(task)
    text = markdown(entries)
    (args.work_dir / 'table.md').write_text(text, encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
