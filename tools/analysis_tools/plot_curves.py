"""Training and validation curves of several runs, and the local losses and scales of their blocks, in one picture.

    python tools/analysis_tools/plot_curves.py E2E MANPP --picture curves.png
    python tools/analysis_tools/plot_curves.py E2E MANPP --metrics loss coco/bbox_mAP --picture curves.png

E2E and MANPP are work folders. The curves are mmengine's own scalars, which LocalVisBackend writes by default; a resumed run
continues its curve. By default the picture has the task loss and the first validation metric of each run, then loss, scale s_j,
gradient norm, dead channels and distance of the momentum copy by block, as far as a run logged them (mmman.LocalInspectorHook
logs the last three).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mmman.analysis.scalars import by_block, read_scalars
from mmman.errors import ConfigError
from mmman.messages import errors_end_the_program

CONSOLE = Console(width=140)
BY_BLOCK = {
    'loss': 'local loss',
    's': 'scale s',
    'gradient': 'gradient norm',
    'grad_norm': 'gradient norm before clipping',
    'dead': 'share of dead channels',
    'distance': 'distance of the copy',
}
Curves = dict[str, list[tuple[int, float]]]


def default_metrics(runs: dict[str, Curves]) -> list[str]:
    """The loss, and the first validation metric of each run: the names with a dataset's prefix (``coco/bbox_mAP``)."""
    firsts = (next((name for name in curves if '/' in name and 'local/' not in name), None) for curves in runs.values())
    return [*dict.fromkeys(name for name in ('loss', *firsts) if name is not None)]


def table_of(runs: dict[str, Curves], metrics: list[str]) -> Table:
    """The last value of every curve in the upper panels."""
    table = Table(title='last values')
    table.add_column('run')
    for name in metrics:
        table.add_column(name, justify='right')
    for name, curves in runs.items():
        table.add_row(name, *(f'{curves[key][-1][1]:.4f} at {curves[key][-1][0]}' if key in curves else '' for key in metrics))
    return table


def draw(path: Path, runs: dict[str, Curves], metrics: list[str]) -> None:
    """A panel a metric, then one for each kind of value by block: one colour a run, lighter lines for earlier blocks."""
    kinds = [kind for kind in BY_BLOCK if any(by_block(curves, kind) for curves in runs.values())]
    count = len(metrics) + len(kinds)
    figure = Figure(figsize=(10, 2.7 * -(-count // 2)), layout='constrained')
    panels = figure.subplots(-(-count // 2), 2, squeeze=False).flatten()
    colours = mpl.colormaps['tab10']
    for axes, name in zip(panels, metrics, strict=False):
        for i, (run, curves) in enumerate(runs.items()):
            if name in curves:
                axes.plot(*zip(*curves[name], strict=True), '.-', color=colours(i % 10), label=run)
        axes.set_title(name, fontsize='medium')
    for axes, kind in zip(panels[len(metrics) :], kinds, strict=False):
        for i, (run, curves) in enumerate(runs.items()):
            blocks = by_block(curves, kind)
            for j, curve in blocks.items():
                style = {'color': colours(i % 10), 'alpha': 0.3 + 0.7 * j / max(blocks)}
                axes.plot(*zip(*curve, strict=True), label=f'{run}, block {j}', **style)
        axes.set_title(BY_BLOCK[kind], fontsize='medium')
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
        axes.legend(fontsize='x-small')
        axes.set_xlabel('iteration', fontsize='small')
    for axes in panels[count:]:
        axes.axis('off')
    figure.savefig(path, dpi=80)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument('--names', nargs='+', metavar='NAME', help='what to call the runs, one name for each')
    parser.add_argument('--metrics', nargs='+', metavar='NAME', help='scalars of the upper panels')
    parser.add_argument('--picture', type=Path, metavar='PNG', help='draw the curves')
    parser.add_argument('--out', type=Path, metavar='JSON', help='also write all curves: pairs (iteration, value)')
    return parser.parse_args(args)


def run(args: argparse.Namespace) -> dict[str, Curves]:
    """Read, print, write what was asked for. Returns what ``--out`` writes: curves by run and name."""
    names = args.names or ['/'.join(path.absolute().parts[-2:]) for path in args.work_dirs]
    if len({*names}) != len(args.work_dirs):
        raise ConfigError(f'{len(args.work_dirs)} runs need as many different names: set --names, one for each')
    runs = {name: read_scalars(path) for name, path in zip(names, args.work_dirs, strict=True)}
    metrics = args.metrics or default_metrics(runs)
    known = {name for curves in runs.values() for name in curves}
    if missing := [name for name in metrics if name not in known]:
        raise ConfigError(f'--metrics {missing[0]}: no run logged it; there are {", ".join(sorted(known))}')
    CONSOLE.print(table_of(runs, metrics))
    if args.out:
        args.out.write_text(json.dumps(runs, indent=2))
    if args.picture:
        draw(args.picture, runs, metrics)
    return runs


def main() -> None:
    args = parse_args()
    with errors_end_the_program():
        run(args)


if __name__ == '__main__':
    main()
