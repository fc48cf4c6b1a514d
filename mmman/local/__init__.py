from mmman.local.backbone import LocalBackbone, delocalize_, localize_
from mmman.local.heads import (
    AugLocalHead,
    ClsLocalHead,
    DetLocalHead,
    DGLLocalHead,
    InfoProLocalHead,
    LocalHead,
    PredSimLocalHead,
    SegLocalHead,
    ViTLocalHead,
)
from mmman.local.model import LocalModel
from mmman.local.transfer import MomentumTransfer

__all__ = [
    'AugLocalHead',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'InfoProLocalHead',
    'LocalBackbone',
    'LocalHead',
    'LocalModel',
    'MomentumTransfer',
    'PredSimLocalHead',
    'SegLocalHead',
    'ViTLocalHead',
    'delocalize_',
    'localize_',
]
