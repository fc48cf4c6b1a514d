"""Shapes: a synthetic detection dataset in COCO format, generated in seconds, that is not trivial to learn.

Circles, rectangles and triangles of any colour and size lie on textured backgrounds, so that only the outline determines the
class. An image depends only on the seed, its split, its index and its size: a larger dataset contains the smaller one.
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
VERSION = 1  # of the generator: increase it if the same arguments give different files

MAX_OBJECTS = 8
DIAMETERS = (0.1, 0.45)  # of the circumscribed circle, smallest and largest, as a fraction of the image's side
MAX_ROTATION = np.pi / 12  # of rectangles and triangles, in either direction
MAX_OCCLUSION = 0.2  # of two overlapping objects, as a fraction of the smaller one's area
INTENSITIES = (30, 225)  # range of the mean colours, which leaves room for noise
MIN_CONTRAST = 80.0  # Euclidean distance between the mean colours of an object and its background, 8-bit BGR
SUBPIXEL_BITS = 4  # of cv2's fixed-point coordinates


def write_shapes_dataset(
    root: str | os.PathLike, train_images: int = 800, val_images: int = 64, size: int = 256, seed: int = 0
) -> Path:
    """Write ``train/``, ``val/`` and ``annotations/instances_{train,val}.json`` below ``root``, for mmdet's ``CocoDataset``.

    The folder gets its name only when it is complete. If it already exists and was written with the same arguments, this does
    nothing.

    Args:
        root: The folder to create.
        train_images: Number of training images.
        val_images: Number of validation images.
        size: Height and width of every image, in pixels.
        seed: Seed of all random choices.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` has other content, for example a dataset of another size.
    """
    root = Path(root)
    recipe = {'train_images': train_images, 'val_images': val_images, 'size': size, 'seed': seed, 'version': VERSION}
    if _is_written(root, recipe):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as scratch:
        unfinished = Path(scratch, root.name)
        (unfinished / 'annotations').mkdir(parents=True)
        for split, count in zip(SPLITS, (train_images, val_images), strict=True):
            coco = _write_split(unfinished / split, count, size, (seed, SPLITS.index(split)))
            coco['info'] = {'description': f'generated shapes, {split}', 'recipe': recipe}
            (unfinished / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
        try:
            os.replace(unfinished, root)
        except OSError:  # the folder is not empty: another process was faster, or it has other content
            if not _is_written(root, recipe):
                raise
    return root


def _is_written(root: Path, recipe: dict[str, int]) -> bool:
    """Whether ``root`` contains the dataset of this recipe. Raises ``FileExistsError`` for any other content."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        info = json.loads((root / 'annotations' / f'instances_{SPLITS[-1]}.json').read_text())['info']
    except (OSError, ValueError, KeyError):
        info = {}
    if info.get('recipe') != recipe:
        raise FileExistsError(f'{root} exists, but is not the shapes dataset of {recipe}; move it, or choose another root')
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
    """The COCO annotation of one shape, including occluded parts.

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
    num_objects = rng.integers(1, MAX_OBJECTS + 1)
    for _ in range(10 * MAX_OBJECTS):
        label = int(rng.integers(len(CLASSES)))
        polygon = _outline(rng, label, size * np.exp(rng.uniform(*np.log(DIAMETERS))))
        polygon += rng.uniform(-polygon.min(0), size - polygon.max(0))
        mask = _fill(polygon, size)
        if any((mask & other).sum() > MAX_OCCLUSION * min(mask.sum(), other.sum()) for other in masks):
            continue
        image[mask] = _contrasting(rng, image[mask].mean(0)) + texture[mask]
        objects.append((label, polygon))
        masks.append(mask)
        if len(objects) == num_objects:
            break
    return image.clip(0, 255).astype(np.uint8), objects


def _outline(rng: np.random.Generator, label: int, diameter: float) -> np.ndarray:
    """Corners (N, 2) in pixels of a slightly rotated shape around the origin, inscribed in a circle."""
    if CLASSES[label] == 'circle':
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    elif CLASSES[label] == 'rectangle':
        half = rng.uniform(0.45, np.pi / 2 - 0.45)  # between a diagonal and the horizontal: sides from 2:1 to 1:2
        angles = np.array([half, np.pi - half, np.pi + half, -half])
    else:
        angles = np.pi * np.array([-1 / 2, 1 / 6, 5 / 6]) + rng.uniform(-0.2, 0.2, 3)  # y points down, the triangle up
    angles += rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    return diameter / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)


def _fill(polygon: np.ndarray, size: int) -> np.ndarray:
    """Mask (size, size), bool, of the pixels whose centre is inside the polygon (N, 2)."""
    mask = np.zeros((size, size), np.uint8)
    corners = np.round((polygon - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)  # cv2 counts from pixel centres
    cv2.fillPoly(mask, [corners], 1, shift=SUBPIXEL_BITS)
    return mask.astype(bool)


def _contrasting(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour (3,) that contrasts with ``background`` (3,)."""
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
