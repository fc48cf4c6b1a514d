"""Analyse training steps and models: memory, FLOPs, time, and the paper's cost model. Nothing here trains a model."""

from mmman.analysis.memory import LiveBytes, LiveParts

__all__ = ['LiveBytes', 'LiveParts']
