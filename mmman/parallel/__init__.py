"""Several processes: data parallel training with exact gradients, and one block a process."""

from mmman.parallel.ddp import BlockReducer, LocalDistributedDataParallel
from mmman.parallel.pipeline import PipelineRunner

__all__ = ['BlockReducer', 'LocalDistributedDataParallel', 'PipelineRunner']
