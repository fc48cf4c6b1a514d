"""Train a small detector end to end and by MAN++ on generated images, and compare accuracy, memory and time: ``make demo``.

It takes minutes on two idle CPU cores. All of the comparison is one picture, ``work_dirs/demo/demo.png``: the table, learning
curves, the memory over a training step, and the boxes that both detectors find in validation images.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.device import get_device
from rich.console import Console
from rich.table import Table

import mmman  # noqa: F401  registers its parts, and lets torch.load read mmengine's checkpoints
from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.scalars import read_scalars
from mmman.analysis.training import Memory, StepMeter
from mmman.datasets import write_shapes_dataset
from mmman.memory.detection.focal_loss import fused_focal_loss

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / 'data' / 'demo'
WORK = ROOT / 'work_dirs' / 'demo'
TRAIN = ROOT / 'tools' / 'train.py'
CONFIGS = {
    'end to end': ROOT / 'configs' / 'demo' / 'retinanet_r18_e2e_shapes.py',
    'MAN++, K=2': ROOT / 'configs' / 'demo' / 'retinanet_r18_manpp_k2_shapes.py',
}
TITLE = 'RetinaNet-R18 at a quarter of its width, from scratch, generated shapes'
COLUMNS = ('AP', 'AP50', 'peak memory of a step', 'time of a step')
ROUNDS = 7
PICTURES = 6
MIN_SCORE = 0.5
Image = np.ndarray


@dataclass
class Result:
    """What a training is compared by: AP and AP50 on validation images, MB, seconds."""

    mean_ap: float
    ap50: float
    peak_mb: float
    seconds: float


def train(config: Path, folder: Path) -> None:
    """Train in a process of its own."""
    if subprocess.run([sys.executable, TRAIN, config, '--work-dir', folder]).returncode:
        raise SystemExit(f'{TRAIN.relative_to(ROOT)} failed; its messages are above')


def build_meters() -> list[StepMeter]:
    """A meter of training steps for each config, on one batch of random images."""
    meters = []
    for config in CONFIGS.values():
        cfg = Config.fromfile(config)
        width, height = cfg.scale
        model, optim_wrapper = build_dummy_model(cfg, height, width)
        model.to(get_device())
        data = random_batch(model, cfg.default_scope, cfg.train_dataloader.batch_size, height, width)
        meters.append(StepMeter(model, optim_wrapper, data))
    return meters


def measure() -> tuple[list[Memory], list[float]]:
    """Of one step of each config: live bytes, with the memory of a GPU's focal loss, and the median seconds, taken by turns."""
    meters = build_meters()
    rounds = [[meter.seconds() for meter in meters] for _ in range(ROUNDS)]
    with fused_focal_loss():
        memories = [meter.memory() for meter in meters]
    return memories, [*map(statistics.median, zip(*rounds, strict=True))]


def predictions(config: Path, checkpoint: str, files: list[str]) -> tuple[dict, list]:
    """The metainfo of a dataset, and what a trained detector finds in images, with ``bboxes``, ``labels`` and ``scores``."""
    model = init_detector(str(config), checkpoint, device=get_device())
    return model.dataset_meta, [sample.pred_instances.cpu().numpy() for sample in inference_detector(model, files)]


