"""Describe a backbone as a chain of units, and cut the chain into blocks."""

from mmman.partition.chain import STEM, Chain, Feature, Unit
from mmman.partition.families import chain_of, register_chain
from mmman.partition.measure import Measured, measure
from mmman.partition.planner import Plan, plan_blocks
from mmman.partition.trainable import trainable_units

__all__ = [
    'STEM',
    'Chain',
    'Feature',
    'Measured',
    'Plan',
    'Unit',
    'chain_of',
    'measure',
    'plan_blocks',
    'register_chain',
    'trainable_units',
]
