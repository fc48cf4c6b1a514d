"""One stage of a pipeline: a model wrapper that trains one block on batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed import Store
from torch.utils._pytree import tree_map_only

from mmman.errors import PeerError
from mmman.local.blocks import localized_backbone
from mmman.local.scopes import trained_parameters
from mmman.parallel.ddp import BlockReducer
from mmman.parallel.pipeline.channel import Inbox, Outbox
from mmman.parallel.pipeline.parts import Part
from mmman.parallel.pipeline.place import Place, stage_groups
from mmman.parallel.pipeline.watchdog import Watchdog
from mmman.registry import MODEL_WRAPPERS


@dataclass
class Batch:
    """What a stage sends forward of a batch.

    Attributes:
        iteration: Which batch it is.
        inputs: The model's input batch, (B, 3, H, W), normalised; on the meta device where no later local head uses pixels.
        data_samples: The batch's data samples, as the data preprocessor returns them.
        feature: The block's output, detached.
        taps: Outputs of units that neck or head take, by the path of the unit.
        groups: The first stage's optimizer hyper-parameters, where they have changed: every stage uses its learning rates.
    """

    iteration: int
    inputs: Tensor
    data_samples: Any
    feature: Tensor
    taps: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict] | None = None


@dataclass
class Done:
    """What a stage sends back of a batch: it is also the leave to send another.

    Attributes:
        iteration: Which batch it was.
        steps: How often the stage's optimizer has stepped.
        unit: The state of the stage's first unit after the step; None where the optimizer accumulates, or nobody copies it.
        log: What it logged, and what later stages have sent meanwhile.
    """

    iteration: int
    steps: int
    unit: dict[str, Tensor] | None
    log: list[dict[str, float]]


@dataclass
class Request:
    """Asks all later stages to finish the batches on their way and, for a ``content``, to send that of their part along."""

    content: str | None = None
    last: bool = False


@dataclass
class Answer:
    """Answers a request: the contents by stage."""

    parts: dict[int, Any]
    log: list[dict[str, float]]


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
        follow: Moves the momentum copies towards a state of the next block's first unit; called with the number of steps that
            the next stage had taken and that state, in order. Set by :class:`mmman.EMABiasHook`.
    """

    def __init__(self, module: nn.Module, place: Place, staleness: int) -> None:
        super().__init__()
        self.module = module
        self.place = place
        self.staleness = staleness
        self.part = Part(module, place.stage)
        self.backbone = localized_backbone(module)
        local = self.backbone.local
        local.only = place.stage
        self.iteration = 0
        self.block_reducers: dict[int, BlockReducer] = {}
        self._task_reducer: BlockReducer | None = None
        self.follow: Callable[[int, Mapping[str, Tensor]], None] | None = None
        self._log: list[dict[str, float]] = []
        self._groups: list[dict] | None = None
        self._batch: Batch | None = None
        self._outgoing: Batch | None = None
        self._sends_images = any(head.uses_images for head in [*local.values()][place.stage + 1 :])
        self._copied = place.stage > 0 and [*local.values()][place.stage - 1].transfer.momentum is not None

    def connect(self, store: Store, watchdog: Watchdog) -> None:
        """Open the channels to the neighbours."""
        self.watchdog = watchdog
        forward, back = (stage_groups(self.place, store, direction) for direction in ('forward', 'back'))
        limit, before, after = self.staleness + 1, self.place.stage - 1, self.place.stage + 1
        if not self.place.is_first:
            self._from_previous = Inbox(forward, before, limit, watchdog.check)
            self._to_previous = Outbox(back, before, limit)
        if not self.place.is_last:
            self._from_next = Inbox(back, after, limit, watchdog.check)
            self._to_next = Outbox(forward, after, limit)

    def start_(self, optimizer: torch.optim.Optimizer, device: torch.device | str, iteration: int) -> None:
        """Drop what other stages hold and get ready for batch ``iteration``. Called once, when training starts."""
        self.part.split_(optimizer, device)
        self.iteration = self._finished = iteration
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
        self.await_leave()
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
        self._send(self._to_next, 1, self._outgoing)
        self._outgoing = None
        raise BlockDone

    # -- messages ----------------------------------------------------------------------------------------------------------

    def receive(self) -> Batch | Request:
        """The next message of the stage before, waited for."""
        return self._receive(self._from_previous, -1)

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
        self._send(self._to_previous, -1, Done(self.iteration - 1, steps, unit, self._noted()))

    def note(self, log: list[dict[str, float]]) -> None:
        """Pass on what this stage or a later one has logged, by name; on the first stage, log it."""
        if not self.place.is_first:
            self._log += log
            return
        hub = MessageHub.get_current_instance()
        for name, value in (item for scalars in log for item in scalars.items()):
            hub.update_scalar(name, value)

    def await_leave(self) -> None:
        """Wait until this stage may start its next batch."""
        while not self.place.is_last and self._finished < self.iteration - self.staleness:
            self._take(self._receive(self._from_next, 1))

    def request(self, content: str | None = None, last: bool = False) -> dict[int, Any]:
        """Let all later stages finish the batches on their way, and collect the contents of their parts.

        Args:
            content: None, ``'weights'``, or ``'checkpoint'``: weights and optimizer state.
            last: No batch follows.

        Returns:
            The contents by stage.
        """
        if self.place.is_last:
            return {}
        self._send(self._to_next, 1, Request(content, last))
        while isinstance(message := self._receive(self._from_next, 1), Done):
            self._take(message)
        self.note(message.log)
        return message.parts

    def gather_(self, content: str, last: bool = False) -> list[dict]:
        """Complete the first stage's model by what the others hold; ``part.empty_`` undoes it. Returns their contents."""
        contents = [*self.request(content, last).values()]
        self.part.fill_({name: value for part in contents for name, value in part['weights'].items()})
        return contents

    def answer(self, parts: dict[int, Any]) -> None:
        """Answer a request of the stage before, once the later stages have answered it, with the parts of all of them."""
        self._send(self._to_previous, -1, Answer(parts, self._noted()))

    def close(self) -> None:
        """End the channels in order."""
        ends = [(self._to_next, self._from_next)] if not self.place.is_last else []
        ends += [(self._to_previous, self._from_previous)] if not self.place.is_first else []
        for outbox, _ in ends:
            outbox.close()
        for _, inbox in ends:
            inbox.join()

    def _take(self, done: Done) -> None:
        self._finished = done.iteration + 1
        if done.unit is not None:
            self.follow(done.steps, done.unit)
        self.note(done.log)

    def _noted(self) -> list[dict[str, float]]:
        log, self._log = self._log, []
        return log

    def _send(self, outbox: Outbox, offset: int, message: Any) -> None:
        with self._peer(offset):
            outbox.send(message)

    def _receive(self, inbox: Inbox, offset: int) -> Any:
        with self._peer(offset):
            return inbox.receive()

    @contextmanager
    def _peer(self, offset: int) -> Iterator[None]:
        """Names the neighbour that a connection was lost to."""
        try:
            yield
        except PeerError:
            raise
        except ConnectionError as error:
            peer = self.place.at(self.place.rank + offset)
            self.watchdog.report(f'{peer}: its connection to {self.place} broke: killed? ({error})')
            self.watchdog.check()


def _shapes_only(forward, known: dict, *args, **kwargs) -> Any:
    """Stands for the forward pass of a unit of another stage, which only makes shapes: the same ones for the same ones."""
    key = str(tree_map_only(Tensor, lambda x: tuple(x.shape), (args, kwargs)))
    if key not in known:
        args, kwargs = tree_map_only(Tensor, lambda x: x.to('meta'), (args, kwargs))
        with torch.no_grad():
            known[key] = forward(*args, **kwargs)
    return known[key]
