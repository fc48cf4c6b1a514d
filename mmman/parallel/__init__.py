from mmman.parallel.ddp import BlockReducer, LocalDistributedDataParallel

__all__ = ['BlockReducer', 'LocalDistributedDataParallel']
