"""Simulate the throughput of data parallel and pipelined training on many GPUs, from measured times and sizes."""

from mmman.experimental.scaling.network import Link, Network, parse_bandwidth, parse_time
from mmman.experimental.scaling.profile import BlockCost, StageProfile
from mmman.experimental.scaling.simulate import Outcome, simulate_end_to_end, simulate_local, simulate_pipeline

__all__ = [
    'BlockCost',
    'Link',
    'Network',
    'Outcome',
    'StageProfile',
    'parse_bandwidth',
    'parse_time',
    'simulate_end_to_end',
    'simulate_local',
    'simulate_pipeline',
]
