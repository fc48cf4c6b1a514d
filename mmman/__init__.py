"""Supervised local learning (MAN++) for stock OpenMMLab models."""

from mmman.builder import LocalBackbone
from mmman.engine import EMABiasHook, LocalLearningOptimWrapper
from mmman.errors import LocalLearningError
from mmman.heads import (
    AugLocalHead,
    ClsLocalHead,
    DetLocalHead,
    DGLLocalHead,
    InfoProLocalHead,
    LAMLocalHead,
    LinearLocalHead,
    PredSimLocalHead,
    SegLocalHead,
    ViTLocalHead,
)
from mmman.local import LocalHead, MomentumTransfer, delocalize_, localize_
from mmman.parallel import LocalDistributedDataParallel, PipelineRunner
from mmman.partition import register_chain
from mmman.runtime.allowed_types import allow_training_checkpoints
from mmman.runtime.checkpoint import read_all_checkpoints
from mmman.runtime.stock_config import resolve_own_configs
from mmman.version import __version__ as __version__

__all__ = [
    'AugLocalHead',
    'ClsLocalHead',
    'DGLLocalHead',
    'DetLocalHead',
    'EMABiasHook',
    'InfoProLocalHead',
    'LAMLocalHead',
    'LinearLocalHead',
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
resolve_own_configs()
