"""One stage of a pipeline: a model wrapper that trains one block on batch after batch."""

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

from mmman.local.blocks import localized_backbone
from mmman.local.scopes import trained_parameters
from mmman.parallel.ddp import BlockReducer
from mmman.parallel.pipeline.neighbours import Batch, Neighbours
from mmman.parallel.pipeline.parts import Part
from mmman.parallel.pipeline.place import Place
from mmman.registry import MODEL_WRAPPERS


class BlockDone(Exception):  # noqa: N818  no error
    """Ends a forward pass at the end of a stage's block."""


@MODEL_WRAPPERS.register_module()
class PipelineStage(nn.Module):
    """A stage's model: the stock model, of which one block computes.

    The stock forward pass runs as ever. Units of earlier stages compute nothing but shapes (they are on the meta device); the
    output of the last of them, and of every tap, is replaced by what came from the stage before. At the end of this stage's
    block the pass ends; on the last stage it goes on through neck and head.

    Args:
        module: The localised model.
        place: Which stage this is.
        staleness: S. This stage starts batch b when the next one has finished batch b-1-S, and its momentum copies then follow
            exactly what the next block's first unit was at that time. 0: as in an ordinary run, and no two neighbours ever
            compute at once.

    Attributes:
        block_reducers: For the optim wrapper: what reduces this block's gradients over the replicas, by the block's number.
        neighbours: The stages before and after.
    """

    def __init__(self, module: nn.Module, place: Place, staleness: int) -> None:
        super().__init__()
        self.module = module
        self.place = place
        self.neighbours = Neighbours(place, staleness)
        self.part = Part(module, place.stage)
        self.backbone = localized_backbone(module)
        local = self.backbone.local
        local.only = place.stage
        self.iteration = 0
        self.block_reducers: dict[int, BlockReducer] = {}
        self._task_reducer: BlockReducer | None = None
        self._groups: list[dict] | None = None
        self._batch: Batch | None = None
        self._outgoing: Batch | None = None
        self._sends_images = any(head.uses_images for head in [*local.values()][place.stage + 1 :])
        self._copied = place.stage > 0 and [*local.values()][place.stage - 1].transfer.momentum is not None

    def start_(self, optimizer: torch.optim.Optimizer, device: torch.device | str, iteration: int) -> None:
        """Drop what other stages hold and get ready for batch ``iteration``. Called once, when training starts."""
        self.part.split_(optimizer, device)
        self.iteration = self.neighbours.finished = iteration
        blocks, stage = self.backbone.local.plan.blocks, self.place.stage
        if self.place.replicas > 1:
            reducer = BlockReducer(trained_parameters(self.module)[stage].items())
            if self.place.is_last:
                self._task_reducer = reducer
            else:
                self.block_reducers[stage + 1] = reducer
        if not self.place.is_first:
            self.backbone.register_forward_pre_hook(self._meta_input)
            entry = blocks[stage - 1][-1].output
            taps = [unit.output for unit in self._tapped(range(stage))] if self.place.is_last else []
            for path in dict.fromkeys([*taps, entry]):
                self.backbone.get_submodule(path).register_forward_hook(partial(self._received, path, path == entry))
            earlier = [unit for block in (self.backbone.local.plan.frozen, *blocks[:stage]) for unit in block]
            self._shapes_only_([path for unit in earlier for path in unit.modules])
        if not self.place.is_last:
            self._shapes_only_(self.backbone.local.inner_norms)  # the last stage's, on outputs from inside this block
            for unit in self._tapped([stage]):
                self.backbone.get_submodule(unit.output).register_forward_hook(partial(self._tap, unit.output))
            self.backbone.get_submodule(blocks[stage][-1].output).register_forward_hook(self._leave)

    # -- one batch ---------------------------------------------------------------------------------------------------------

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Train this stage's block on a batch.

        Args:
            data: On the first stage what the data loader gives, else the :class:`Batch` of the stage before.
            optim_wrapper: A :class:`mmman.LocalLearningOptimWrapper`.

        Returns:
            The model's losses on the last stage; nothing on others, whose losses are logged as local losses.
        """
        self.neighbours.await_leave(self.iteration)
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
        """Context of an accumulation: gradients stay with their replica."""
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
        groups = None
        if self.place.is_first:
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

    def _tapped(self, stages) -> list:
        """The units of these stages whose output the model's neck or head takes."""
        local = self.backbone.local
        names = {unit.name for stage in stages for unit in local.plan.blocks[stage]}
        names |= {unit.name for unit in local.plan.frozen} if 0 in stages else set()
        return [unit for unit in local.tapped if unit.name in names]

    def _meta_input(self, backbone: nn.Module, args: tuple) -> tuple | None:
        return None if self._batch is None else (args[0].to('meta'), *args[1:])

    def _shapes_only_(self, paths: Iterable[str]) -> None:
        for path in paths:
            module = self.backbone.get_submodule(path)
            module.forward = partial(_shapes_only, module.forward, {})

    def _received(self, path: str, is_entry: bool, unit: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._batch is None:
            return None
        return self._batch.feature if is_entry else self._batch.taps[path]

    def _tap(self, path: str, unit: nn.Module, args: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._outgoing.taps[path] = output.detach()

    def _leave(self, unit: nn.Module, args: tuple, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        path = self.backbone.local.plan.blocks[self.place.stage][-1].output
        self._outgoing.feature = self._outgoing.taps.get(path, output.detach())
        self.neighbours.send(self._outgoing)
        self._outgoing = None
        raise BlockDone

    # -- what the runner and the loop ask for ------------------------------------------------------------------------------

    def reply(self, steps: int, stepped: bool) -> None:
        """Tell the stage before that a batch is done.

        Args:
            steps: How often this stage's optimizer has stepped so far.
            stepped: Whether it has for this batch.
        """
        unit = None
        if self._copied and stepped:
            first = self.backbone.local.plan.blocks[self.place.stage][0].of(self.backbone)
            unit = {name: value.clone() for name, value in first.state_dict().items() if value.is_floating_point()}
        self.neighbours.reply(self.iteration - 1, steps, unit)

    def gather_(self, content: str, last: bool = False) -> list[dict]:
        """Complete the first stage's model by what the others hold; ``part.empty_`` undoes it. Returns their contents."""
        contents = [*self.neighbours.request(content, last).values()]
        self.part.fill_({name: value for part in contents for name, value in part['weights'].items()})
        return contents


def _shapes_only(forward, known: dict, *args, **kwargs) -> Any:
    """Stands for the forward pass of a unit of another stage, which only makes shapes: the same ones for the same ones."""
    key = str(tree_map_only(Tensor, lambda x: tuple(x.shape), (args, kwargs)))
    if key not in known:
        args, kwargs = tree_map_only(Tensor, lambda x: x.to('meta'), (args, kwargs))
        with torch.no_grad():
            known[key] = forward(*args, **kwargs)
    return known[key]
