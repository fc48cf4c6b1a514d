"""Supervised local learning (MAN++) for stock OpenMMLab models."""

from mmman.engine import EMABiasHook, LocalLearningOptimWrapper
from mmman.engine.checkpoint import allow_training_checkpoints
from mmman.errors import LocalLearningError
from mmman.local import DetLocalHead, LocalBackbone, LocalHead, MomentumTransfer, delocalize_, localize_
from mmman.partition import register_chain

__version__ = '0.1.0'
__all__ = [
    'DetLocalHead',
    'EMABiasHook',
    'LocalBackbone',
    'LocalHead',
    'LocalLearningError',
    'LocalLearningOptimWrapper',
    'MomentumTransfer',
    'delocalize_',
    'localize_',
    'register_chain',
]

allow_training_checkpoints()
