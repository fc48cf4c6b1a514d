"""What a process knows of the others of its job by their heartbeats, and which of them is lost or stuck."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

LOST_S = 5.0
"""Seconds without a heartbeat after which a process is lost, where something else shows that one is: a connection broke, or the
launcher ends the job."""


@dataclass
class Beat:
    """A heartbeat.

    Attributes:
        count: Grows from beat to beat.
        moves, text, order, timed: See :class:`mmman.watchdog.progress.Position`.
        code, waits: See :class:`mmman.watchdog.progress.Code`.
        left: The process has ended in order.
        told: It has printed why the job ends.
        terminated: The launcher has asked it to end (SIGTERM).
    """

    count: int = 0
    moves: int = 0
    text: str = ''
    order: tuple[int, ...] = (0,)
    timed: bool = False
    code: str = ''
    waits: bool = False
    left: bool = False
    told: bool = False
    terminated: bool = False

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        values = json.loads(text)
        return cls(**{**values, 'order': tuple(values['order'])})


@dataclass
class _Peer:
    beat: Beat
    heard: float  # when its count changed last
    moved: float  # when its position changed last
    waiting: float  # since when it waits in the same collective


class Peers:
    """All processes of a job, as one of them sees them.

    Args:
        world_size: How many there are.
        timeout: Seconds without a heartbeat after which a process is lost, and without progress after which it is stuck.
        now: The time, in seconds of any clock.
        name: What a rank is called in messages.
    """

    def __init__(self, world_size: int, timeout: float, now: float, name: Callable[[int], str]) -> None:
        self._timeout, self._name = timeout, name
        self._peers = {rank: _Peer(Beat(), now, now, now) for rank in range(world_size)}

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        """Take in the latest beat of a rank, which may be the one that is known."""
        peer = self._peers[rank]
        if beat.count != peer.beat.count:
            peer.heard = now
        if beat.moves != peer.beat.moves:
            peer.moved = now
        if not beat.waits or (beat.moves, beat.code) != (peer.beat.moves, peer.beat.code):
            peer.waiting = now
        peer.beat = beat

    def restart(self, now: float) -> None:
        """Forget how long the others have been silent: this process has not listened for a while."""
        for peer in self._peers.values():
            peer.heard = peer.moved = peer.waiting = now

    def all_others(self, rank: int, mark: str, silent_since: float = -math.inf) -> bool:
        """Whether every other rank has set a mark (``'told'`` or ``'terminated'``), has left, or has been silent since."""
        others = [peer for other, peer in self._peers.items() if other != rank]
        return all(peer.beat.left or getattr(peer.beat, mark) or peer.heard < silent_since for peer in others)

    def find_lost(self, now: float, hurry: bool = False) -> str | None:
        """Describe the rank that has been silent for too long, if any.

        Args:
            now: The time.
            hurry: It is known that a rank is lost: :data:`LOST_S` seconds are too long, and so is to have left.
        """
        limit = min(LOST_S, self._timeout) if hurry else self._timeout
        silent = {rank: now - peer.heard for rank, peer in self._peers.items() if not peer.beat.left}
        rank = max(silent, key=silent.get, default=None)
        if rank is not None and silent[rank] > limit:
            return self.describe(rank, f'no sign of life for {limit:g} s')
        left = [rank for rank, peer in self._peers.items() if peer.beat.left]
        if hurry and left:
            return self.describe(left[0], 'it has left the job before the others')
        return None

    def find_stuck(self, now: float) -> str | None:
        """Describe the rank that the others wait for, where none has made progress for too long.

        A rank in a place that may take any time (evaluation, a checkpoint, ...) counts only while it waits in a collective.
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
            places = '; '.join(f'{self._name(rank)} is in {self._place(rank)}' for rank in behind[:4])
            return f'no process has made progress for {self._timeout:g} s: {places}' if behind else None
        return self.describe(behind[0], f'no progress for {self._timeout:g} s', behind)

    def describe(self, rank: int, what: str, behind: Sequence[int] = ()) -> str:
        """Say what is wrong with a rank, where it was seen last, and where others wait for it: what it has not reached.

        Args:
            rank: The rank.
            what: What is wrong with it.
            behind: Ranks that don't wait for it either.
        """
        place = f', last seen in {self._place(rank)}' if self._place(rank) else ''
        beats = {
            other: peer.beat
            for other, peer in self._peers.items()
            if other != rank and other not in behind and not peer.beat.left and self._place(other)
        }
        first = max(beats, key=lambda other: (beats[other].order, beats[other].waits), default=None)
        waiting = '' if first is None else f'; {self._name(first)} waits for it in {self._place(first)}'
        return f'{self._name(rank)}: {what}{place}{waiting}'

    def _place(self, rank: int) -> str:
        beat = self._peers[rank].beat
        return f'{beat.text} ({beat.code})' if beat.text and beat.code else beat.text or beat.code
