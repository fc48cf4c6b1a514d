from mmman.local.backbone import LocalBackbone, delocalize_, localize_
from mmman.local.heads import DetLocalHead, LocalHead
from mmman.local.transfer import MomentumTransfer

__all__ = ['DetLocalHead', 'LocalBackbone', 'LocalHead', 'MomentumTransfer', 'delocalize_', 'localize_']
