"""Datasets in memory: images are read and decoded once, so that loading takes a small part of a training step."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from mmengine.dataset import BaseDataset, Compose

from mmman.registry import DATASETS, TRANSFORMS


@TRANSFORMS.register_module()
class KeepInMemory:
    """Run deterministic transforms once per sample and keep their result, for the first part of a pipeline of any library.

    The transforms that follow get a copy of the result and may change it in place. Every process of a data loader keeps its
    own results, so set ``num_workers=0``, or ``persistent_workers=True``.

    Args:
        transforms: Configs of transforms without random numbers, for example those that load, decode and resize.

    Raises:
        ValueError: A transform drew a random number.
    """

    def __init__(self, transforms: Sequence[dict]) -> None:
        self.transforms = Compose(transforms)
        self._results: dict[int, bytes] = {}

    def __call__(self, results: dict) -> dict | None:
        """Return the transformed sample, or None where a transform dropped it.

        Args:
            results: A sample as mmengine's ``BaseDataset`` passes it to its pipeline; ``sample_idx`` identifies it.
        """
        index = results['sample_idx']
        if index not in self._results:
            before = _random_state()
            self._results[index] = pickle.dumps(self.transforms(results), protocol=pickle.HIGHEST_PROTOCOL)
            if _random_state() != before:
                raise ValueError(f'KeepInMemory.transforms draw random numbers, move those behind it: {self.transforms}')
        return pickle.loads(self._results[index])


def _random_state() -> tuple:
    """States of the random generators that transforms use."""
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), keys.tobytes(), position, torch.get_rng_state().numpy().tobytes()


@DATASETS.register_module()
class PackedImageDataset(BaseDataset):
    """Classification images of one size from an ``.npz`` file, decoded once and kept in memory as uint8.

    A sample is ``img``, the image as (H, W, 3) uint8 in RGB order (so the data preprocessor has ``to_rgb=False``), and
    ``gt_label``, the class index.

    Args:
        ann_file: The file, relative to ``data_root``. Its arrays are ``jpeg`` (uint8, all encoded images concatenated),
            ``offsets`` (N + 1, where each image begins), ``labels`` (N) and ``classes`` (names).
        **kwargs: Other arguments of mmengine's ``BaseDataset``.

    Raises:
        ValueError: An image can't be decoded or has another size than the first.
    """

    def load_data_list(self) -> list[dict]:
        """Read and decode all images. Called once, by ``full_init``.

        Returns:
            The index and the label of every sample.
        """
        with np.load(self.ann_file) as arrays:
            data, offsets, labels = arrays['jpeg'], arrays['offsets'], arrays['labels']
            self._metainfo.setdefault('classes', tuple(map(str, arrays['classes'])))
        self.images = self._decode(data, offsets)
        return [{'index': index, 'gt_label': int(label)} for index, label in enumerate(labels)]

    def _decode(self, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Decode concatenated images to (N, H, W, 3), uint8, RGB."""
        images = None
        for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
            image = cv2.imdecode(data[begin:end], cv2.IMREAD_COLOR)
            if images is None and image is not None:
                images = np.empty((len(offsets) - 1, *image.shape), dtype=np.uint8)
            if image is None or image.shape != images.shape[1:]:
                problem = 'cannot be decoded' if image is None else f'is {image.shape}, not {images.shape[1:]}'
                raise ValueError(f'{self.ann_file}: image {index} {problem}')
            images[index] = image[..., ::-1]
        return images

    def get_data_info(self, idx: int) -> dict:
        """Return the sample that a pipeline starts from: ``img``, ``gt_label`` and ``sample_idx``."""
        info = super().get_data_info(idx)
        image = self.images[info.pop('index')]
        return {**info, 'img': image.copy()}

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the class of a sample, which mmengine's ``ClassBalancedDataset`` asks for."""
        return [super().get_data_info(idx)['gt_label']]
