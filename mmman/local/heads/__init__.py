from mmman.local.heads.auglocal import AugLocalHead
from mmman.local.heads.base import Boundary, LocalHead
from mmman.local.heads.cls import ClsLocalHead, DGLLocalHead
from mmman.local.heads.det import DetLocalHead
from mmman.local.heads.infopro import InfoProLocalHead
from mmman.local.heads.predsim import PredSimLocalHead
from mmman.local.heads.seg import SegLocalHead
from mmman.local.heads.vit import ViTLocalHead

__all__ = [
    'AugLocalHead',
    'Boundary',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'InfoProLocalHead',
    'LocalHead',
    'PredSimLocalHead',
    'SegLocalHead',
    'ViTLocalHead',
]
