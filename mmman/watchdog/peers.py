"""Finds lost and stuck processes of a job from their heartbeats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

LOST_S = 5.0
"""Seconds without a heartbeat after which a process is lost, if there is other evidence that a process is lost: a connection
broke, or the launcher ends the job."""


@dataclass
class Beat:
    """A heartbeat.

    Attributes:
        count: Number of the heartbeat, increasing.
        moves, text, order, timed: See :class:`mmman.watchdog.progress.Position`.
        code, waits: See :class:`mmman.watchdog.progress.Code`.
        left: Whether the process has finished without an error.
        printed: Whether the process has printed why the job ends.
        terminated: Whether the process has received SIGTERM from the launcher.
    """

    count: int = 0
    moves: int = 0
    text: str = ''
    order: tuple[int, ...] = (0,)
    timed: bool = False
    code: str = ''
    waits: bool = False
    left: bool = False
    printed: bool = False
    terminated: bool = False

    def encode(self) -> str:
        """Serialise to JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        """Inverse of :meth:`encode`."""
        values = json.loads(text)
        return cls(**{**values, 'order': tuple(values['order'])})


@dataclass
class _Peer:
    beat: Beat
    heard: float  # time of the last change of count
    moved: float  # time of the last change of position
    waiting: float  # time since which it waits in the same collective


class Peers:
    """The state of all processes of a job, as seen by one of them.

    Args:
        world_size: Number of processes.
        timeout: Seconds without a heartbeat after which a process is lost, and without progress after which it is stuck.
        now: Current time in seconds, by any clock that all calls share.
        name: Returns the name of a rank for messages.
    """

    def __init__(self, world_size: int, timeout: float, now: float, name: Callable[[int], str]) -> None:
        self._timeout, self._name = timeout, name
        self._peers = {rank: _Peer(Beat(), now, now, now) for rank in range(world_size)}

    def update(self, rank: int, beat: Beat, now: float) -> None:
        """Update a rank with its latest heartbeat, which may have been seen before."""
        peer = self._peers[rank]
        if beat.count != peer.beat.count:
            peer.heard = now
        if beat.moves != peer.beat.moves:
            peer.moved = now
        if not beat.waits or (beat.moves, beat.code) != (peer.beat.moves, peer.beat.code):
            peer.waiting = now
        peer.beat = beat

    def reset_clocks(self, now: float) -> None:
        """Restart the timeouts of all ranks. Called if this process has not read heartbeats for a while."""
        for peer in self._peers.values():
            peer.heard = peer.moved = peer.waiting = now

    def all_others(self, rank: int, flag: str, silent_since: float = -math.inf) -> bool:
        """Whether each rank except ``rank`` has set a flag, has left, or has been silent for too long.

        Args:
            rank: The rank to leave out.
            flag: Name of the flag: ``'printed'``, ``'terminated'`` or ``'left'``.
            silent_since: A rank whose last heartbeat is older than this time counts as well.
        """
        others = [peer for other, peer in self._peers.items() if other != rank]
        return all(peer.beat.left or getattr(peer.beat, flag) or peer.heard < silent_since for peer in others)

    def find_lost(self, now: float, urgent: bool = False) -> str | None:
        """Describe the rank that has sent no heartbeat for too long, if any.

        Args:
            now: Current time.
            urgent: Whether there is other evidence that a rank is lost. Then :data:`LOST_S` seconds are too long, and a rank
                that has left counts as lost.

        Returns:
            The description, or None if no rank is lost.
        """
        limit = min(LOST_S, self._timeout) if urgent else self._timeout
        silent = {rank: now - peer.heard for rank, peer in self._peers.items() if not peer.beat.left}
        rank = max(silent, key=silent.get, default=None)
        if rank is not None and silent[rank] > limit:
            return self.describe(rank, f'no heartbeat for {limit:g} s')
        left = [rank for rank, peer in self._peers.items() if peer.beat.left]
        if urgent and left:
            return self.describe(left[0], 'left the job before the other processes')
        return None

    def find_stuck(self, now: float) -> str | None:
        """Describe the rank that the others wait for, if no rank has made progress for too long.

        A rank at a position of unbounded duration (evaluation, a checkpoint, ...) counts only while it waits in a collective.

        Returns:
            The description, or None if a rank may still make progress.
        """
        peers = {rank: peer for rank, peer in self._peers.items() if not peer.beat.left}
        for peer in peers.values():
            since = peer.moved if peer.beat.timed else max(peer.moved, peer.waiting)
            if now - since <= self._timeout or not (peer.beat.timed or peer.beat.waits):
                return None
        first = min((peer.beat.order for peer in peers.values()), default=())
        behind = [rank for rank, peer in peers.items() if peer.beat.order == first]
        if len(behind) == len(peers):
            behind = [rank for rank in behind if not peers[rank].beat.waits] or behind
        if len(behind) == len(peers):
            positions = '; '.join(f'{self._name(rank)} is in {self._position(rank)}' for rank in behind[:4])
            return f'no process has made progress for {self._timeout:g} s: {positions}' if behind else None
        return self.describe(behind[0], f'no progress for {self._timeout:g} s', behind)

    def describe(self, rank: int, what: str, behind: Sequence[int] = ()) -> str:
        """Describe a failed rank: what happened, its last known position, and the position of the rank that waits for it.

        Args:
            rank: The failed rank.
            what: What happened to it.
            behind: Further ranks that do not wait for it.
        """
        position = f', last seen in {self._position(rank)}' if self._position(rank) else ''
        beats = {
            other: peer.beat
            for other, peer in self._peers.items()
            if other != rank and other not in behind and not peer.beat.left and self._position(other)
        }
        first = max(beats, key=lambda other: (beats[other].order, beats[other].waits), default=None)
        waiting = '' if first is None else f'; {self._name(first)} waits for it in {self._position(first)}'
        return f'{self._name(rank)}: {what}{position}{waiting}'

    def _position(self, rank: int) -> str:
        beat = self._peers[rank].beat
        return f'{beat.text} ({beat.code})' if beat.text and beat.code else beat.text or beat.code
