"""Small generated datasets, to try a configuration without downloading anything, and torchvision's, in their own formats."""

from mmman.datasets.shapes import write_shapes_dataset
from mmman.datasets.torchvision import TorchvisionDataset

__all__ = ['TorchvisionDataset', 'write_shapes_dataset']
