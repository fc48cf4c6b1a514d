from mmman.local.heads.base import Boundary, LocalHead
from mmman.local.heads.det import DetLocalHead

__all__ = ['Boundary', 'DetLocalHead', 'LocalHead']
