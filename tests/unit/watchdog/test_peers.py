"""Which process is lost or stuck, from the heartbeats of all."""

import pytest

from mmman.watchdog.peers import LOST_S, Beat, Peers

TIMEOUT = 60.0


def beat(count=1, iteration=8, step=1, **values):
    return Beat(
        count, moves=10 * iteration + step, text=f'step {step} of iteration {iteration}', order=(iteration, step), **values
    )


def heard(*beats, seconds=0.0, beating=True, peers=None):
    """All ranks, each heard once at time 0 and, where it beats on, again later from the same place."""
    peers = peers or Peers(len(beats), TIMEOUT, 0.0, 'rank {}'.format)
    for now in range(int(seconds) + 1):
        for rank, values in enumerate(beats):
            if now == 0 or beating is True or rank in beating:
                peers.update(rank, beat(now + 1, **values), float(now))
    return peers


def test_a_silent_rank_is_lost_after_the_timeout_or_sooner_if_urgent():
    peers = heard(
        {'step': 2, 'code': 'all_reduce, called at a.py:3 in f', 'waits': True},
        {'iteration': 7},
        {'step': 1},
        seconds=61,
        beating=[0, 2],
    )
    assert peers.find_lost(60.0) is None
    assert peers.find_lost(61.0) == (
        'rank 1: no heartbeat for 60 s, last seen in step 1 of iteration 7; '
        'rank 0 waits for it in step 2 of iteration 8 (all_reduce, called at a.py:3 in f)'
    )
    assert heard({}, {}, seconds=6, beating=[0]).find_lost(LOST_S, urgent=True) is None
    assert 'rank 1: no heartbeat for 5 s' in heard({}, {}, seconds=6, beating=[0]).find_lost(LOST_S + 1, urgent=True)


def test_a_rank_that_left_is_lost_only_where_one_is():
    peers = heard({}, {'left': True}, seconds=100, beating=[0])
    assert peers.find_lost(100.0) is None
    assert peers.find_lost(100.0, urgent=True).startswith('rank 1: left the job before the other processes')


def test_who_has_not_listened_for_a_while_blames_nobody():
    peers = heard({}, {}, seconds=100, beating=[0])
    peers.reset_clocks(100.0)
    assert peers.find_lost(100.0 + TIMEOUT) is None
    assert 'rank 1' in peers.find_lost(101.0 + TIMEOUT)


WAITS = {'code': 'broadcast, called at b.py:1 in g', 'waits': True}


@pytest.mark.parametrize(
    ('beats', 'stuck'),
    [
        # behind in iterations, in steps, or in the same step without waiting in a collective
        ([{'timed': True}, {'timed': True, 'iteration': 7, 'step': 9}], 'rank 1'),
        ([{'timed': True, 'step': 0}, {'timed': True}, {'timed': True}], 'rank 0'),
        ([{'timed': True, **WAITS}, {'timed': True, 'code': 'c.py:4 in h'}, {'timed': True, **WAITS}], 'rank 1'),
        ([{'timed': True}, {'timed': True}], 'no process'),
        ([{'timed': True, **WAITS}, {'timed': True, **WAITS}], 'no process'),
        # a place that may take any time, and one where others wait in the same
        ([{'timed': True, **WAITS}, {'timed': False, 'iteration': 7}], None),
        ([{'timed': False, 'step': 5, **WAITS}, {'timed': False, 'step': 5}], None),
        ([{'timed': False, 'step': 5, **WAITS}, {'timed': True, 'step': 1}], 'rank 1'),
    ],
)
def test_the_rank_that_others_wait_for_is_stuck(beats, stuck):
    peers = heard(*beats, seconds=TIMEOUT + 2)
    assert peers.find_stuck(TIMEOUT) is None
    reason = peers.find_stuck(TIMEOUT + 2)
    assert (reason is None) if stuck is None else reason.startswith(f'{stuck}'), reason
    if stuck == 'rank 1':
        assert 'rank 0 waits for it in step' in reason


def test_progress_of_any_rank_counts():
    peers = heard({'timed': True}, {'timed': True, 'step': 0}, seconds=TIMEOUT)
    peers.update(0, beat(100, step=2, timed=True), TIMEOUT)
    assert peers.find_stuck(TIMEOUT + 10) is None
    assert peers.find_stuck(2 * TIMEOUT + 1).startswith('rank 1: no progress for 60 s, last seen in step 0')


def test_marks_of_all_others():
    peers = heard({}, {'printed': True}, {'left': True})
    assert peers.all_others(0, 'printed') and not peers.all_others(1, 'printed')
    assert not peers.all_others(0, 'left')
    assert peers.all_others(0, 'left', silent_since=0.5)


def test_a_beat_survives_the_store():
    sent = beat(code='é', waits=True, left=True)
    assert Beat.decode(sent.encode().encode()) == sent
