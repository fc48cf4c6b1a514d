"""Classification datasets that torchvision reads in their original format, for mmpretrain's pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine import dist
from mmengine.dataset import BaseDataset

from mmman.registry import DATASETS

CLASSIFICATION = (
    'CIFAR10', 'CIFAR100', 'CLEVRClassification', 'Caltech101', 'Caltech256', 'Country211', 'DTD', 'EMNIST', 'EuroSAT',
    'FER2013', 'FGVCAircraft', 'FakeData', 'FashionMNIST', 'Flowers102', 'Food101', 'GTSRB', 'INaturalist', 'ImageFolder',
    'Imagenette', 'KMNIST', 'MNIST', 'OxfordIIITPet', 'PCAM', 'Places365', 'QMNIST', 'RenderedSST2', 'SEMEION', 'STL10',
    'SUN397', 'SVHN', 'StanfordCars', 'USPS',
)  # fmt: skip
"""Classes of torchvision.datasets that give an image and one class index."""

CLASS_NAMES = {'SVHN': tuple('0123456789')}
"""Of datasets whose torchvision class doesn't know them."""


@DATASETS.register_module()
class TorchvisionDataset(BaseDataset):
    """Any classification dataset of ``torchvision.datasets``, read by torchvision from its original files.

    A pipeline gets what mmpretrain's ``CIFAR10`` gives it: ``img``, the image as (H, W, 3) uint8 in RGB order (so the data
    preprocessor has ``to_rgb=False``), and ``gt_label``, the class index. Grey images are repeated over the three channels.
    Images are read when they are asked for: memory holds what the torchvision class holds.

    Args:
        dataset: Name of the class, e.g. ``'SVHN'``.
        data_root: Folder of the data: the ``root`` of the torchvision class.
        split: Its ``split``; for classes that have ``train=True`` instead, ``'train'`` or ``'test'``.
        download: Whether to download what is missing. Never done unasked.
        metainfo: Meta information; ``classes`` overrides the names that torchvision knows.
        pipeline: Transforms.
        indices: Use the first so many samples, or the samples of these indices, alone.
        serialize_data: See mmengine's ``BaseDataset``; the list that it concerns holds indices alone.
        test_mode: A sample that the pipeline drops is an error, and not replaced by another.
        lazy_init: Read nothing before :meth:`full_init`.
        max_refetch: How often a dropped sample is replaced.
        **options: Further arguments of the torchvision class, e.g. ``folds=0`` of ``STL10``.

    Raises:
        ValueError: ``dataset`` is none of torchvision's classification datasets, or doesn't have this split or option.
        FileNotFoundError: The data isn't there. The message says what to download, and where to.
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

        if dataset not in CLASSIFICATION or not hasattr(datasets, dataset):
            known = [name for name in CLASSIFICATION if hasattr(datasets, name)]
            raise ValueError(f"dataset={dataset!r} is none of torchvision's classification datasets: {', '.join(known)}")
        self.source_class = getattr(datasets, dataset)
        self.split = split
        self.download = download
        self.options = self._arguments(data_root, split, options)
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

    def _arguments(self, data_root: str, split: str | None, options: dict) -> dict:
        """The arguments of the torchvision class, except ``download``."""
        name, known = self.source_class.__name__, self._parameters()
        arguments = dict(options)
        if 'root' in known:
            arguments['root'] = str(Path(data_root).expanduser())
        if 'split' in known and split is not None:
            arguments['split'] = split
        elif split is not None:
            if 'train' not in known or split not in ('train', 'test'):
                choices = "'train' and 'test'" if 'train' in known else 'none: leave split out'
                raise ValueError(f'torchvision.datasets.{name} has no split {split!r}; its splits are {choices}')
            arguments['train'] = split == 'train'
        unknown = arguments.keys() - known
        if unknown and 'kwargs' not in known:
            raise ValueError(
                f'torchvision.datasets.{name} takes no {", ".join(sorted(unknown))}; it takes {", ".join(sorted(known))}'
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

    def _parameters(self) -> set[str]:
        """What the torchvision class takes; ``kwargs`` (EMNIST, QMNIST) are those of MNIST."""
        return {*inspect.signature(self.source_class).parameters}

    def _open(self, download: bool = False) -> object:
        takes_download = bool({'download', 'kwargs'} & self._parameters())
        if download and not takes_download:
            raise ValueError(f'torchvision cannot download {self.source_class.__name__}; {self._remedy()}')
        try:
            return self.source_class(**self.options, **({'download': download} if takes_download else {}))
        except (FileNotFoundError, RuntimeError) as error:
            if download:
                raise
            hint = ', or set download=True' if takes_download else ''
            raise FileNotFoundError(
                f'no {self.source_class.__name__} in data_root={self.data_root!r}, or not its original files: '
                f'{self._remedy()}{hint}. torchvision says: {error}'
            ) from error

    def _remedy(self) -> str:
        """What to download, and where to, as far as the torchvision class tells."""
        root, known, split = Path(self.data_root), vars(self.source_class), self.split or 'train'
        if split in known.get('split_list', ()):
            url, name = known['split_list'][split][:2]
            return f'download {url} to {root / name}'
        if {'url', 'base_folder'} <= known.keys():
            return f'download {known["url"]} and unpack it in {root}, which makes {root / known["base_folder"]}'
        return f'the documentation of torchvision.datasets.{self.source_class.__name__} says what belongs there'

    def get_data_info(self, idx: int) -> dict:
        """The sample that a pipeline starts from: ``img``, ``gt_label`` and ``sample_idx``."""
        info = super().get_data_info(idx)
        image, label = self.source[info.pop('index')]
        return {**info, 'img': np.array(image.convert('RGB')), 'gt_label': int(label)}

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of a sample, as mmengine's ``ClassBalancedDataset`` asks for it."""
        return [self.get_data_info(idx)['gt_label']]
