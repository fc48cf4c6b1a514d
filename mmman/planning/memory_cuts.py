"""Plan cuts by memory while a model is being built, for ``partition=dict(type='memory', ...)`` in a config."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from mmman.errors import ConfigError, PartitionError
from mmman.options import Count, checked
from mmman.partition.planner import BY_MEMORY
from mmman.planning.costs import peak_of
from mmman.planning.head_profile import quiet
from mmman.planning.profile import profile_step
from mmman.planning.search import smallest_peak

SGD = {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9}


@checked('model.backbone.partition')
@dataclass(frozen=True)
class MemoryCuts:
    """The inputs of a memory plan other than the backbone and its local heads.

    Args:
        model: Config of the stock model that the backbone is part of. The backbone in it is ignored. If the config has its
            ``data_preprocessor`` outside of the model, it may be added here.
        batch: Images per step.
        shape: Height and width of the images, pixels.
        optim_wrapper: Options of the ``mmman.LocalLearningOptimWrapper`` that trains the model. Its ``type`` is ignored.
            Default: SGD with momentum.
    """

    model: dict
    batch: Count
    shape: tuple[Count, Count]
    optim_wrapper: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not {'type', 'backbone'} <= set(self.model):
            raise PartitionError(f'partition.model is not the config of a model with a backbone; write {BY_MEMORY}')

    @classmethod
    def of(cls, partition: dict) -> MemoryCuts:
        """Read the ``partition`` option of a config.

        Raises:
            PartitionError: ``partition`` isn't ``dict(type='memory', ...)`` with valid arguments.
        """
        if partition.get('type') != 'memory':
            raise PartitionError(f'partition has type={partition.get("type")!r}; for cuts by memory write {BY_MEMORY}')
        try:
            return cls(**{key: value for key, value in partition.items() if key != 'type'})
        except ConfigError as error:
            raise PartitionError(f'{error}; for cuts by memory write {BY_MEMORY}') from None

    def plan(self, backbone: dict, num_blocks: int | None) -> list[str]:
        """Return the names of the units to cut after that give the smallest peak of a training step on one device.

        This builds a separate copy of the model and runs it on small images on the CPU. It downloads nothing and leaves the
        process's random state unchanged. Every process computes the same cuts.

        Args:
            backbone: Options of ``mmman.LocalBackbone``: ``backbone``, ``local_head``, ``transfer``, ``recompute``.
            num_blocks: Number of blocks K.

        Raises:
            PartitionError: ``num_blocks`` is None.
            ConfigError: The default scope is missing or isn't mmdet, mmseg or mmpretrain; or the model or its heads fail on
                the small images.
            CostError: The backbone has too few units for K blocks.
        """
        if num_blocks is None:
            raise PartitionError("num_blocks is needed with partition=dict(type='memory', ...)")
        if num_blocks == 1:
            return []
        scope = DefaultScope.get_current_instance()
        if scope is None:
            raise ConfigError("cuts by memory need a default scope: set default_scope to 'mmdet', 'mmseg' or 'mmpretrain'")
        options = {key: value for key, value in backbone.items() if value}
        cfg = Config(
            {
                'default_scope': scope.scope_name,
                'model': {**self.model, 'backbone': {'type': 'mmman.LocalBackbone', **options}},
                'optim_wrapper': {'optimizer': SGD, **self.optim_wrapper, 'type': 'mmman.LocalLearningOptimWrapper'},
            }
        )
        with _without_side_effects(), DefaultScope.overwrite_default_scope(scope.scope_name):
            profile = profile_step(cfg, self.batch, *self.shape)
            plan = smallest_peak(profile.step, num_blocks)
            peak = peak_of(profile.step, plan).total
        names = [profile.names[cut] for cut in plan.cuts]
        print_log(
            f'cuts by memory: predicted peak {peak / 1e6:.1f} MB; to skip planning next time, set num_blocks={num_blocks}, '
            f'partition={names} in model.backbone',
            logger='current',
        )
        return names


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """Build and run models on the CPU inside this context, with gradients, without log lines; restore the random state."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.callback(np.random.set_state, states[1])
        stack.callback(random.setstate, states[0])
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device('cpu'))
        stack.enter_context(quiet(logging.ERROR))
        yield
