"""Point-to-point channels between adjacent stages. They carry Python objects and send tensors without pickling their data."""

from __future__ import annotations

import io
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from queue import Empty, Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmman.parallel.pipeline.stage_rank import NO_TIMEOUT

POLL_S = 0.2
"""Seconds between two calls of ``check`` while :meth:`Receiver.recv` waits."""
END = None
"""The last message of a channel."""


class Sender:
    """The sending end of a channel. Sends are asynchronous; :meth:`send` blocks while ``limit`` messages are in flight.

    Args:
        groups: Process groups by the device type of the tensors that they carry. ``'cpu'`` is required.
        peer: Rank of the receiver in these groups.
        limit: Maximum number of messages in flight.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup], peer: int, limit: int) -> None:
        self._groups, self._peer, self._limit = groups, peer, limit
        self._in_flight: deque[list[tuple[dist.Work, Tensor]]] = deque()

    def send(self, message: Any) -> None:
        """Send a picklable object. Its tensors must not be modified until the receiver has them.

        Raises:
            ConnectionError: The connection to the receiver is lost.
        """
        while len(self._in_flight) >= self._limit:
            self._wait_for_oldest()
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(message)
        body = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        works = []
        for tensor in (torch.tensor([len(body)]), body, *pickler.tensors):
            if tensor.numel():
                with _connection_errors():
                    works.append((self._groups[tensor.device.type].send([_flat(tensor)], self._peer, 0), tensor))
        self._in_flight.append(works)

    def close(self) -> None:
        """Send the end-of-channel message and wait until all messages are sent."""
        self.send(END)
        while self._in_flight:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for work, _ in self._in_flight.popleft():
            with _connection_errors():
                work.wait(NO_TIMEOUT)


class Receiver:
    """The receiving end of a channel. A thread receives messages in the background and queues up to ``limit`` of them.

    Args:
        groups, limit: See :class:`Sender`.
        peer: Rank of the sender in the groups.
        check: Called repeatedly while :meth:`recv` waits. It raises an error if another process has failed.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup], peer: int, limit: int, check: Callable[[], None]) -> None:
        self._groups, self._peer, self._check = groups, peer, check
        self._queue: Queue = Queue(max(limit, 1))
        self._device = torch.cuda.current_device() if 'cuda' in groups else None
        self._thread = threading.Thread(target=self._listen, name=f'receiver from stage {peer}', daemon=True)
        self._thread.start()

    def recv(self) -> Any:
        """Wait for the next message and return it.

        Raises:
            ConnectionError: The connection to the sender is lost.
        """
        while True:
            try:
                message, event, tensors = self._queue.get(timeout=POLL_S)
            except Empty:
                self._check()
                continue
            if isinstance(message, Exception):
                raise message
            if event is not None:
                event.wait()
                for tensor in tensors:  # allocated on the receiver thread's stream, used on the current one
                    tensor.record_stream(torch.cuda.current_stream())
            return message

    def join(self) -> None:
        """Wait until the sender has closed the channel."""
        self._thread.join()

    def _listen(self) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device is not None else nullcontext()
        with stream:
            while True:
                event, tensors = None, []
                try:
                    message = self._recv_message(tensors)
                    if tensors:
                        event = torch.cuda.current_stream().record_event()
                except Exception as error:  # recv() raises it in the caller's thread
                    message = error
                if message is END:
                    return
                self._queue.put((message, event, tensors))
                if isinstance(message, Exception):
                    return

    def _recv_message(self, on_gpu: list[Tensor]) -> Any:
        def recv_tensor(*meta) -> Tensor:
            tensor = self._recv_tensor(*meta)
            if tensor.is_cuda:
                on_gpu.append(tensor)
            return tensor

        length = self._recv_tensor((1,), (1,), torch.int64, 'cpu')
        body = self._recv_tensor((int(length),), (1,), torch.uint8, 'cpu')
        return _Unpickler(io.BytesIO(body.numpy().tobytes()), recv_tensor).load()

    def _recv_tensor(self, shape: tuple, stride: tuple, dtype: torch.dtype, device: str) -> Tensor:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        if tensor.numel():
            with _connection_errors():
                self._groups[device].recv([_flat(tensor)], self._peer, 0).wait(NO_TIMEOUT)
        return tensor


def _flat(tensor: Tensor) -> Tensor:
    """View the memory of a dense tensor as a vector. Sending this view preserves the memory layout."""
    return tensor.as_strided((tensor.numel(),), (1,))


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Convert the RuntimeError that a process group raises on a lost connection to a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None


class _Pickler(pickle.Pickler):
    """Pickles an object without its dense tensors and collects them. A tensor that occurs several times is collected once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self._seen: dict[int, tuple] = {}

    def persistent_id(self, obj: Any) -> tuple | None:
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_meta:
            return None
        if id(obj) not in self._seen:
            tensor = obj.detach()
            if torch.empty_like(tensor).stride() != tensor.stride():  # its memory has gaps or overlaps
                tensor = tensor.contiguous()
            self._seen[id(obj)] = (len(self.tensors), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type)
            self.tensors.append(tensor)
        return self._seen[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Unpickles an object and receives its tensors."""

    def __init__(self, file: io.BytesIO, recv_tensor: Callable[[tuple, tuple, torch.dtype, str], Tensor]) -> None:
        super().__init__(file)
        self._recv_tensor = recv_tensor
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple) -> Tensor:
        # The pickle refers to tensors in the order in which they were sent.
        index, *meta = pid
        if index not in self._tensors:
            self._tensors[index] = self._recv_tensor(*meta)
        return self._tensors[index]
