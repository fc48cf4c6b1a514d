"""The hook that logs gradients, dead channels and momentum copies of every block."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmman.analysis.inspection import StepMonitor, copy_distance
from mmman.engine.block_parameters import parameters_by_block
from mmman.engine.optim_wrapper import LocalLearningOptimWrapper
from mmman.errors import ConfigError
from mmman.local.blocks import localized_backbone
from mmman.options import Count, checked
from mmman.registry import HOOKS


@HOOKS.register_module()
@checked('LocalInspectorHook')
class LocalInspectorHook(Hook):
    """Logs every block's gradient, dead channels and momentum copy every ``interval`` iterations. Training doesn't change.

    The scalars go to mmengine's message hub, and so to every visualization backend (for TensorBoard add
    ``dict(type='TensorboardVisBackend')`` to ``visualizer.vis_backends``), beside the local losses and scales s_j of every
    iteration. For block j from 1 to K:

    - ``local/<j>/gradient``: L2 norm of the gradient that the optimizer stepped the block and its local head with (the last
      block: with neck and head), after clipping. ``local/<j>/grad_norm``, which ``clip_grad`` logs, is the one before;
    - ``local/<j>/dead``: share of the channels of the block's output that are zero in the whole batch, 0 to 1; in data parallel
      training in the batch of the first process;
    - ``local/<j>/distance``: relative L2 distance of the momentum copy from its source, at least 0 (j < K), after its update.

    With gradient accumulation, an iteration to be logged is followed until the optimizer steps.

    Args:
        interval: Iterations between two inspections. Choose a divisor of the ``LoggerHook``'s interval, which decides when
            values are written.

    Raises:
        ConfigError: The run isn't set up for local learning, is a pipeline, or runs CUDA graphs.
    """

    priority = 55  # between EMABiasHook (50), which updates the copies, and LoggerHook (60)

    def __init__(self, interval: Count = 50) -> None:
        self.interval = interval
        self._monitor: StepMonitor | None = None
        self._steps = 0

    def before_train(self, runner: Runner) -> None:
        """Reject runs whose blocks can't be measured."""
        if not isinstance(runner.optim_wrapper, LocalLearningOptimWrapper):
            raise ConfigError(
                "LocalInspectorHook needs optim_wrapper = dict(type='mmman.LocalLearningOptimWrapper', ...), "
                f'not {type(runner.optim_wrapper).__name__}: set it, or remove the hook'
            )
        if hasattr(runner.model, 'comm'):
            raise ConfigError('LocalInspectorHook needs all blocks in one process: remove it under PipelineRunner')
        if runner.optim_wrapper.cuda_graphs:
            raise ConfigError('LocalInspectorHook cannot see into CUDA graphs: set optim_wrapper.cuda_graphs=False')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Start to measure, if this iteration is to be logged."""
        if self._monitor is None and self.every_n_train_iters(runner, self.interval):
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            blocks = [block.values() for block in parameters_by_block(model)]
            self._monitor = StepMonitor(localized_backbone(model), runner.optim_wrapper.optimizer, blocks).__enter__()
            self._steps = runner.optim_wrapper.steps

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Log what was measured, if the optimizer stepped."""
        if self._monitor is None or runner.optim_wrapper.steps == self._steps:
            return
        self._monitor.__exit__(None, None, None)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        backbone = localized_backbone(model)
        distances = {head.block: copy_distance(head, backbone) for head in backbone.local.values()}
        found = {'gradient': self._monitor.gradients, 'dead': self._monitor.dead, 'distance': distances}
        self._monitor = None
        for name, values in found.items():
            for block, value in values.items():
                if value is not None:
                    runner.message_hub.update_scalar(f'train/local/{block}/{name}', value)

    def after_train(self, runner: Runner) -> None:
        """Stop measuring, if the optimizer didn't step after the last iteration that was to be logged."""
        if self._monitor is not None:
            self._monitor.__exit__(None, None, None)
            self._monitor = None
