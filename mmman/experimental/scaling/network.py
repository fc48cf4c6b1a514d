"""Links between GPUs, inside a machine and between machines, and the time of a transfer over them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmman.errors import ScalingError

_NUMBER = r'(\d+\.?\d*(?:[eE][+-]?\d+)?)'
_PREFIXES = {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
_SECONDS = {'s': 1.0, 'ms': 1e-3, 'us': 1e-6, 'ns': 1e-9}


def parse_bandwidth(text: str) -> float:
    """Parse a bandwidth such as ``'25GB/s'`` (bytes) or ``'200Gb/s'`` (bits) into bytes per second. Prefixes are decimal.

    Raises:
        ScalingError: ``text`` isn't a bandwidth above 0.
    """
    match = re.fullmatch(_NUMBER + r'\s*([kKMGT]?)([Bb])/s', text.strip())
    if not match or not float(match[1]):
        raise ScalingError(f"bandwidth {text!r}: write bytes as '25GB/s' or bits as '200Gb/s', above 0")
    return float(match[1]) * _PREFIXES[match[2]] / (8 if match[3] == 'b' else 1)


def parse_time(text: str) -> float:
    """Parse a time such as ``'10us'``, ``'1.5ms'`` or ``'0s'`` into seconds.

    Raises:
        ScalingError: ``text`` isn't a time.
    """
    match = re.fullmatch(_NUMBER + r'\s*(s|ms|us|ns)', text.strip())
    if not match:
        raise ScalingError(f"time {text!r}: write it with its unit, as '10us', '1.5ms' or '2s'")
    return float(match[1]) * _SECONDS[match[2]]


@dataclass(frozen=True)
class Link:
    """One direction of a connection.

    Attributes:
        bandwidth: Bytes per second.
        latency: Seconds from sending the last byte to receiving it.
    """

    bandwidth: float = float('inf')
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ScalingError(f'{self}: the bandwidth must be above 0 and the latency at least 0')

    def occupied(self, size: float) -> float:
        """Seconds for which a message of ``size`` bytes occupies the link."""
        return size / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-reduce of ``size`` bytes over n such links: 2(n-1) steps of size/n bytes each."""
        return 2 * (ranks - 1) * (self.occupied(size / ranks) + self.latency)


@dataclass(frozen=True)
class Network:
    """The links of a cluster. GPUs are numbered machine by machine.

    Attributes:
        intra: Link between two GPUs of one machine.
        inter: Link between GPUs of two machines.
        machine: GPUs per machine.
    """

    intra: Link = Link()
    inter: Link = Link()
    machine: int = 8

    def __post_init__(self) -> None:
        if self.machine < 1:
            raise ScalingError(f'{self.machine} GPUs per machine: at least 1 is required')

    def link(self, a: int, b: int) -> Link:
        """The link from GPU ``a`` to GPU ``b``."""
        return self.intra if a // self.machine == b // self.machine else self.inter

    def ring(self, gpus: Sequence[int]) -> Link:
        """The link that limits a ring over these GPUs. Over several machines: the lower bandwidth and the higher latency."""
        if len({gpu // self.machine for gpu in gpus}) == 1:
            return self.intra
        return Link(min(self.intra.bandwidth, self.inter.bandwidth), max(self.intra.latency, self.inter.latency))
