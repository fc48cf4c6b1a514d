"""Train a small detector end to end and by MAN++ on generated images, and compare accuracy, memory and time: ``make demo``.

About five minutes on two CPU cores. It shows how the two differ and that both learn, not how well they do on real data.
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
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.device import get_device
from rich.console import Console
from rich.table import Table

import mmman  # noqa: F401  registers its parts, and lets torch.load read mmengine's checkpoints
from mmman.datasets import write_shapes_dataset

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / 'data' / 'demo'
WORK = ROOT / 'work_dirs' / 'demo'
CONFIGS = {
    'E2E': ROOT / 'configs' / 'demo' / 'retinanet_r18_e2e_shapes.py',
    'MAN++ K=4': ROOT / 'configs' / 'demo' / 'retinanet_r18_manpp_k4_shapes.py',
}
PICTURES = 6
MIN_SCORE = 0.5


@dataclass
class Result:
    """What a run is compared by."""

    mean_ap: float
    ap50: float
    seconds: float
    peak_mb: float


def run(script: Path, *args: object, **options) -> None:
    """Run a script of this repository in a process of its own."""
    if subprocess.run([sys.executable, script, *map(str, args)], **options).returncode:
        raise SystemExit(f'{script.relative_to(ROOT)} failed; its messages are above')


def read_scalars(folder: Path) -> tuple[float, float, float]:
    """The last mAP and AP50 of the newest run in a work folder, and its median seconds per iteration."""
    path = max(folder.glob('*/vis_data/scalars.json'))
    scalars = [json.loads(line) for line in path.read_text().splitlines()]
    score = [entry for entry in scalars if 'coco/bbox_mAP' in entry][-1]
    seconds = statistics.median(entry['time'] for entry in scalars if 'loss' in entry)
    return score['coco/bbox_mAP'], score['coco/bbox_mAP_50'], seconds


def peak_bytes() -> list[int]:
    """The most bytes alive during one training step of each config, counted on the CPU, everything included."""
    path = WORK / 'training_step.json'
    cfg = Config.fromfile(CONFIGS['E2E'])
    tool = ROOT / 'tools' / 'analysis_tools' / 'measure_training.py'
    sizes = ('--shape', *cfg.scale, '--batch', cfg.train_dataloader.batch_size, '--iterations', 0)
    run(tool, *CONFIGS.values(), *sizes, '--out', path, stdout=subprocess.DEVNULL)
    return [row['peak'] for row in json.loads(path.read_text())]


def draw_predictions(config: Path, checkpoint: str, path: Path) -> None:
    """Draw a few validation images: the true boxes, and below them those that the trained detector finds."""
    coco = json.loads((DATA / 'annotations' / 'instances_val.json').read_text())
    files = [str(DATA / 'val' / image['file_name']) for image in coco['images'][:PICTURES]]
    model = init_detector(str(config), checkpoint, device=get_device())
    found = [sample.pred_instances.cpu().numpy() for sample in inference_detector(model, files)]
    names, palette = model.dataset_meta['classes'], model.dataset_meta['palette']

    def draw(image: np.ndarray, box: np.ndarray, label: int, text: str) -> None:
        left, top, right, bottom = box.round().astype(int).tolist()
        colour = palette[label][::-1]
        cv2.rectangle(image, (left, top), (right, bottom), colour, 2)
        cv2.putText(image, text, (left + 3, top + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)

    truth_row, found_row = ([cv2.imread(file) for file in files] for _ in range(2))
    for truth in coco['annotations']:
        if truth['image_id'] <= PICTURES:
            x, y, width, height = truth['bbox']
            label = truth['category_id'] - 1
            draw(truth_row[truth['image_id'] - 1], np.array([x, y, x + width, y + height]), label, names[label])
    for image, boxes in zip(found_row, found, strict=True):
        for box, label, score in zip(boxes.bboxes, boxes.labels, boxes.scores, strict=True):
            if score >= MIN_SCORE:
                draw(image, box, label, f'{names[label]} {score:.2f}')
    cv2.imwrite(str(path), np.vstack([np.hstack(truth_row), np.hstack(found_row)]))


def compare(results: dict[str, Result]) -> Table:
    """A table of the results, the last line being the second method over the first."""
    table = Table(title='RetinaNet-R18 at a quarter of its width, from scratch, generated shapes')
    for column in ('method', 'mAP', 'AP50', 'time per iteration', 'peak memory of a step'):
        table.add_column(column, justify='left' if column == 'method' else 'right')
    for name, result in results.items():
        row = f'{result.mean_ap:.3f}', f'{result.ap50:.3f}', f'{result.seconds:.3f} s', f'{result.peak_mb:.0f} MB'
        table.add_row(name, *row)
    (first, base), (second, other) = results.items()
    ratios = [f'{b / a:.2f}' if a else '-' for a, b in zip(astuple(base), astuple(other), strict=True)]
    table.add_section()
    table.add_row(f'{second} / {first}', *ratios)
    return table


def main() -> None:
    os.chdir(ROOT)
    console = Console()
    console.print(
        f'Images of shapes are written to {DATA.relative_to(ROOT)} (once), then two trainings take about five minutes.'
    )
    write_shapes_dataset(DATA)
    folders = {name: WORK / config.stem for name, config in CONFIGS.items()}
    for name, config in CONFIGS.items():
        console.rule(name)
        run(ROOT / 'tools' / 'train.py', config, '--work-dir', folders[name])
    console.rule('results')
    peaks = dict(zip(CONFIGS, peak_bytes(), strict=True))
    console.print(compare({name: Result(*read_scalars(folders[name]), peaks[name] / 1e6) for name in CONFIGS}))
    picture, (name, config) = WORK / 'predictions.png', [*CONFIGS.items()][-1]
    draw_predictions(config, (folders[name] / 'last_checkpoint').read_text(), picture)
    console.print(f'{picture.relative_to(ROOT)}: true boxes above, those that {name} finds below.')


if __name__ == '__main__':
    main()
