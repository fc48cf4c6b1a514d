"""What a stage sends to its neighbours, and when it waits for them."""

from collections import deque

import pytest
import torch
from mmengine.logging import MessageHub

from mmman.errors import PeerError
from mmman.parallel.pipeline.comm import Answer, Batch, Done, Request, StageComm
from mmman.parallel.pipeline.stage_rank import StageRank


class Line:
    """A channel with one end, which is given what it receives."""

    def __init__(self, *received):
        self.received, self.sent = deque(received), []

    def recv(self):
        message = self.received.popleft()
        if isinstance(message, Exception):
            raise message
        return message

    def send(self, message):
        self.sent.append(message)


def comm_of(stage, *received, stages=3, staleness=1):
    """A stage's communication, and its line to the neighbour that it hears from."""
    comm, line = StageComm(StageRank(stage, stages, 0, 1), staleness), Line(*received)
    comm._to_next = comm._from_next = comm._to_previous = comm._from_previous = line
    comm.on_next_unit = lambda steps, unit: None
    return comm, line


def done(iteration, unit=None, **scalars):
    return Done(iteration, 10 + iteration, unit, [scalars] if scalars else [])


@pytest.mark.parametrize('staleness', [0, 1, 3])
def test_a_batch_starts_once_the_next_stage_is_close_enough(staleness):
    comm, line = comm_of(0, *map(done, range(9)), staleness=staleness)
    for iteration in range(6):
        comm.wait_credit(iteration)
        assert comm.finished == max(0, iteration - staleness)  # and not one more
    assert len(line.received) == 9 - comm.finished


def test_the_last_stage_waits_for_nobody():
    comm, _ = comm_of(2)
    comm.wait_credit(99)
    assert comm.request('weights') == {}


def test_states_of_the_next_unit_arrive_in_order():
    unit = {'weight': torch.ones(1)}
    comm, _ = comm_of(0, done(0, unit), done(1), done(2, unit), staleness=0)
    seen = []
    comm.on_next_unit = lambda steps, state: seen.append((steps, state is unit))
    comm.wait_credit(3)
    assert seen == [(10, True), (12, True)]


def test_a_request_lets_batches_in_flight_finish():
    comm, line = comm_of(0, done(0), done(1), Answer({1: 'a', 2: 'b'}, []))
    assert comm.request('checkpoint', last=True) == {1: 'a', 2: 'b'}
    assert line.sent == [Request('checkpoint', True)] and comm.finished == 2


def test_the_first_stage_logs_and_others_forward():
    hub = MessageHub.get_instance('test_comm')
    middle, line = comm_of(1, done(0, loss=2.0), staleness=0)
    middle.wait_credit(1)
    middle.add_log([{'acc': 3.0}])
    middle.reply(0, 5, None)
    middle.answer({})
    assert [message.log for message in line.sent] == [[{'loss': 2.0}, {'acc': 3.0}], []]  # each scalar once
    assert not hub.log_scalars
    first, _ = comm_of(0, line.sent[0], staleness=0)
    first.wait_credit(1)
    assert {name: scalar.current() for name, scalar in hub.log_scalars.items()} == {'loss': 2.0, 'acc': 3.0}


@pytest.mark.parametrize(
    ('call', 'peer'),
    [
        (lambda comm: comm.recv(), 'stage 0 (rank 0)'),
        (lambda comm: comm.wait_credit(9), 'stage 2 (rank 2)'),
    ],
)
def test_a_lost_connection_names_the_neighbour(call, peer):
    comm, _ = comm_of(1, ConnectionError('reset'))
    reports = []

    class Watchdog:
        report = staticmethod(reports.append)

        @staticmethod
        def check():
            raise PeerError(reports[-1])

    comm._watchdog = Watchdog
    with pytest.raises(PeerError):
        call(comm)
    assert reports == [f'{peer}: lost its connection to stage 1 (rank 1), possibly because it was killed (reset)']


def test_batches_go_to_the_next_stage():
    comm, line = comm_of(0)
    batch = Batch(0, torch.ones(1), [], torch.ones(1))
    comm.send(batch)
    assert line.sent == [batch]
