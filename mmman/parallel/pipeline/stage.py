"""One stage of a pipeline: a model wrapper that trains one block of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmman.engine.block_parameters import parameters_by_block
from mmman.errors import ConfigError
from mmman.local.blocks import LocalBlocks, localized_backbone
from mmman.parallel.ddp import BlockReducer
from mmman.parallel.pipeline.comm import Batch, StageComm
from mmman.parallel.pipeline.shard import StageShard
from mmman.parallel.pipeline.stage_rank import StageRank
from mmman.registry import MODEL_WRAPPERS


class BlockDone(Exception):  # noqa: N818  control flow, not an error
    """Raised to end a forward pass after the last unit of a stage's block."""


@MODEL_WRAPPERS.register_module()
class PipelineStage(nn.Module):
    """A stage's model: the stock model, of which only one block is computed.

    The stock forward pass runs as usual. Units of earlier stages are on the meta device and compute shapes only. The output of
    the last of these units, and of every tap, is replaced by the tensor received from the previous stage. The pass ends after
    this stage's block; on the last stage it continues through neck and head.

    Args:
        module: The localised model.
        stage_rank: Position of this stage.
        staleness: S. This stage starts batch b when the next one has finished batch b-1-S. Its momentum copies then follow
            the state of the next block's first unit at exactly that time. With 0 they are as in an ordinary run, and two
            adjacent stages never compute at the same time.

    Attributes:
        block_reducers: The reducer of this block's gradients over the replicas, by the block's number, for the optim wrapper.
            Empty if there is one replica, or on the last stage.
        comm: Communication with the previous and the next stage.
        shard: The tensors that this stage holds.
        iteration: Iteration of the next batch.

    Raises:
        ConfigError: A momentum copy follows a unit that the next stage doesn't begin with, or losses train several blocks.
    """

    def __init__(self, module: nn.Module, stage_rank: StageRank, staleness: int) -> None:
        super().__init__()
        self.module = module
        self.stage_rank = stage_rank
        self.comm = StageComm(stage_rank, staleness)
        self.shard = StageShard(module, stage_rank.stage)
        self.backbone = localized_backbone(module)
        local = self.backbone.local
        _check_local(local)
        local.trained_index = stage_rank.stage
        self.iteration = 0
        self.block_reducers: dict[int, BlockReducer] = {}
        self._task_reducer: BlockReducer | None = None
        self._groups: list[dict] | None = None
        self._batch: Batch | None = None
        self._outgoing: Batch | None = None
        self._sends_images = any(head.uses_images for head in [*local.values()][stage_rank.stage + 1 :])
        self._is_copied = stage_rank.stage > 0 and [*local.values()][stage_rank.stage - 1].transfer.momentum is not None

    def start_(self, optimizer: torch.optim.Optimizer, device: torch.device | str, iteration: int) -> None:
        """Move the tensors of other stages to the meta device and register the hooks. Called once, when training starts.

        Args:
            optimizer: The optimizer of the whole model.
            device: The stage's device.
            iteration: Iteration of the first batch.
        """
        self.shard.split_(optimizer, device)
        self.iteration = self.comm.finished = iteration
        blocks, stage = self.backbone.local.plan.blocks, self.stage_rank.stage
        if self.stage_rank.replicas > 1:
            reducer = BlockReducer(parameters_by_block(self.module)[stage].items())
            if self.stage_rank.is_last:
                self._task_reducer = reducer
            else:
                self.block_reducers[stage + 1] = reducer
        if not self.stage_rank.is_first:
            self.backbone.register_forward_pre_hook(self._meta_input)
            entry = blocks[stage - 1][-1].output
            taps = [unit.output for unit in self._output_units(range(stage))] if self.stage_rank.is_last else []
            for path in dict.fromkeys([*taps, entry]):
                self.backbone.get_submodule(path).register_forward_hook(partial(self._replace_output, path, path == entry))
            earlier = [unit for block in (self.backbone.local.plan.frozen, *blocks[:stage]) for unit in block]
            self._shapes_only_([path for unit in earlier for path in unit.modules])
        if not self.stage_rank.is_last:
            # The last stage applies these norms. Their inputs are outputs of units inside this block.
            self._shapes_only_(self.backbone.local.inner_norms)
            for unit in self._output_units([stage]):
                self.backbone.get_submodule(unit.output).register_forward_hook(partial(self._capture_tap, unit.output))
            self.backbone.get_submodule(blocks[stage][-1].output).register_forward_hook(self._end_block)

    # -- one batch ---------------------------------------------------------------------------------------------------------

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Train this stage's block on a batch.

        Args:
            data: A batch of the data loader on the first stage, otherwise the :class:`Batch` of the previous stage.
            optim_wrapper: A :class:`mmman.LocalLearningOptimWrapper`.

        Returns:
            The model's losses on the last stage. Other stages return an empty dict; their losses are logged as local losses.
        """
        self.comm.wait_credit(self.iteration)
        batch = self._begin(data, optim_wrapper)
        losses = None
        with optim_wrapper.optim_context(self), suppress(BlockDone):
            losses = self.module(batch.inputs, batch.data_samples, mode='loss')
        log: dict[str, Tensor] = {}
        if losses is None:
            optim_wrapper.finish_iteration()
        else:
            loss, log = self.module.parse_losses(losses)
            optim_wrapper.update_params(loss if self._task_reducer is None else self._task_reducer.prepare(loss))
        self._batch = None
        self.iteration += 1
        return log

    def wait(self) -> None:
        """Finish the reduction of gradients over the replicas of this stage."""
        for reducer in self._reducers():
            reducer.wait()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context for gradient accumulation, in which gradients are not reduced over the replicas."""
        with ExitStack() as stack:
            for reducer in self._reducers():
                stack.enter_context(reducer.no_sync())
            yield

    def _reducers(self) -> list[BlockReducer]:
        return [*self.block_reducers.values(), *([] if self._task_reducer is None else [self._task_reducer])]

    def forward(self, *args, **kwargs) -> Any:
        return self.module(*args, **kwargs)

    def val_step(self, data: Any) -> list:
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        return self.module.test_step(data)

    def _begin(self, data: Any, optim_wrapper: OptimWrapper) -> Batch:
        """Make this stage's batch and prepare the one to send. Later stages take over the hyper-parameters of the first."""
        groups = None
        if self.stage_rank.is_first:
            data = self.module.data_preprocessor(data, True)
            inputs = data['inputs']
            groups = [{k: v for k, v in group.items() if k != 'params'} for group in optim_wrapper.optimizer.param_groups]
            groups, self._groups = (None if groups == self._groups else groups), groups
            batch = Batch(self.iteration, inputs, data['data_samples'], inputs, groups=groups)
        else:
            batch = self._batch = data
            for group, new in zip(optim_wrapper.optimizer.param_groups, batch.groups or [], strict=bool(batch.groups)):
                group.update(new)
        self._outgoing = replace(batch, inputs=batch.inputs if self._sends_images else batch.inputs.to('meta'))
        return batch

    # -- hooks of the backbone ---------------------------------------------------------------------------------------------

    def _output_units(self, stages) -> list:
        """The units of these stages whose outputs the model's neck or head uses."""
        local = self.backbone.local
        names = {unit.name for stage in stages for unit in local.plan.blocks[stage]}
        names |= {unit.name for unit in local.plan.frozen} if 0 in stages else set()
        return [unit for unit in local.output_units if unit.name in names]

    def _meta_input(self, backbone: nn.Module, args: tuple) -> tuple | None:
        return None if self._batch is None else (args[0].to('meta'), *args[1:])

    def _shapes_only_(self, paths: Iterable[str]) -> None:
        for path in paths:
            module = self.backbone.get_submodule(path)
            module.forward = partial(_shapes_only, module.forward, {})

    def _replace_output(self, path: str, is_entry: bool, unit: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._batch is None:
            return None
        return self._batch.feature if is_entry else self._batch.taps[path]

    def _capture_tap(self, path: str, unit: nn.Module, args: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._outgoing.taps[path] = output.detach()

    def _end_block(self, unit: nn.Module, args: tuple, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        path = self.backbone.local.plan.blocks[self.stage_rank.stage][-1].output
        self._outgoing.feature = self._outgoing.taps.get(path, output.detach())
        self.comm.send(self._outgoing)
        self._outgoing = None
        raise BlockDone

    # -- called by the runner and the loop ---------------------------------------------------------------------------------

    def reply(self, steps: int, stepped: bool) -> None:
        """Send the result of the latest batch to the previous stage.

        Args:
            steps: Number of steps that this stage's optimizer has taken.
            stepped: Whether the optimizer has stepped for this batch.
        """
        unit = None
        if self._is_copied and stepped:
            first = self.backbone.local.plan.blocks[self.stage_rank.stage][0].of(self.backbone)
            unit = {name: value.clone() for name, value in first.state_dict().items() if value.is_floating_point()}
        self.comm.reply(self.iteration - 1, steps, unit)

    def gather_(self, content: str, last: bool = False) -> list[dict]:
        """Fill the first stage's model in with the tensors of the other stages. ``shard.empty_`` undoes this.

        Args:
            content: ``'weights'``, or ``'checkpoint'`` (weights and optimizer state).
            last: Whether the run ends, so that no batch follows.

        Returns:
            The contents of the later stages.
        """
        contents = [*self.comm.request(content, last).values()]
        self.shard.fill_({name: value for content in contents for name, value in content['weights'].items()})
        return contents


def _check_local(local: LocalBlocks) -> None:
    """Raise if stages can't train these blocks: a stage sends the one before it only the first unit of its block."""
    if local.window > 1:
        raise ConfigError(
            f'a pipeline stage trains one block by itself, not window={local.window}: set window=1, or train in one process'
        )
    for head in local.values():
        if head.transfer.momentum is not None and head.source != local.plan.blocks[head.block][0]:
            raise ConfigError(
                f'a pipeline updates momentum copies of the first unit of the next block, not of {head.source.name}: set '
                "transfer.source_unit='next', or train in one process"
            )


def _shapes_only(forward, known: dict, *args, **kwargs) -> Any:
    """Replaces the forward pass of a unit of another stage: returns meta tensors, cached in ``known`` by the input shapes."""
    key = str(tree_map_only(Tensor, lambda x: tuple(x.shape), (args, kwargs)))
    if key not in known:
        args, kwargs = tree_map_only(Tensor, lambda x: x.to('meta'), (args, kwargs))
        with torch.no_grad():
            known[key] = forward(*args, **kwargs)
    return known[key]
