"""Cuts by memory for a model that is being built: what ``partition=dict(type='memory', ...)`` of a config stands for."""

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

from mmman.errors import MisuseError, PartitionError
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
    """What the plan depends on, beside the backbone and its local heads.

    Args:
        model: Config of the model that the backbone is part of: the stock one, whose backbone doesn't count. Where a config
            has its ``data_preprocessor`` outside of the model, it may be put in.
        batch: Images a step.
        shape: Their height and width, pixels.
        optim_wrapper: Options of the ``mmman.LocalLearningOptimWrapper`` that trains it, whatever its type is; default: SGD
            with momentum.
    """

    model: dict
    batch: Count
    shape: tuple[Count, Count]
    optim_wrapper: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not {'type', 'backbone'} <= set(self.model):
            raise PartitionError(f'partition.model is no config of a model with a backbone: {BY_MEMORY}')

    @classmethod
    def of(cls, partition: dict) -> MemoryCuts:
        """From a config's ``partition``.

        Raises:
            PartitionError: It isn't ``dict(type='memory', ...)`` with these arguments.
        """
        if partition.get('type') != 'memory':
            raise PartitionError(f'partition has type={partition.get("type")!r}; cuts by memory are asked for by {BY_MEMORY}')
        try:
            return cls(**{key: value for key, value in partition.items() if key != 'type'})
        except MisuseError as error:
            raise PartitionError(f'{error}; cuts by memory are asked for by {BY_MEMORY}') from None

    def plan(self, backbone: dict, num_blocks: int | None) -> list[str]:
        """The units to cut after, for the smallest peak of a training step on one device.

        The model is built beside, and run on small images on the CPU. Nothing is downloaded, no random number of the process is
        drawn, and every process comes to the same cuts.

        Args:
            backbone: Options of ``mmman.LocalBackbone``: ``backbone``, ``local_head``, ``transfer``, ``recompute``.
            num_blocks: K.

        Raises:
            PartitionError: No K is given.
            MisuseError: There is no default scope, or it is none of the libraries'; the model or its heads can't be run so.
            CostError: K is larger than the number of units allows.
        """
        if num_blocks is None:
            raise PartitionError("num_blocks is needed with partition=dict(type='memory', ...)")
        if num_blocks == 1:
            return []
        scope = DefaultScope.get_current_instance()
        if scope is None:
            raise MisuseError("cuts by memory need a default scope: set default_scope to 'mmdet', 'mmseg' or 'mmpretrain'")
        options = {key: value for key, value in backbone.items() if value}
        cfg = Config(
            {
                'default_scope': scope.scope_name,
                'model': {**self.model, 'backbone': {'type': 'mmman.LocalBackbone', **options}},
                'optim_wrapper': {'optimizer': SGD, **self.optim_wrapper, 'type': 'mmman.LocalLearningOptimWrapper'},
            }
        )
        with _aside(), DefaultScope.overwrite_default_scope(scope.scope_name):
            profile = profile_step(cfg, self.batch, *self.shape)
            plan = smallest_peak(profile.step, num_blocks)
            peak = peak_of(profile.step, plan).total
        names = [profile.names[cut] for cut in plan.cuts]
        print_log(
            f'cuts by memory, predicted peak {peak / 1e6:.1f} MB: to plan only once, set num_blocks={num_blocks}, '
            f'partition={names} in model.backbone',
            logger='current',
        )
        return names


@contextmanager
def _aside() -> Iterator[None]:
    """While this context is open, models may be built and run on the CPU, and nothing of it is seen afterwards."""
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
