"""Small generated datasets to try a configuration without a download, torchvision's datasets, and datasets kept in memory."""

from mmman.datasets.batch_augmentation import BatchCropFlip
from mmman.datasets.in_memory import KeepInMemory, PackedImageDataset
from mmman.datasets.shapes import write_shapes_dataset
from mmman.datasets.torchvision import TorchvisionDataset

__all__ = ['BatchCropFlip', 'KeepInMemory', 'PackedImageDataset', 'TorchvisionDataset', 'write_shapes_dataset']
