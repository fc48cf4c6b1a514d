"""Distributed training: data parallel with exact gradients, and pipeline parallel with one block per process."""

from mmman.parallel.ddp import BlockReducer, LocalDistributedDataParallel
from mmman.parallel.pipeline import PipelineRunner

__all__ = ['BlockReducer', 'LocalDistributedDataParallel', 'PipelineRunner']
