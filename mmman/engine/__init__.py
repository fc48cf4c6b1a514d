"""The training step: backward pass, optimizer step and momentum copies; checks of model and config before the first step."""

from mmman.engine.compile_hook import LocalCompileHook
from mmman.engine.ema_hook import EMABiasHook
from mmman.engine.inspector_hook import LocalInspectorHook
from mmman.engine.log_processor import LocalLogProcessor
from mmman.engine.optim_wrapper import LocalLearningOptimWrapper

__all__ = ['EMABiasHook', 'LocalCompileHook', 'LocalInspectorHook', 'LocalLearningOptimWrapper', 'LocalLogProcessor']
