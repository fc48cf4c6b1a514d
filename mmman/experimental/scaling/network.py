"""What connects the GPUs: links inside a machine and between machines, and what a transfer over them takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmman.errors import ScalingError

_NUMBER = r'(\d+\.?\d*(?:[eE][+-]?\d+)?)'
_PREFIXES = {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}
_SECONDS = {'s': 1.0, 'ms': 1e-3, 'us': 1e-6, 'ns': 1e-9}


def parse_bandwidth(text: str) -> float:
    """Bytes a second of ``'25GB/s'`` (bytes) or ``'200Gb/s'`` (bits); prefixes are powers of ten.

    Raises:
        ScalingError: It reads as no bandwidth above 0.
    """
    match = re.fullmatch(_NUMBER + r'\s*([kKMGT]?)([Bb])/s', text.strip())
    if not match or not float(match[1]):
        raise ScalingError(f"bandwidth {text!r}: write bytes as '25GB/s' or bits as '200Gb/s', above 0")
    return float(match[1]) * _PREFIXES[match[2]] / (8 if match[3] == 'b' else 1)


def parse_time(text: str) -> float:
    """Seconds of ``'10us'``, ``'1.5ms'`` or ``'0s'``.

    Raises:
        ScalingError: It reads as no time.
    """
    match = re.fullmatch(_NUMBER + r'\s*(s|ms|us|ns)', text.strip())
    if not match:
        raise ScalingError(f"time {text!r}: write it with its unit, as '10us', '1.5ms' or '2s'")
    return float(match[1]) * _SECONDS[match[2]]


@dataclass(frozen=True)
class Link:
    """One direction of a connection.

    Attributes:
        bandwidth: Bytes a second.
        latency: Seconds from the last byte sent to the last byte there.
    """

    bandwidth: float = float('inf')
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ScalingError(f'{self}: a bandwidth is above 0, a latency at least 0')

    def occupied(self, size: float) -> float:
        """Seconds that a message of ``size`` bytes occupies the link."""
        return size / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-reduce of ``size`` bytes over links like this one: 2(n-1) steps of size/n bytes each."""
        return 2 * (ranks - 1) * (self.occupied(size / ranks) + self.latency)


@dataclass(frozen=True)
class Network:
    """GPUs numbered machine by machine.

    Attributes:
        intra: Between two GPUs of a machine.
        inter: Between GPUs of two machines.
        machine: GPUs a machine.
    """

    intra: Link = Link()
    inter: Link = Link()
    machine: int = 8

    def __post_init__(self) -> None:
        if self.machine < 1:
            raise ScalingError(f'{self.machine} GPUs a machine: at least 1 is needed')

    def link(self, a: int, b: int) -> Link:
        """The link from GPU ``a`` to GPU ``b``."""
        return self.intra if a // self.machine == b // self.machine else self.inter

    def ring(self, gpus: Sequence[int]) -> Link:
        """The link that a ring over these GPUs is as fast as: the slower kind, where it leaves a machine."""
        if len({gpu // self.machine for gpu in gpus}) == 1:
            return self.intra
        return Link(min(self.intra.bandwidth, self.inter.bandwidth), max(self.intra.latency, self.inter.latency))