def draw_box(image: Image, box: np.ndarray, colour: tuple[int, ...], text: str) -> None:
    """Draw a box, (4,) as left, top, right, bottom, on an image in BGR."""
    left, top, right, bottom = box.round().astype(int).tolist()
    cv2.rectangle(image, (left, top), (right, bottom), colour, 2)
    cv2.putText(image, text, (left + 3, top + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)


def draw_images(folders: dict[str, Path]) -> dict[str, Image]:
    """A row of validation images with the true boxes, and one for each method with those that it finds. RGB, by name."""
    coco = json.loads((DATA / 'annotations' / 'instances_val.json').read_text())
    images = coco['images'][:PICTURES]
    files = [str(DATA / 'val' / image['file_name']) for image in images]
    rows = {name: [cv2.imread(file) for file in files] for name in ('true boxes', *folders)}
    for name, folder in folders.items():
        meta, found = predictions(CONFIGS[name], (folder / 'last_checkpoint').read_text(), files)
        names, colours = meta['classes'], [colour[::-1] for colour in meta['palette']]
        for image, boxes in zip(rows[name], found, strict=True):
            for box, label, score in zip(boxes.bboxes, boxes.labels, boxes.scores, strict=True):
                if score >= MIN_SCORE:
                    draw_box(image, box, colours[label], f'{names[label]} {score:.2f}')
    of_image = {image['id']: row for image, row in zip(images, rows['true boxes'], strict=True)}
    for truth in coco['annotations']:
        if truth['image_id'] in of_image:
            x, y, width, height = truth['bbox']
            label = truth['category_id'] - 1
            draw_box(of_image[truth['image_id']], np.array([x, y, x + width, y + height]), colours[label], names[label])
    return {name: np.hstack(row)[..., ::-1] for name, row in rows.items()}


def table_rows(results: dict[str, Result]) -> list[tuple[str, ...]]:
    """The cells of the table, the last row being the second method over the first."""
    rows = [
        (name, f'{one.mean_ap:.3f}', f'{one.ap50:.3f}', f'{one.peak_mb:.1f} MB', f'{one.seconds:.3f} s')
        for name, one in results.items()
    ]
    (first, base), (second, other) = results.items()
    ratios = (f'{b / a:.2f}' if a else '-' for a, b in zip(astuple(base), astuple(other), strict=True))
    return [*rows, (f'{second} / {first}', *ratios)]


def draw_curves(axes: Axes, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker='o', label=name)
    axes.set(title='AP on validation images', xlabel='iteration', ylim=(0, None))
    axes.legend()


def draw_memory(axes: Axes, memories: dict[str, Memory]) -> None:
    for name, memory in memories.items():
        alive = sum(memory.curves.values()) / 1e6
        axes.fill_between(np.linspace(0, 1, len(alive)), alive, alpha=0.6, label=name)
    axes.set(title='memory over one training step, MB', xlabel='part of the step, in allocations and releases', ylim=(0, None))
    axes.legend()


def draw_page(
    path: Path,
    rows: list[tuple[str, ...]],
    curves: dict[str, list[tuple[int, float]]],
    memories: dict[str, Memory],
    images: dict[str, Image],
) -> None:
    """All of the comparison in one picture."""
    figure = Figure(figsize=(12, 13), layout='constrained')
    figure.suptitle(TITLE)
    top, middle, bottom = figure.subfigures(3, height_ratios=(1, 3, 7))
    axes = top.subplots()
    axes.axis('off')
    axes.table(rows, colLabels=('', *COLUMNS), loc='center', cellLoc='center').scale(1, 1.5)
    left, right = middle.subplots(1, 2)
    draw_curves(left, curves)
    draw_memory(right, memories)
    for axes, (name, image) in zip(bottom.subplots(len(images)), images.items(), strict=True):
        axes.imshow(image)
        axes.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    os.chdir(ROOT)
    console = Console()
    console.print(f'Images are generated in {DATA.relative_to(ROOT)} (once), then two detectors are trained in minutes.')
    write_shapes_dataset(DATA)
    folders = {name: WORK / config.stem for name, config in CONFIGS.items()}
    for name, config in CONFIGS.items():
        console.rule(name)
        train(config, folders[name])
    console.rule('results')
    measured, seconds = measure()
    memories = dict(zip(CONFIGS, measured, strict=True))
    scalars = {name: read_scalars(folder) for name, folder in folders.items()}
    scores = {name: [one[key][-1][1] for key in ('coco/bbox_mAP', 'coco/bbox_mAP_50')] for name, one in scalars.items()}
    results = {name: Result(*scores[name], memories[name].peak / 1e6, own) for name, own in zip(CONFIGS, seconds, strict=True)}
    rows = table_rows(results)
    table = Table(*('', *COLUMNS), title=TITLE)
    for row in rows:
        table.add_row(*row, end_section=row is rows[-2])
    console.print(table)
    page = WORK / 'demo.png'
    draw_page(page, rows, {name: one['coco/bbox_mAP'] for name, one in scalars.items()}, memories, draw_images(folders))
    console.print(f'{page.relative_to(ROOT)}: the table, learning curves, memory over a step, and boxes that were found.')


if __name__ == '__main__':
    main()
