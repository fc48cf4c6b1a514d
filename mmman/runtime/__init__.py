"""Training runs: launching, exact resume, seeding and checkpoints. Also usable without local learning."""

from mmman.runtime.checkpoint_hook import CheckpointHook
from mmman.runtime.loops import EpochBasedTrainLoop, IterBasedTrainLoop

__all__ = ['CheckpointHook', 'EpochBasedTrainLoop', 'IterBasedTrainLoop']
