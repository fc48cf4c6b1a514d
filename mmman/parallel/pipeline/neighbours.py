"""What a stage and its neighbours tell each other: batches forward, what they have become back, and requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmengine.logging import MessageHub
from torch import Tensor
from torch.distributed import Store

from mmman.errors import PeerError
from mmman.parallel.pipeline.channel import Inbox, Outbox
from mmman.parallel.pipeline.place import Place, stage_groups
from mmman.watchdog.monitor import Watchdog


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


class Neighbours:
    """The stages before and after one.

    Args:
        place: The stage.
        staleness: S: the stage may start batch b when the next one has finished batch b-1-S.

    Attributes:
        follow: Called with every state of the next block's first unit, in order: the number of steps that the next stage has
            taken, and that state. :class:`mmman.EMABiasHook` sets it.
    """

    def __init__(self, place: Place, staleness: int) -> None:
        self.place = place
        self.staleness = staleness
        self.follow: Callable[[int, Mapping[str, Tensor]], None] | None = None
        self.finished = 0  # how many batches the next stage has finished
        self._log: list[dict[str, float]] = []

    def connect(self, store: Store, watchdog: Watchdog) -> None:
        """Open the channels."""
        self._watchdog = watchdog
        forward, back = (stage_groups(self.place, store, direction) for direction in ('forward', 'back'))
        limit, before, after = self.staleness + 1, self.place.stage - 1, self.place.stage + 1
        if not self.place.is_first:
            self._from_previous = Inbox(forward, before, limit, watchdog.check)
            self._to_previous = Outbox(back, before, limit)
        if not self.place.is_last:
            self._from_next = Inbox(back, after, limit, watchdog.check)
            self._to_next = Outbox(forward, after, limit)

    def close(self) -> None:
        """End the channels in order."""
        ends = [(self._to_next, self._from_next)] if not self.place.is_last else []
        ends += [(self._to_previous, self._from_previous)] if not self.place.is_first else []
        for outbox, _ in ends:
            outbox.close()
        for _, inbox in ends:
            inbox.join()

    def await_leave(self, iteration: int) -> None:
        """Wait until this stage may start a batch."""
        while not self.place.is_last and self.finished < iteration - self.staleness:
            self._take(self._hear_next())

    def receive(self) -> Batch | Request:
        """The next message of the stage before, waited for."""
        with self._peer(-1):
            return self._from_previous.receive()

    def send(self, batch: Batch) -> None:
        """Send a batch on."""
        self._tell_next(batch)

    def reply(self, iteration: int, steps: int, unit: dict[str, Tensor] | None) -> None:
        """Tell the stage before that a batch is done; arguments as in :class:`Done`."""
        self._tell_previous(Done(iteration, steps, unit, self._noted()))

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
        self._tell_next(Request(content, last))
        while isinstance(message := self._hear_next(), Done):
            self._take(message)
        self.note(message.log)
        return message.parts

    def answer(self, parts: dict[int, Any]) -> None:
        """Answer a request of the stage before, once the later stages have answered it, with the parts of all of them."""
        self._tell_previous(Answer(parts, self._noted()))

    def note(self, log: list[dict[str, float]]) -> None:
        """Pass on what this stage or a later one has logged, by name; on the first stage, log it."""
        if not self.place.is_first:
            self._log += log
            return
        hub = MessageHub.get_current_instance()
        for name, value in (item for scalars in log for item in scalars.items()):
            hub.update_scalar(name, value)

    def _take(self, done: Done) -> None:
        self.finished = done.iteration + 1
        if done.unit is not None:
            self.follow(done.steps, done.unit)
        self.note(done.log)

    def _noted(self) -> list[dict[str, float]]:
        log, self._log = self._log, []
        return log

    def _tell_next(self, message: Batch | Request) -> None:
        with self._peer(1):
            self._to_next.send(message)

    def _hear_next(self) -> Done | Answer:
        with self._peer(1):
            return self._from_next.receive()

    def _tell_previous(self, message: Done | Answer) -> None:
        with self._peer(-1):
            self._to_previous.send(message)

    @contextmanager
    def _peer(self, offset: int) -> Iterator[None]:
        """Names the neighbour that a connection was lost to."""
        try:
            yield
        except PeerError:
            raise
        except ConnectionError as error:
            peer = self.place.at(self.place.rank + offset)
            self._watchdog.report(f'{peer}: its connection to {self.place} broke: killed? ({error})')
            self._watchdog.check()
