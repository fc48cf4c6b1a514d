"""Messages between neighbouring stages: Python objects, their tensors sent as they are."""

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

from mmman.parallel.pipeline.place import PATIENT

POLL_S = 0.2
END = None


class Outbox:
    """The sending end of a channel. Sends run while the caller goes on; with too many under way it waits.

    Args:
        groups: Process groups by the type of device whose tensors they carry; ``'cpu'`` at least.
        peer: Rank of the receiver in them.
        limit: How many messages may be under way.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup], peer: int, limit: int) -> None:
        self._groups, self._peer, self._limit = groups, peer, limit
        self._underway: deque[list[tuple[dist.Work, Tensor]]] = deque()

    def send(self, message: Any) -> None:
        """Send a picklable object. Its tensors must not change until the receiver has them.

        Raises:
            ConnectionError: The receiver is gone.
        """
        while len(self._underway) >= self._limit:
            self._wait_for_oldest()
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(message)
        body = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        works = []
        for tensor in (torch.tensor([len(body)]), body, *pickler.tensors):
            if tensor.numel():
                with _connection():
                    works.append((self._groups[tensor.device.type].send([_flat(tensor)], self._peer, 0), tensor))
        self._underway.append(works)

    def close(self) -> None:
        """Send what is under way, and that nothing follows."""
        self.send(END)
        while self._underway:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for work, _ in self._underway.popleft():
            with _connection():
                work.wait(PATIENT)


class Inbox:
    """The receiving end of a channel: a thread takes messages in while the caller computes, ``limit`` ahead at most.

    Args:
        groups, limit: As of :class:`Outbox`.
        peer: Rank of the sender in the groups.
        check: Called while waiting; raises what has gone wrong elsewhere.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup], peer: int, limit: int, check: Callable[[], None]) -> None:
        self._groups, self._peer, self._check = groups, peer, check
        self._queue: Queue = Queue(max(limit, 1))
        self._device = torch.cuda.current_device() if 'cuda' in groups else None
        self._thread = threading.Thread(target=self._listen, name=f'inbox from stage {peer}', daemon=True)
        self._thread.start()

    def receive(self) -> Any:
        """The next message, waited for.

        Raises:
            ConnectionError: The sender is gone.
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
                for tensor in tensors:  # made on the listener's stream, used on this one
                    tensor.record_stream(torch.cuda.current_stream())
            return message

    def join(self) -> None:
        """Wait for the sender's end of the channel to be closed."""
        self._thread.join()

    def _listen(self) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if self._device is not None else nullcontext()
        with stream:
            while True:
                event, tensors = None, []
                try:
                    message = self._take(tensors)
                    if tensors:
                        event = torch.cuda.current_stream().record_event()
                except Exception as error:  # raised where the message is waited for
                    message = error
                if message is END:
                    return
                self._queue.put((message, event, tensors))
                if isinstance(message, Exception):
                    return

    def _take(self, on_gpu: list[Tensor]) -> Any:
        def receive(*meta) -> Tensor:
            tensor = self._tensor(*meta)
            if tensor.is_cuda:
                on_gpu.append(tensor)
            return tensor

        length = self._tensor((1,), (1,), torch.int64, 'cpu')
        body = self._tensor((int(length),), (1,), torch.uint8, 'cpu')
        return _Unpickler(io.BytesIO(body.numpy().tobytes()), receive).load()

    def _tensor(self, shape: tuple, stride: tuple, dtype: torch.dtype, device: str) -> Tensor:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        if tensor.numel():
            with _connection():
                self._groups[device].recv([_flat(tensor)], self._peer, 0).wait(PATIENT)
        return tensor


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's memory as a vector, so that its strides stay what they are."""
    return tensor.as_strided((tensor.numel(),), (1,))


@contextmanager
def _connection() -> Iterator[None]:
    """Process groups raise bare RuntimeErrors where a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None


class _Pickler(pickle.Pickler):
    """Leaves dense tensors out of the pickle, each once, however often it occurs."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self._seen: dict[int, tuple] = {}

    def persistent_id(self, obj: Any) -> tuple | None:
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_meta:
            return None
        if id(obj) not in self._seen:
            tensor = obj.detach()
            if torch.empty_like(tensor).stride() != tensor.stride():  # it has gaps or overlaps
                tensor = tensor.contiguous()
            self._seen[id(obj)] = (len(self.tensors), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type)
            self.tensors.append(tensor)
        return self._seen[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, receive: Callable[[tuple, tuple, torch.dtype, str], Tensor]) -> None:
        super().__init__(file)
        self._receive = receive
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple) -> Tensor:
        # The pickle names tensors in the order in which they were sent.
        index, *meta = pid
        if index not in self._tensors:
            self._tensors[index] = self._receive(*meta)
        return self._tensors[index]
