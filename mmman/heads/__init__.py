"""The local heads, which train a block at its boundary, by task and method."""

from mmman.heads.auglocal import AugLocalHead
from mmman.heads.cls import ClsLocalHead, DGLLocalHead, LinearLocalHead
from mmman.heads.det import DetLocalHead
from mmman.heads.infopro import InfoProLocalHead
from mmman.heads.lam import LAMLocalHead
from mmman.heads.predsim import PredSimLocalHead
from mmman.heads.seg import SegLocalHead
from mmman.heads.vit import ViTLocalHead

__all__ = [
    'AugLocalHead',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'InfoProLocalHead',
    'LAMLocalHead',
    'LinearLocalHead',
    'PredSimLocalHead',
    'SegLocalHead',
    'ViTLocalHead',
]
