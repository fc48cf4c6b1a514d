"""Small generated datasets, to try a configuration without downloading anything."""

from mmman.datasets.shapes import write_shapes_dataset

__all__ = ['write_shapes_dataset']
