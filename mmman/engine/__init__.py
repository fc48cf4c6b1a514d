from mmman.engine.hooks import EMABiasHook
from mmman.engine.optim_wrapper import LocalLearningOptimWrapper

__all__ = ['EMABiasHook', 'LocalLearningOptimWrapper']
