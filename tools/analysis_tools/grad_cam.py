"""Grad-CAM: which places of the image a unit's features speak for a class in, for several trained models side by side.

    python tools/analysis_tools/grad_cam.py E2E MANPP --unit layer2.1 --images 3 --picture grad_cam.png

The models are work folders or checkpoints of classifiers or detectors; the images are drawn from the first config's
val_dataloader. What is explained is a classifier's logit of --class (by default the class that it predicts), or the sum of
the probabilities above 0.3 that a detector gives --class (by default every class), before non-maximum suppression. A map is
bright where the unit raises this score most; each has a scale of its own, so brightness doesn't compare models. Selvaraju et
al. (2017).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

import mmman  # noqa: F401  registers what the configs name
from mmman.analysis.grad_cam import class_score, grad_cam
from mmman.errors import ConfigError
from mmman.messages import errors_end_the_program
from mmman.partition import chain_of, measure
from mmman.runtime.trained_model import TrainedModel, add_model_arguments, load_models, preprocess


def maps_of(models: list[TrainedModel], unit: str | None, label: int | None, images: int) -> list[tuple[Tensor, list[Tensor]]]:
    """For each image, the image (H, W, 3) from 0 to 1, and the map (H, W) of each model."""
    units = [_unit(one, unit) for one in models]
    found = []
    batches = models[0].batches(images, 1)
    for batch in track(batches, 'images', images, console=Console(stderr=True), transient=True):
        maps = []
        for one, (chosen, shape) in zip(models, units, strict=True):
            data = preprocess(one.model, batch)
            inputs, samples = data['inputs'], data['data_samples']
            maps.append(
                grad_cam(
                    one.model.backbone,
                    chosen,
                    shape,
                    inputs,
                    lambda x, one=one, samples=samples: class_score(one.model, x, samples, label),
                )[0].cpu()
            )
        image = preprocess(models[0].model, batch)['inputs'][0].permute(1, 2, 0).cpu()
        low, high = image.amin(), image.amax()
        found.append(((image - low) / (high - low), maps))
    return found


def _unit(one: TrainedModel, name: str | None) -> tuple:
    """A unit of a model, by default the last, and the shape of its output."""
    chain = chain_of(one.model.backbone)
    names = [unit.name for unit in chain.units]
    if name is not None and name not in names:
        raise ConfigError(f'--unit {name}: {one.name} has no such unit, but {", ".join(names)}')
    index = len(names) - 1 if name is None else names.index(name)
    return chain.units[index], measure(one.model.backbone, chain).features[index]


def draw(path: Path, rows: list[tuple[Tensor, list[Tensor]]], names: list[str], title: str) -> None:
    """A grid of images and models."""
    height, width = rows[0][0].shape[:2]
    columns = 1 + len(names)
    figure = Figure(figsize=(2.4 * columns, 0.4 + 2.4 * height / width * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (image, maps) in zip(grid, rows, strict=True):
        line[0].imshow(image.numpy())
        for axes, one in zip(line[1:], maps, strict=True):
            axes.imshow(image.mean(2).numpy(), cmap='gray')
            axes.imshow(one.numpy(), cmap='inferno', alpha=0.6, vmin=0, vmax=1)
    for axes, name in zip(grid[0], ['image', *names], strict=True):
        axes.set_title(name, fontsize='small')
    for axes in grid.flat:
        axes.axis('off')
    figure.suptitle(title, fontsize='medium')
    figure.savefig(path, dpi=80)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, '+', images=4, batch_size=None, has_numbers=False)
    parser.add_argument('--unit', help='for example layer2.1; default: the last unit')
    parser.add_argument('--class', type=int, dest='label', metavar='INDEX', help='from 0; default: see above')
    parser.add_argument('--picture', type=Path, required=True, metavar='PNG', help='where to write the grid')
    return parser.parse_args(args)


def run(args: argparse.Namespace) -> list[tuple[Tensor, list[Tensor]]]:
    """Compute the maps and draw them."""
    models = load_models(args)
    rows = maps_of(models, args.unit, args.label, args.images)
    draw(args.picture, rows, [one.name for one in models], f'Grad-CAM of {args.unit or "the last unit"}')
    print(args.picture)
    return rows


def main() -> None:
    args = parse_args()
    with errors_end_the_program():
        run(args)


if __name__ == '__main__':
    main()
