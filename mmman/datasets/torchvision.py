"""Classification datasets that torchvision reads in their original format, for mmpretrain's pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine import dist
from mmengine.dataset import BaseDataset

from mmman.registry import DATASETS

DATASET_NAMES = (
    'CIFAR10', 'CIFAR100', 'CLEVRClassification', 'Caltech101', 'Caltech256', 'Country211', 'DTD', 'EMNIST', 'EuroSAT',
    'FER2013', 'FGVCAircraft', 'FakeData', 'FashionMNIST', 'Flowers102', 'Food101', 'GTSRB', 'INaturalist', 'ImageFolder',
    'Imagenette', 'KMNIST', 'MNIST', 'OxfordIIITPet', 'PCAM', 'Places365', 'QMNIST', 'RenderedSST2', 'SEMEION', 'STL10',
    'SUN397', 'SVHN', 'StanfordCars', 'USPS',
)  # fmt: skip
"""Classes of torchvision.datasets whose samples are an image and one class index."""

CLASS_NAMES = {'SVHN': tuple('0123456789')}
"""Class names of datasets whose torchvision class has none."""


@DATASETS.register_module()
class TorchvisionDataset(BaseDataset):
    """Any classification dataset of ``torchvision.datasets``, read by torchvision from its original files.

    A pipeline gets the same fields as from mmpretrain's ``CIFAR10``: ``img``, the image as (H, W, 3) uint8 in RGB order (so set
    ``to_rgb=False`` in the data preprocessor), and ``gt_label``, the class index. Grey images are repeated over three channels.
    Images are read on access; only what the torchvision class itself caches is in memory.

    Args:
        dataset: Name of the class, e.g. ``'SVHN'``.
        data_root: Folder of the data, the ``root`` of the torchvision class.
        split: Its ``split``; ``'train'`` or ``'test'`` for classes that have ``train=True`` instead.
        download: Whether to download missing data.
        metainfo: Meta information; ``classes`` overrides torchvision's names.
        pipeline: Transforms.
        indices: Use only the first n samples, or only the samples with these indices.
        serialize_data: See mmengine's ``BaseDataset``. The serialised list contains only indices.
        test_mode: Raise an error if the pipeline drops a sample, instead of replacing it.
        lazy_init: Don't read data before :meth:`full_init`.
        max_refetch: How often a dropped sample is replaced.
        **options: Further arguments of the torchvision class, e.g. ``folds=0`` of ``STL10``.

    Raises:
        ValueError: ``dataset`` isn't a classification dataset of torchvision, or doesn't have this split or option.
        FileNotFoundError: The data is missing. The message says what to download, and to which folder.
    """

    def __init__(
        self,
        dataset: str,
        data_root: str = '',
        split: str | None = None,
        download: bool = False,
        metainfo: dict | None = None,
        pipeline: Sequence = (),
        indices: int | Sequence[int] | None = None,
        serialize_data: bool = True,
        test_mode: bool = False,
        lazy_init: bool = False,
        max_refetch: int = 1000,
        **options,
    ) -> None:
        from torchvision import datasets

        if dataset not in DATASET_NAMES or not hasattr(datasets, dataset):
            known = [name for name in DATASET_NAMES if hasattr(datasets, name)]
            raise ValueError(f'dataset={dataset!r} is not a classification dataset of torchvision: choose {", ".join(known)}')
        self.source_class = getattr(datasets, dataset)
        self.split = split
        self.download = download
        self.options = self._source_arguments(data_root, split, options)
        self.source = None
        super().__init__(
            metainfo=metainfo,
            data_root=data_root,
            pipeline=list(pipeline),
            indices=indices,
            serialize_data=serialize_data,
            test_mode=test_mode,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
        )

    def _source_arguments(self, data_root: str, split: str | None, options: dict) -> dict:
        """The arguments of the torchvision class, except ``download``."""
        name, known = self.source_class.__name__, self._source_parameters()
        arguments = dict(options)
        if 'root' in known:
            arguments['root'] = str(Path(data_root).expanduser())
        if 'split' in known and split is not None:
            arguments['split'] = split
        elif split is not None:
            if 'train' not in known or split not in ('train', 'test'):
                choices = "set 'train' or 'test'" if 'train' in known else 'remove split'
                raise ValueError(f'torchvision.datasets.{name} has no split {split!r}: {choices}')
            arguments['train'] = split == 'train'
        unknown = arguments.keys() - known
        if unknown and 'kwargs' not in known:
            raise ValueError(
                f'torchvision.datasets.{name} has no option {", ".join(sorted(unknown))}; '
                f'the options are {", ".join(sorted(known))}'
            )
        return arguments

    def load_data_list(self) -> list[dict]:
        """Open the dataset; called once by mmengine's ``full_init``.

        Returns:
            The index of every sample.
        """
        if self.download and dist.is_main_process():
            self._open(download=True)
        dist.barrier()
        self.source = self._open()
        names = getattr(self.source, 'classes', None) or getattr(self.source, 'categories', None)
        names = CLASS_NAMES.get(self.source_class.__name__, names)
        if names is not None:
            self._metainfo.setdefault('classes', tuple(names))
        return [{'index': i} for i in range(len(self.source))]

    def _source_parameters(self) -> set[str]:
        """Parameters of the torchvision class. ``kwargs`` (EMNIST, QMNIST) are those of MNIST."""
        return {*inspect.signature(self.source_class).parameters}

    def _open(self, download: bool = False) -> object:
        can_download = bool({'download', 'kwargs'} & self._source_parameters())
        if download and not can_download:
            raise ValueError(f'torchvision cannot download {self.source_class.__name__}; {self._download_hint()}')
        try:
            return self.source_class(**self.options, **({'download': download} if can_download else {}))
        except (FileNotFoundError, RuntimeError) as error:
            if download:
                raise
            hint = ', or set download=True' if can_download else ''
            raise FileNotFoundError(
                f'data_root={str(self.data_root)!r} does not contain the original files of {self.source_class.__name__}: '
                f'{self._download_hint()}{hint}. torchvision: {error}'
            ) from error

    def _download_hint(self) -> str:
        """What to download, and to which folder, as far as the torchvision class provides it."""
        root, known, split = Path(self.data_root), vars(self.source_class), self.split or 'train'
        if split in known.get('split_list', ()):
            url, name = known['split_list'][split][:2]
            return f'download {url} to {root / name}'
        if {'url', 'base_folder'} <= known.keys():
            return f'download {known["url"]} and unpack it in {root} to get {root / known["base_folder"]}'
        return f'see the documentation of torchvision.datasets.{self.source_class.__name__} for the files'

    def get_data_info(self, idx: int) -> dict:
        """Return a sample before the pipeline: ``img``, ``gt_label`` and ``sample_idx``."""
        info = super().get_data_info(idx)
        image, label = self.source[info.pop('index')]
        return {**info, 'img': np.array(image.convert('RGB')), 'gt_label': int(label)}

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the class of a sample, for mmengine's ``ClassBalancedDataset``."""
        return [self.get_data_info(idx)['gt_label']]
