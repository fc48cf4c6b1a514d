"""Planning past one machine: the throughput of data parallel and pipelined training, from measured times and sizes."""

from mmman.experimental.scaling.network import Link, Network, parse_bandwidth, parse_time
from mmman.experimental.scaling.profile import Block, Profile
from mmman.experimental.scaling.simulate import Outcome, simulate_end_to_end, simulate_local, simulate_pipeline

__all__ = [
    'Block',
    'Link',
    'Network',
    'Outcome',
    'Profile',
    'parse_bandwidth',
    'parse_time',
    'simulate_end_to_end',
    'simulate_local',
    'simulate_pipeline',
]
