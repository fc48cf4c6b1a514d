"""The local heads: what is trained at a boundary, by task and by method."""

from mmman.heads.auglocal import AugLocalHead
from mmman.heads.cls import ClsLocalHead, DGLLocalHead
from mmman.heads.det import DetLocalHead
from mmman.heads.infopro import InfoProLocalHead
from mmman.heads.predsim import PredSimLocalHead
from mmman.heads.seg import SegLocalHead
from mmman.heads.vit import ViTLocalHead

__all__ = [
    'AugLocalHead',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'InfoProLocalHead',
    'PredSimLocalHead',
    'SegLocalHead',
    'ViTLocalHead',
]
