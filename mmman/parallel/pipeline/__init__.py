"""Pipeline parallel training with one block per process (PPLL)."""

from mmman.parallel.pipeline.runner import PipelineRunner

__all__ = ['PipelineRunner']
