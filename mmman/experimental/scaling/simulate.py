"""Discrete-event simulation of training steps on N GPUs. An event starts when everything that it waits for has finished.

Computation and communication overlap and don't slow each other down. All GPUs are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmman.errors import ScalingError
from mmman.experimental.scaling.network import Link, Network
from mmman.experimental.scaling.profile import BlockCost, StageProfile

MIB = 2**20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB
"""Bytes of DDP's first and later buckets (torch's defaults)."""


@dataclass(frozen=True)
class Outcome:
    """Prediction of a simulation.

    Attributes:
        system: Name of the simulated system.
        gpus: Number of GPUs.
        iteration: Seconds per iteration, of all GPUs together.
        images_per_second: Images per second, of all GPUs together.
        bubble: Share of the GPUs' time in which they don't compute.
        link: Share of time in which the busiest link, or ring of links, is in use.
    """

    system: str
    gpus: int
    iteration: float
    images_per_second: float
    bubble: float
    link: float


class Produced(NamedTuple):
    """``size`` bytes of gradients that a backward pass produces at a constant rate from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    size: float


def buckets(produced: Sequence[Produced]) -> list[tuple[float, float]]:
    """Fill DDP's buckets in the given order.

    Returns:
        For each bucket the time at which it can be sent, and its bytes. It is sent after all earlier buckets.
    """
    result, room, filled, ready = [], FIRST_BUCKET, 0.0, 0.0
    for start, end, size in produced:
        done = 0.0
        while done < size:
            piece = min(room - filled, size - done)
            done, filled = done + piece, filled + piece
            ready = max(ready, start + (end - start) * done / size)
            if filled == room:
                result.append((ready, filled))
                room, filled = BUCKET, 0.0
    return [*result, (ready, filled)] if filled else result


def reduce_all(ready: Sequence[tuple[float, float]], link: Link, ranks: int) -> tuple[float, float]:
    """All-reduce buckets one after the other. Returns when the last is done, and for how long the ring was busy, in seconds."""
    end = busy = 0.0
    if ranks > 1:
        for time, size in ready:
            seconds = link.all_reduce(size, ranks)
            end, busy = max(end, time) + seconds, busy + seconds
    return end, busy


def simulate_end_to_end(profile: StageProfile, gpus: int, network: Network) -> Outcome:
    """Simulate end-to-end training under DDP. Buckets are reduced during the backward pass; the step waits for the last."""
    blocks = profile.end_to_end
    now = sum(block.forward + block.head for block in blocks)
    produced = []
    for block in reversed(blocks):
        produced.append(Produced(now, now + block.backward, block.head_gradients + block.gradients))
        now += block.backward
    return _data_parallel('E2E, DDP', profile, blocks, now, buckets(produced), gpus, network)


def simulate_local(profile: StageProfile, gpus: int, network: Network, blockwise: bool) -> Outcome:
    """Simulate local learning under data parallelism.

    Args:
        profile: Times and sizes of the model.
        gpus: Number of GPUs.
        network: Links between them.
        blockwise: Whether the gradients of a block are reduced while the next block computes. If not, this simulates the stock
            DDP wrapper. Its reducer starts in the backward pass of the task loss: neck and head first, then the local heads,
            then the blocks from last to first.
    """
    blocks, now, spans = profile.blocks, 0.0, []
    for block in blocks:
        start = now + block.forward + block.head
        now = start + block.backward
        spans.append((start, now))
    if blockwise:
        produced = [Produced(*span, b.head_gradients + b.gradients) for span, b in zip(spans, blocks, strict=True)]
        ready = [bucket for block in produced for bucket in buckets([block])]  # every block has its own reducer
        return _data_parallel('MAN++, block-wise DDP', profile, blocks, now, ready, gpus, network)
    (start, end), last, others = spans[-1], blocks[-1], blocks[:-1]
    total = last.head_gradients + last.gradients
    middle = start + (end - start) * (last.head_gradients / total if total else 0)
    produced = [
        Produced(start, middle, last.head_gradients),
        *(Produced(middle, middle, block.head_gradients) for block in reversed(others)),
        Produced(middle, end, last.gradients),
        *(Produced(end, end, block.gradients) for block in reversed(others)),
    ]
    return _data_parallel('MAN++, stock DDP', profile, blocks, now, buckets(produced), gpus, network)


