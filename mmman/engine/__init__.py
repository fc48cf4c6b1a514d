from mmman.engine.checkpoint_hook import CheckpointHook
from mmman.engine.hooks import EMABiasHook
from mmman.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmman.engine.optim_wrapper import LocalLearningOptimWrapper

__all__ = ['CheckpointHook', 'EMABiasHook', 'EpochBasedTrainLoop', 'IterBasedTrainLoop', 'LocalLearningOptimWrapper']
