from mmman.partition.chain import Chain, Feature, Unit
from mmman.partition.families import chain_of, register_chain
from mmman.partition.planner import Plan, plan_blocks

__all__ = ['Chain', 'Feature', 'Plan', 'Unit', 'chain_of', 'plan_blocks', 'register_chain']
