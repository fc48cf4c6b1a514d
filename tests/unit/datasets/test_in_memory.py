"""Datasets in memory: what is decoded once, what is copied, and what is refused."""

import cv2
import numpy as np
import pytest
from mmengine.registry import TRANSFORMS

from mmman.datasets import KeepInMemory, PackedImageDataset

CALLS = []


@pytest.fixture
def transforms():
    """A deterministic transform that counts its calls, and a random one."""
    CALLS.clear()

    def decode(results):
        CALLS.append(results['sample_idx'])
        return {**results, 'img': np.full((2, 2), results['sample_idx'], np.uint8)}

    def jitter(results):
        return {**results, 'shift': np.random.rand()}

    for name, function in (('CountedDecode', decode), ('Jitter', jitter)):
        TRANSFORMS.register_module(name=name, module=lambda function=function: function, force=True)
    yield
    for name in ('CountedDecode', 'Jitter'):
        TRANSFORMS.module_dict.pop(name)


def test_transforms_run_once_per_sample(transforms):
    keep = KeepInMemory([{'type': 'CountedDecode'}])
    first = keep({'sample_idx': 3})
    first['img'][:] = 99  # a transform behind it works in place
    assert keep({'sample_idx': 3})['img'].tolist() == [[3, 3], [3, 3]]
    assert keep({'sample_idx': 4})['img'].tolist() == [[4, 4], [4, 4]]
    assert CALLS == [3, 4]


def test_random_transforms_are_refused(transforms):
    keep = KeepInMemory([{'type': 'CountedDecode'}, {'type': 'Jitter'}])
    with pytest.raises(ValueError, match=r'KeepInMemory\.transforms draw random numbers'):
        keep({'sample_idx': 0})


def write_npz(path, images):
    files = [cv2.imencode('.png', image[..., ::-1])[1] for image in images]
    np.savez(
        path,
        jpeg=np.concatenate(files),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=np.arange(len(files)) % 2,
        classes=['cat', 'dog'],
    )


def test_packed_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    write_npz(tmp_path / 'images.npz', images)
    dataset = PackedImageDataset(ann_file=str(tmp_path / 'images.npz'), pipeline=[])
    assert dataset.metainfo['classes'] == ('cat', 'dog') and len(dataset) == 4
    for index, image in enumerate(images):
        sample = dataset[index]
        assert np.array_equal(sample['img'], image) and sample['img'].dtype == np.uint8  # RGB
        assert sample['gt_label'] == index % 2 and dataset.get_cat_ids(index) == [index % 2]
        sample['img'][:] = 0
        assert np.array_equal(dataset[index]['img'], image)
    part = PackedImageDataset(ann_file=str(tmp_path / 'images.npz'), pipeline=[], indices=[1, 3])
    assert [part[i]['gt_label'] for i in range(len(part))] == [1, 1] and np.array_equal(part[1]['img'], images[3])


def test_images_of_two_sizes_are_refused(tmp_path):
    write_npz(tmp_path / 'images.npz', [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match=r'image 1 is \(4, 5, 3\), not \(4, 4, 3\)'):
        PackedImageDataset(ann_file=str(tmp_path / 'images.npz'), pipeline=[])
