"""Messages between two stages: their tensors, their order, and what happens if the connection is lost."""

import threading
from queue import Queue
from types import SimpleNamespace

import pytest
import torch

from mmman.errors import PeerError
from mmman.parallel.pipeline.channel import Receiver, Sender


class Loopback:
    """A process group whose two members are one: what is sent is what is received."""

    def __init__(self):
        self.sent = Queue()
        self.bytes = 0

    def send(self, tensors, peer, tag):
        self.sent.put(tensors[0].clone())
        self.bytes += tensors[0].nbytes
        return SimpleNamespace(wait=lambda timeout: None)

    def recv(self, tensors, peer, tag):
        return SimpleNamespace(wait=lambda timeout: tensors[0].copy_(self.sent.get()))


@pytest.fixture
def ends():
    group = Loopback()
    sender, receiver = Sender({'cpu': group}, 1, limit=2), Receiver({'cpu': group}, 0, limit=2, check=lambda: None)
    yield sender, receiver
    sender.close()
    receiver.join()


def test_messages_arrive_as_they_were_sent(ends):
    sender, receiver = ends
    tokens = torch.randn(20, 50, 7).transpose(1, 2)  # dense, but not in C order
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    message = {
        'tokens': tokens,
        'again': [tokens],
        'channels_last': channels_last,
        'strided': torch.arange(10)[::3],
        'none': torch.zeros(0, 4),
        'flags': torch.tensor([True, False]),
        'half': torch.randn(3).to(torch.bfloat16),
        'scalar': torch.tensor(3.0),
        'shape only': torch.empty(2, 3, device='meta'),
        'text': 'abc',
    }
    sender.send(message)
    received = receiver.recv()
    assert sender._groups['cpu'].bytes < tokens.nbytes + channels_last.nbytes + 2000  # a tensor that occurs twice is sent once
    assert received['shape only'].is_meta
    assert received['tokens'] is received['again'][0]
    for name, value in message.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            assert torch.equal(received[name], value), name
            assert received[name].dtype == value.dtype
    assert received['tokens'].stride() == tokens.stride()
    assert received['channels_last'].stride() == channels_last.stride()
    assert received['text'] == 'abc'


def test_messages_keep_their_order(ends):
    sender, receiver = ends
    for i in range(6):
        sender.send((i, torch.full((1000,), i)))
    for i in range(6):
        number, tensor = receiver.recv()
        assert number == i
        assert tensor.unique().item() == i


def test_as_many_messages_are_in_flight_as_the_limit():
    """The next one waits for the oldest to arrive."""
    group = Loopback()
    arrived, sent = threading.Semaphore(0), []
    group.send = lambda tensors, peer, tag: SimpleNamespace(wait=lambda timeout: arrived.acquire())
    sender = Sender({'cpu': group}, 1, limit=2)

    def send():
        for i in range(3):
            sender.send(i)
            sent.append(i)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(0.2)
    assert sent == [0, 1]
    arrived.release(100)
    thread.join(60)
    assert sent == [0, 1, 2]


def test_a_lost_connection_is_an_error_of_the_one_who_waits():
    group = Loopback()

    def lost(*_):
        raise RuntimeError('connection reset\nat a place in C++')

    group.send = group.recv = lost
    with pytest.raises(ConnectionError, match='^connection reset$'):
        Sender({'cpu': group}, 1, limit=2).send('a')
    with pytest.raises(ConnectionError, match='^connection reset$'):
        Receiver({'cpu': group}, 0, limit=2, check=lambda: None).recv()


def test_who_waits_asks_whether_another_process_has_failed():
    group = Loopback()

    def check():
        raise PeerError('stage 0 has failed')

    receiver = Receiver({'cpu': group}, 0, limit=2, check=check)
    with pytest.raises(PeerError, match='stage 0 has failed'):
        receiver.recv()
    Sender({'cpu': group}, 1, limit=2).close()
    receiver.join()
