"""Supervised local learning (MAN++) for stock OpenMMLab models."""

from mmman.engine import EMABiasHook, LocalLearningOptimWrapper
from mmman.engine.allowed_types import allow_training_checkpoints
from mmman.engine.checkpoint import read_all_checkpoints
from mmman.errors import LocalLearningError
from mmman.local import (
    AugLocalHead,
    ClsLocalHead,
    DetLocalHead,
    DGLLocalHead,
    InfoProLocalHead,
    LocalBackbone,
    LocalHead,
    MomentumTransfer,
    PredSimLocalHead,
    SegLocalHead,
    ViTLocalHead,
    delocalize_,
    localize_,
)
from mmman.parallel import LocalDistributedDataParallel, PipelineRunner
from mmman.partition import register_chain

__version__ = '0.1.0'
__all__ = [
    'AugLocalHead',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'EMABiasHook',
    'InfoProLocalHead',
    'LocalBackbone',
    'LocalDistributedDataParallel',
    'LocalHead',
    'LocalLearningError',
    'LocalLearningOptimWrapper',
    'MomentumTransfer',
    'PipelineRunner',
    'PredSimLocalHead',
    'SegLocalHead',
    'ViTLocalHead',
    'delocalize_',
    'localize_',
    'register_chain',
]

allow_training_checkpoints()
read_all_checkpoints()
