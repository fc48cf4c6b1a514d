from mmman.local.backbone import LocalBackbone, delocalize_, localize_
from mmman.local.heads import (
    AugLocalHead,
    ClsLocalHead,
    DetLocalHead,
    DGLLocalHead,
    InfoProLocalHead,
    LocalHead,
    PredSimLocalHead,
    ViTLocalHead,
)
from mmman.local.transfer import MomentumTransfer

__all__ = [
    'AugLocalHead',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'InfoProLocalHead',
    'LocalBackbone',
    'LocalHead',
    'MomentumTransfer',
    'PredSimLocalHead',
    'ViTLocalHead',
    'delocalize_',
    'localize_',
]
