"""Messages between adjacent stages: batches and requests go forward, their results and answers go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmengine.logging import MessageHub
from torch import Tensor
from torch.distributed import Store

from mmman.errors import PeerError
from mmman.parallel.pipeline.channel import Receiver, Sender
from mmman.parallel.pipeline.stage_rank import StageRank, stage_groups
from mmman.watchdog.monitor import Watchdog


@dataclass
class Batch:
    """A batch, as a stage sends it to the next one.

    Attributes:
        iteration: Iteration of the batch, from 0.
        inputs: The model's input batch, (B, 3, H, W), normalised. On the meta device if no later local head uses pixels.
        data_samples: The batch's data samples, as returned by the data preprocessor.
        feature: The block's output, detached.
        taps: Outputs of units that the neck or head uses, by the path of the unit.
        groups: Hyper-parameters of the first stage's optimizer, which every stage uses. None if they have not changed since
            the last batch.
    """

    iteration: int
    inputs: Tensor
    data_samples: Any
    feature: Tensor
    taps: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict] | None = None


@dataclass
class Done:
    """Result of a batch, sent to the previous stage. It is also a credit (flow control) for another batch.

    Attributes:
        iteration: Iteration of the batch, from 0.
        steps: Number of steps that the stage's optimizer has taken.
        unit: State of the stage's first unit after the step. None if the optimizer accumulates gradients or if the previous
            stage has no momentum copy.
        log: Scalars that the stage logged, and those that it received from later stages since its last message.
    """

    iteration: int
    steps: int
    unit: dict[str, Tensor] | None
    log: list[dict[str, float]]


@dataclass
class Request:
    """Asks all later stages to finish the batches in flight.

    Attributes:
        content: What each stage adds to the answer: None, ``'weights'``, or ``'checkpoint'`` (weights and optimizer state).
        last: Whether the run ends, so that no batch follows.
    """

    content: str | None = None
    last: bool = False


@dataclass
class Answer:
    """Answer to a request: the requested contents by stage, and the scalars logged since the last message."""

    contents: dict[int, Any]
    log: list[dict[str, float]]


class StageComm:
    """Communication of a stage with the previous and the next stage.

    Args:
        stage_rank: Position of this stage.
        staleness: S. The stage may start batch b when the next one has finished batch b-1-S.

    Attributes:
        on_next_unit: Callback for the states of the next block's first unit, in order. Its arguments are the number of steps
            that the next stage's optimizer has taken, and the state. :class:`mmman.EMABiasHook` sets it.
        finished: Number of batches that the next stage has finished.
    """

    def __init__(self, stage_rank: StageRank, staleness: int) -> None:
        self.stage_rank = stage_rank
        self.staleness = staleness
        self.on_next_unit: Callable[[int, Mapping[str, Tensor]], None] | None = None
        self.finished = 0
        self._log: list[dict[str, float]] = []

    def connect(self, store: Store, watchdog: Watchdog) -> None:
        """Open the channels to the adjacent stages. ``watchdog`` is checked while waiting, and notified of lost connections."""
        self._watchdog = watchdog
        forward, back = (stage_groups(self.stage_rank, store, direction) for direction in ('forward', 'back'))
        limit, before, after = self.staleness + 1, self.stage_rank.stage - 1, self.stage_rank.stage + 1
        if not self.stage_rank.is_first:
            self._from_previous = Receiver(forward, before, limit, watchdog.check)
            self._to_previous = Sender(back, before, limit)
        if not self.stage_rank.is_last:
            self._from_next = Receiver(back, after, limit, watchdog.check)
            self._to_next = Sender(forward, after, limit)

    def close(self) -> None:
        """Close the channels: first the sending ends, then wait for the peers to close theirs."""
        ends = [(self._to_next, self._from_next)] if not self.stage_rank.is_last else []
        ends += [(self._to_previous, self._from_previous)] if not self.stage_rank.is_first else []
        for sender, _ in ends:
            sender.close()
        for _, receiver in ends:
            receiver.join()

    def wait_credit(self, iteration: int) -> None:
        """Block until the next stage has sent enough credits for this stage to start batch ``iteration``."""
        while not self.stage_rank.is_last and self.finished < iteration - self.staleness:
            self._handle_done(self._recv_next())

    def recv(self) -> Batch | Request:
        """Wait for the next message of the previous stage and return it."""
        with self._peer_errors(-1):
            return self._from_previous.recv()

    def send(self, batch: Batch) -> None:
        """Send a batch to the next stage."""
        self._send_next(batch)

    def reply(self, iteration: int, steps: int, unit: dict[str, Tensor] | None) -> None:
        """Send the result of a batch to the previous stage. For the arguments see :class:`Done`."""
        self._send_previous(Done(iteration, steps, unit, self._pop_log()))

    def request(self, content: str | None = None, last: bool = False) -> dict[int, Any]:
        """Let all later stages finish the batches in flight, and collect the contents of their shards.

        Args:
            content: None, ``'weights'``, or ``'checkpoint'`` (weights and optimizer state).
            last: Whether the run ends, so that no batch follows.

        Returns:
            The contents by stage.
        """
        if self.stage_rank.is_last:
            return {}
        self._send_next(Request(content, last))
        while isinstance(message := self._recv_next(), Done):
            self._handle_done(message)
        self.add_log(message.log)
        return message.contents

    def answer(self, contents: dict[int, Any]) -> None:
        """Answer a request of the previous stage with the contents of this stage and all later ones, by stage."""
        self._send_previous(Answer(contents, self._pop_log()))

    def add_log(self, log: list[dict[str, float]]) -> None:
        """Log scalars on the first stage. Other stages forward them with their next message to the previous stage."""
        if not self.stage_rank.is_first:
            self._log += log
            return
        hub = MessageHub.get_current_instance()
        for name, value in (item for scalars in log for item in scalars.items()):
            hub.update_scalar(name, value)

    def _handle_done(self, done: Done) -> None:
        self.finished = done.iteration + 1
        if done.unit is not None:
            self.on_next_unit(done.steps, done.unit)
        self.add_log(done.log)

    def _pop_log(self) -> list[dict[str, float]]:
        log, self._log = self._log, []
        return log

    def _send_next(self, message: Batch | Request) -> None:
        with self._peer_errors(1):
            self._to_next.send(message)

    def _recv_next(self) -> Done | Answer:
        with self._peer_errors(1):
            return self._from_next.recv()

    def _send_previous(self, message: Done | Answer) -> None:
        with self._peer_errors(-1):
            self._to_previous.send(message)

    @contextmanager
    def _peer_errors(self, offset: int) -> Iterator[None]:
        """Report a lost connection to the watchdog and raise a :class:`PeerError` that names the peer.

        ``offset`` is the peer's rank minus this one's: -1 or 1.
        """
        try:
            yield
        except PeerError:
            raise
        except ConnectionError as error:
            peer = self.stage_rank.at(self.stage_rank.rank + offset)
            self._watchdog.report(f'{peer}: lost its connection to {self.stage_rank}, possibly because it was killed ({error})')
            self._watchdog.check()
