"""How well a linear classifier separates the classes on the frozen output of every unit, for several trained models.

    python tools/analysis_tools/linear_probe.py E2E MANPP --picture probe.png --out probe.json

The models are work folders or checkpoints. Each probe is fitted on one half of the validation images and tested on the other,
and the other way round: the models were trained on neither. What is classified are images (mmpretrain: features are pooled over
the image, or those of the class token), annotated objects (mmdet: pooled over the box) or pixels (mmseg). The balanced accuracy
is the mean over the classes: with rare classes it tells more.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mmman  # noqa: F401  registers what the configs name
from mmman.analysis.linear_probe import loads_boxes_after_resize, samples_of, separability
from mmman.analysis.unit_outputs import unit_outputs
from mmman.messages import errors_end_the_program
from mmman.partition import chain_of, measure
from mmman.runtime.trained_model import TrainedModel, add_model_arguments, load_models, preprocess

CONSOLE = Console(width=140)
METRICS = ('accuracy', 'balanced')


@torch.no_grad()
def features_of(one: TrainedModel, images: int, batch_size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Pooled features (N, C) by unit, labels (N,) and the index of each sample's image (N,)."""
    backbone = one.model.backbone
    chain = chain_of(backbone)
    shapes = dict(zip((unit.name for unit in chain.units), measure(backbone, chain).features, strict=True))
    are_scaled = not loads_boxes_after_resize(one.cfg.val_dataloader.dataset.get('pipeline') or ())
    features, labels, owners = {unit.name: [] for unit in chain.units}, [], []
    batches = track(
        one.batches(images, batch_size), one.name, images // batch_size, console=Console(stderr=True), transient=True
    )
    for number, batch in enumerate(batches):
        data = preprocess(one.model, batch)
        samples = samples_of(data['data_samples'], are_scaled, seed=number)
        size = data['inputs'].shape[-2:]

        def pool(name: str, output: Tensor, samples=samples, size=size) -> Tensor:
            return samples.pool(output, shapes[name], size).cpu()

        with unit_outputs(backbone, chain.units, pool) as pooled:
            backbone(data['inputs'])
        for name, values in pooled.items():
            features[name].append(values)
        labels.append(samples.labels.cpu())
        owners.append(samples.images.cpu() + number * batch_size)
    return {name: torch.cat(values) for name, values in features.items()}, torch.cat(labels), torch.cat(owners)


def probe(one: TrainedModel, images: int, batch_size: int) -> dict:
    """The result of one model, as ``--out`` writes it."""
    features, labels, owners = features_of(one, images, batch_size)
    fits = track(features.items(), f'{one.name}: probes', console=Console(stderr=True), transient=True)
    units = {name: asdict(separability(values, labels, owners)) for name, values in fits}
    counts = labels.bincount()
    return {
        'model': one.name,
        'checkpoint': str(one.checkpoint),
        'samples': len(labels),
        'largest_class': counts.max().item() / len(labels),
        'units': units,
    }


def table_of(rows: list[dict], metric: str) -> Table:
    table = Table(title=f'linear probe: {metric}{" accuracy" if metric == "balanced" else ""}, %')
    table.add_column('unit')
    for row in rows:
        table.add_column(row['model'], justify='right')
    for name in dict.fromkeys(name for row in rows for name in row['units']):
        cells = (row['units'].get(name) for row in rows)
        table.add_row(name, *(f'{100 * cell[metric]:.1f}' if cell else '' for cell in cells))
    return table


def draw(path: Path, rows: list[dict]) -> None:
    """Both accuracies over the units, one line a model."""
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        for row in rows:
            axes.plot([*row['units']], [100 * one[metric] for one in row['units'].values()], 'o-', label=row['model'])
        classless = 'largest_class' if metric == 'accuracy' else None
        if classless:
            axes.axhline(100 * rows[0][classless], color='grey', linestyle=':', label='the largest class')
        axes.set(title='accuracy' if metric == 'accuracy' else 'balanced accuracy', ylabel='%')
        axes.tick_params(axis='x', rotation=90)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize='small')
    figure.savefig(path, dpi=100)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, '+', images=2000, batch_size=8)
    parser.add_argument('--picture', type=Path, metavar='PNG', help='also draw the accuracies over the units')
    return parser.parse_args(args)


def run(args: argparse.Namespace) -> list[dict]:
    """Probe, print, write what was asked for. Returns what ``--out`` writes."""
    rows = [probe(one, args.images, args.batch_size) for one in load_models(args)]
    for metric in METRICS:
        CONSOLE.print(table_of(rows, metric))
    CONSOLE.print(f'{rows[0]["samples"]} samples; {100 * rows[0]["largest_class"]:.1f}% are of the largest class')
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2))
    if args.picture:
        draw(args.picture, rows)
    return rows


def main() -> None:
    args = parse_args()
    with errors_end_the_program():
        run(args)


if __name__ == '__main__':
    main()
