"""The generated dataset: a function of its arguments, complete or not there, and annotated as it is drawn."""

import json

import cv2
import numpy as np
import pytest

from mmman.datasets import shapes, write_shapes_dataset
from mmman.datasets.shapes import CLASSES, DIAMETERS

SIZE = 64


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp('data') / 'shapes', train_images=4, val_images=2, size=SIZE)


def annotations(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def test_every_image_is_there_with_its_objects(root):
    for split, count in (('train', 4), ('val', 2)):
        coco = annotations(root, split)
        files = sorted(path.name for path in (root / split).iterdir())
        assert files == [image['file_name'] for image in coco['images']] and len(files) == count
        assert {annotation['image_id'] for annotation in coco['annotations']} == {*range(1, count + 1)}
        assert [category['name'] for category in coco['categories']] == [*CLASSES]
        assert cv2.imread(str(root / split / files[0])).shape == (SIZE, SIZE, 3)


def test_boxes_and_areas_are_those_of_the_outlines(root):
    for annotation in annotations(root, 'train')['annotations']:
        x, y, width, height = annotation['bbox']
        (polygon,) = annotation['segmentation']
        points = np.array(polygon).reshape(-1, 2)
        assert x >= 0 and y >= 0 and x + width <= SIZE + 0.01 and y + height <= SIZE + 0.01
        assert points.min(0) == pytest.approx([x, y], abs=0.01) and np.ptp(points, 0) == pytest.approx(
            [width, height], abs=0.02
        )
        assert annotation['area'] == pytest.approx(cv2.contourArea(points.astype(np.float32)), abs=0.05)
        assert max(width, height) <= DIAMETERS[1] * SIZE + 0.01


def test_a_larger_dataset_contains_the_smaller_one(root, tmp_path):
    larger = write_shapes_dataset(tmp_path / 'larger', train_images=5, val_images=0, size=SIZE)
    for path in (root / 'train').iterdir():
        assert (larger / 'train' / path.name).read_bytes() == path.read_bytes()
    other = write_shapes_dataset(tmp_path / 'other', train_images=1, val_images=0, size=SIZE, seed=1)
    assert (other / 'train' / '000000.jpg').read_bytes() != (root / 'train' / '000000.jpg').read_bytes()
    assert (root / 'val' / '000000.jpg').read_bytes() != (root / 'train' / '000000.jpg').read_bytes()


def test_the_same_arguments_write_nothing_and_others_are_refused(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shapes, '_write_split', lambda *args: pytest.fail('it was written again'))
        assert write_shapes_dataset(root, train_images=4, val_images=2, size=SIZE) == root
    with pytest.raises(FileExistsError, match='exists, but is not the shapes dataset of .*; move it, or choose another root'):
        write_shapes_dataset(root, train_images=5, val_images=2, size=SIZE)


def test_an_interrupted_dataset_has_no_name(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, '_write_split', killed)
    with pytest.raises(KeyboardInterrupt):
        write_shapes_dataset(tmp_path / 'shapes', train_images=1, val_images=0, size=SIZE)
    assert [*tmp_path.iterdir()] == []
