"""Runs: launching, exact resume, seeds, checkpoints. Useful without local learning too."""

from mmman.runtime.checkpoint_hook import CheckpointHook
from mmman.runtime.loops import EpochBasedTrainLoop, IterBasedTrainLoop

__all__ = ['CheckpointHook', 'EpochBasedTrainLoop', 'IterBasedTrainLoop']
