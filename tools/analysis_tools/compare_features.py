"""How similar the features of two trained models are, unit by unit: linear CKA over validation images.

    python tools/analysis_tools/compare_features.py E2E MANPP --picture cka.png --out cka.json

E2E and MANPP are work folders or checkpoints; their backbones may differ. CKA is 1 for features that are equal up to a
rotation and a factor, and near 0 for unrelated ones (Nguyen et al. 2021, with the unbiased HSIC of Song et al. 2012 on
batches). Where the images differ mostly in colour or brightness, so do all features, and CKA is high for any two networks:
compare with the column of the image itself. Both models see the images of the first config's val_dataloader, each normalised
as its own config says; images of different sizes are padded to the largest of a batch. Local heads don't matter here: a
trained backbone doesn't use them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mmman  # noqa: F401  registers what the configs name
from mmman.analysis.cka import MIN_BATCH, MinibatchCKA, u_centred_gram
from mmman.analysis.unit_outputs import unit_outputs
from mmman.errors import ConfigError
from mmman.messages import errors_end_the_program
from mmman.partition import chain_of
from mmman.runtime.trained_model import TrainedModel, add_model_arguments, load_models, preprocess

CONSOLE = Console(width=140)
IMAGE = 'the image'


@torch.no_grad()
def compare(first: TrainedModel, second: TrainedModel, images: int, batch_size: int) -> tuple[Tensor, list[str], list[str]]:
    """CKA (units of the first and the image, units of the second and the image), and the names of rows and columns."""
    chains = [chain_of(one.model.backbone).units for one in (first, second)]
    cka = MinibatchCKA()
    batches = first.batches(images, batch_size)
    for batch in track(batches, 'images', images // batch_size, console=Console(stderr=True), transient=True):
        grams = []
        for one, units in zip((first, second), chains, strict=True):
            with unit_outputs(one.model.backbone, units, lambda _, output: u_centred_gram(output)) as found:
                inputs = preprocess(one.model, batch)['inputs']
                one.model.backbone(inputs)
            grams.append([*found.values(), u_centred_gram(inputs)])
        cka.update_grams(*grams)
    return cka.value(), *([*(unit.name for unit in units), IMAGE] for units in chains)


def table_of(cka: Tensor, rows: list[str], columns: list[str], title: str) -> Table:
    """For each unit of the first model: the same unit of the second, if there is one, the most similar one, and the image."""
    table = Table(title=title)
    for name in ('unit', 'same unit', 'most similar unit', 'its CKA', IMAGE):
        table.add_column(name, justify='left' if name in ('unit', 'most similar unit') else 'right')
    for name, values in zip(rows[:-1], cka, strict=False):
        same = f'{values[columns.index(name)]:.3f}' if name in columns else ''
        best = int(values[:-1].nan_to_num(-1).argmax())
        table.add_row(name, same, columns[best], f'{values[best]:.3f}', f'{values[-1]:.3f}')
    return table


def draw(path: Path, cka: Tensor, rows: list[str], columns: list[str], names: list[str]) -> None:
    """A heat map."""
    figure = Figure(figsize=(2.2 + 0.3 * len(columns), 1.6 + 0.3 * len(rows)), layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(cka.numpy(), vmin=0, vmax=1, cmap='magma', origin='lower')
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize='small')
    axes.set_yticks(range(len(rows)), rows, fontsize='small')
    axes.set(xlabel=names[1], ylabel=names[0])
    figure.colorbar(image, label='linear CKA')
    figure.savefig(path, dpi=100)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, 2, images=256, batch_size=16)
    parser.add_argument('--picture', type=Path, metavar='PNG', help='also draw a heat map')
    return parser.parse_args(args)


def run(args: argparse.Namespace) -> dict:
    """Compare, print, write what was asked for. Returns what ``--out`` writes."""
    if args.batch_size < MIN_BATCH:
        raise ConfigError(f'--batch-size {args.batch_size}: the unbiased estimator needs at least {MIN_BATCH} images a batch')
    first, second = models = load_models(args)
    cka, rows, columns = compare(*models, args.images, args.batch_size)
    names = [one.name for one in models]
    CONSOLE.print(table_of(cka, rows, columns, f'linear CKA: {first.name} against {second.name}'))
    found = {'models': names, 'checkpoints': [str(one.checkpoint) for one in models], 'units': [rows, columns]}
    found |= {'images': args.images, 'batch_size': args.batch_size, 'cka': cka.tolist()}
    if args.out:
        args.out.write_text(json.dumps(found, indent=2))
    if args.picture:
        draw(args.picture, cka, rows, columns, names)
    return found


def main() -> None:
    args = parse_args()
    with errors_end_the_program():
        run(args)


if __name__ == '__main__':
    main()