def _data_parallel(
    system: str,
    profile: StageProfile,
    blocks: Sequence[BlockCost],
    computed: float,
    ready: Sequence[tuple[float, float]],
    gpus: int,
    network: Network,
) -> Outcome:
    if gpus < 1:
        raise ScalingError(f'{gpus} GPUs: at least 1 is required')
    reduced, busy = reduce_all(ready, network.ring(range(gpus)), gpus)
    step = max(computed, reduced) + sum(block.update for block in blocks)
    iteration = max(step, profile.loading)
    bubble = 1 - sum(block.seconds for block in blocks) / iteration
    return Outcome(system, gpus, iteration, gpus * profile.batch / iteration, bubble, busy / iteration)


def simulate_pipeline(
    profile: StageProfile, gpus: int, network: Network, staleness: int = 2, iterations: int = 1000
) -> Outcome:
    """Simulate ``gpus / K`` replicas of a pipeline with one block per stage, from filling it to draining it.

    Stage j starts a batch when three conditions hold: it has finished the previous batch, it has received the message of stage
    j-1, and it has received the parameters that stage j+1 sent after its step ``1 + staleness`` batches earlier. A stage sends
    features after the block's backward pass and parameters after the step. A link carries one message at a time. Replica r has
    the GPUs ``r * K`` to ``r * K + K - 1``. A stage's gradients are reduced over the replicas during its backward pass, and its
    step waits for them. The first stage loads the data.

    Args:
        profile: Times and sizes of the model.
        gpus: Number of GPUs.
        network: Links between them.
        staleness: Number of batches that a stage may be ahead of the next stage's parameters. With 0, neighbours never overlap.
        iterations: Number of batches between two flushes (checkpoint, validation, end of an epoch).

    Raises:
        ScalingError: ``gpus`` isn't a multiple of K, or a number is out of range.
    """
    stages, blocks = len(profile.blocks), profile.blocks
    if gpus < 1 or gpus % stages:
        raise ScalingError(f'{gpus} GPUs: a pipeline of {stages} stages needs a multiple of {stages}')
    if staleness < 0 or iterations < 1:
        raise ScalingError(f'staleness={staleness}, iterations={iterations}: must be at least 0 and 1')
    replicas = range(gpus // stages)
    sent = [
        [_Channel(network.link(r * stages + j, r * stages + j + 1), profile.message(j)) for j in range(stages - 1)]
        for r in replicas
    ]
    credits = [
        [_Channel(network.link(r * stages + j + 1, r * stages + j), blocks[j + 1].first_unit) for j in range(stages - 1)]
        for r in replicas
    ]
    rings = [network.ring([r * stages + j for r in replicas]) for j in range(stages)]
    reduced = [0.0] * stages
    finish = [[0.0] * stages for _ in replicas]
    for batch in range(iterations):
        for j, block in enumerate(blocks):
            ready = []
            for r in replicas:
                message = sent[r][j - 1].arrived[batch] if j else (batch + 1) * profile.loading
                needed = batch - 1 - staleness
                credit = credits[r][j].arrived[needed] if j < stages - 1 and needed >= 0 else 0.0
                ready.append(max(finish[r][j], message, credit) + block.forward + block.head)
            # The all-reduce waits for the slowest replica.
            slowest = max(ready)
            gradients = Produced(slowest, slowest + block.backward, block.head_gradients + block.gradients)
            all_there, busy = reduce_all(buckets([gradients]), rings[j], len(replicas))
            reduced[j] += busy
            for r in replicas:
                trained = ready[r] + block.backward
                finish[r][j] = max(trained, all_there) + block.update
                if j < stages - 1:
                    sent[r][j].send(trained)
                if j:
                    credits[r][j - 1].send(finish[r][j])
    makespan = max(map(max, finish))
    computed = iterations * sum(block.seconds for block in blocks) * len(replicas)
    links = [channel.busy for row in (*sent, *credits) for channel in row]
    return Outcome(
        f'MAN++, pipeline {len(replicas)}x{stages}',
        gpus,
        makespan / iterations,
        len(replicas) * profile.batch * iterations / makespan,
        1 - computed / (gpus * makespan),
        max([*links, *reduced]) / makespan,
    )


class _Channel:
    """One direction of a link that carries one message of ``size`` bytes per batch."""

    def __init__(self, link: Link, size: float) -> None:
        self.link = link
        self.seconds = link.occupied(size)
        self.busy = 0.0
        self.free = 0.0
        self.arrived: list[float] = []

    def send(self, time: float) -> None:
        """Queue the next message at ``time``, in seconds."""
        self.free = max(self.free, time) + self.seconds
        self.busy += self.seconds
        self.arrived.append(self.free + self.link.latency)
