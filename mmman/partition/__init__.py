"""Describe a backbone as a chain of units, and cut the chain into blocks."""

from mmman.partition.chain import STEM, Chain, Feature, Unit
from mmman.partition.families import chain_of, register_chain
from mmman.partition.measure import Measured, measure
from mmman.partition.planner import Plan, plan_blocks
from mmman.partition.source import find_source
from mmman.partition.trainable import plan_trained_blocks, trainable_units

__all__ = [
    'STEM',
    'Chain',
    'Feature',
    'Measured',
    'Plan',
    'Unit',
    'chain_of',
    'find_source',
    'measure',
    'plan_blocks',
    'plan_trained_blocks',
    'register_chain',
    'trainable_units',
]
