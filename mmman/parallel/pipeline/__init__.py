"""One block a process (PPLL)."""

from mmman.parallel.pipeline.runner import PipelineRunner

__all__ = ['PipelineRunner']
