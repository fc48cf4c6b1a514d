"""Shapes: a detection dataset in COCO format, drawn in seconds, hard enough that a detector has to learn something.

Circles, rectangles and triangles of any colour and size lie on textured backgrounds, so that only the outline tells a class.
An image depends on the seed, its split, its index and its size alone: more images extend a split and change none of the others.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('circle', 'rectangle', 'triangle')
SPLITS = ('train', 'val')
VERSION = 1  # of the drawing below: raise it when the same arguments give other files

MAX_OBJECTS = 8
DIAMETERS = (0.1, 0.45)  # smallest and largest circumscribed circle, as a share of the image's side
MAX_TURN = np.pi / 12  # of rectangles and triangles, either way
MAX_HIDDEN = 0.2  # of the smaller one's area, where two objects overlap: none is ever mostly hidden
INTENSITIES = (30, 225)  # of the mean colours, which leaves room for noise around them
MIN_CONTRAST = 80.0  # Euclidean, between the mean colours of an object and of what it covers, 8-bit BGR
SUBPIXEL_BITS = 4  # of cv2's fixed-point coordinates


def write_shapes_dataset(
    root: str | os.PathLike, train_images: int = 800, val_images: int = 64, size: int = 256, seed: int = 0
) -> Path:
    """Write ``train/``, ``val/`` and ``annotations/instances_{train,val}.json`` below ``root``, for mmdet's ``CocoDataset``.

    The folder appears under its name only when it is complete. If it is there already, from the same arguments, nothing is
    done.

    Args:
        root: The folder to make.
        train_images: Number of training images.
        val_images: Number of validation images.
        size: Height and width of every image, in pixels.
        seed: Seed of everything that is drawn.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` holds something else, for example a dataset of another size.
    """
    root = Path(root)
    recipe = {'train_images': train_images, 'val_images': val_images, 'size': size, 'seed': seed, 'version': VERSION}
    if _is_written(root, recipe):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as scratch:
        work = Path(scratch, root.name)
        (work / 'annotations').mkdir(parents=True)
        for split, count in zip(SPLITS, (train_images, val_images), strict=True):
            coco = _write_split(work / split, count, size, (seed, SPLITS.index(split)))
            coco['info'] = {'description': f'generated shapes, {split}', 'recipe': recipe}
            (work / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
        try:
            os.replace(work, root)
        except OSError:  # a folder that is not empty: another process was faster, or it is something else
            if not _is_written(root, recipe):
                raise
    return root


def _is_written(root: Path, recipe: dict[str, int]) -> bool:
    """Whether ``root`` holds the dataset of this recipe; raises if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        info = json.loads((root / 'annotations' / f'instances_{SPLITS[-1]}.json').read_text())['info']
    except (OSError, ValueError, KeyError):
        info = {}
    if info.get('recipe') != recipe:
        raise FileExistsError(
            f'{root} holds something other than the shapes dataset of {recipe}; move it or choose another root'
        )
    return True


def _write_split(folder: Path, count: int, size: int, seed: tuple[int, ...]) -> dict:
    """Draw ``count`` images into ``folder`` and return their COCO dictionary."""
    folder.mkdir()
    images, annotations = [], []
    for index in range(count):
        image, objects = _draw_image(np.random.default_rng((*seed, index)), size)
        name = f'{index:06d}.jpg'
        if not cv2.imwrite(str(folder / name), image):
            raise OSError(f'could not write {folder / name}')
        images.append({'id': index + 1, 'file_name': name, 'width': size, 'height': size})
        for label, polygon in objects:
            annotations.append({'id': len(annotations) + 1, 'image_id': index + 1, **_annotate(label, polygon)})
    categories = [{'id': i, 'name': name, 'supercategory': 'shape'} for i, name in enumerate(CLASSES, 1)]
    return {'licenses': [], 'images': images, 'annotations': annotations, 'categories': categories}


def _annotate(label: int, polygon: np.ndarray) -> dict:
    """The COCO fields of one whole shape, occluded parts included.

    Args:
        label: Index into ``CLASSES``.
        polygon: Corners (N, 2), x and y in pixels, where pixel i covers [i, i + 1].
    """
    polygon = polygon.round(2)
    (left, top), (right, bottom) = polygon.min(0), polygon.max(0)
    x, y = polygon.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return {
        'category_id': label + 1,
        'iscrowd': 0,
        'area': round(float(area), 2),
        'bbox': [round(float(value), 2) for value in (left, top, right - left, bottom - top)],
        'segmentation': [polygon.ravel().tolist()],
    }


def _draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one image.

    Returns:
        The image (size, size, 3), uint8 BGR, and its objects in drawing order as (label, polygon), at least one, all inside it.
    """
    image, texture = rng.uniform(*INTENSITIES, 3) + _noise(rng, size), _noise(rng, size)
    objects: list[tuple[int, np.ndarray]] = []
    masks: list[np.ndarray] = []
    wanted = rng.integers(1, MAX_OBJECTS + 1)
    for _ in range(10 * MAX_OBJECTS):
        label = int(rng.integers(len(CLASSES)))
        polygon = _outline(rng, label, size * np.exp(rng.uniform(*np.log(DIAMETERS))))
        polygon += rng.uniform(-polygon.min(0), size - polygon.max(0))
        mask = _fill(polygon, size)
        if any((mask & other).sum() > MAX_HIDDEN * min(mask.sum(), other.sum()) for other in masks):
            continue
        image[mask] = _contrasting(rng, image[mask].mean(0)) + texture[mask]
        objects.append((label, polygon))
        masks.append(mask)
        if len(objects) == wanted:
            break
    return image.clip(0, 255).astype(np.uint8), objects


def _outline(rng: np.random.Generator, label: int, diameter: float) -> np.ndarray:
    """A slightly turned shape around the origin, inscribed in a circle: its corners (N, 2) in pixels."""
    if CLASSES[label] == 'circle':
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    elif CLASSES[label] == 'rectangle':
        half = rng.uniform(0.45, np.pi / 2 - 0.45)  # between a diagonal and the horizontal: sides from 2:1 to 1:2
        angles = np.array([half, np.pi - half, np.pi + half, -half])
    else:
        angles = np.pi * np.array([-1 / 2, 1 / 6, 5 / 6]) + rng.uniform(-0.2, 0.2, 3)  # y points down, the triangle up
    angles += rng.uniform(-MAX_TURN, MAX_TURN)
    return diameter / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)


def _fill(polygon: np.ndarray, size: int) -> np.ndarray:
    """The pixels (size, size), bool, whose centre lies inside the polygon (N, 2)."""
    mask = np.zeros((size, size), np.uint8)
    corners = np.round((polygon - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)  # cv2 counts from pixel centres
    cv2.fillPoly(mask, [corners], 1, shift=SUBPIXEL_BITS)
    return mask.astype(bool)


def _contrasting(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour (3,) that can be told from ``background`` (3,)."""
    while True:
        colour = rng.uniform(*INTENSITIES, 3)
        if np.linalg.norm(colour - background) > MIN_CONTRAST:
            return colour


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise of three octaves around 0 (size, size, 3), float32, in units of 8-bit intensity."""
    noise = np.zeros((size, size, 3), np.float32)
    for cells in (4, 16, 64):
        grid = rng.standard_normal((cells, cells, 3), np.float32) * np.float32(rng.uniform(0, 10))
        noise += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return noise
