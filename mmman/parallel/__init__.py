from mmman.parallel.ddp import BlockReducer, LocalDistributedDataParallel
from mmman.parallel.pipeline import PipelineRunner
from mmman.parallel.watchdog_hook import WatchdogHook

__all__ = ['BlockReducer', 'LocalDistributedDataParallel', 'PipelineRunner', 'WatchdogHook']
