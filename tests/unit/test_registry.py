"""Types in configs are looked up in all registries, also by programs that do not import mmman."""

import subprocess
import sys

from mmman.registry import resolve_type
from tests.toy import ToyLocalHead


def test_types_are_names_or_classes():
    assert resolve_type('mmman.ToyLocalHead') is ToyLocalHead is resolve_type(ToyLocalHead)
    assert resolve_type('mmman.Nothing') is None is resolve_type(None)


def test_config_types_resolve_without_an_import_of_mmman():
    code = """
from mmengine.registry import HOOKS, LOOPS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPERS, RUNNERS, init_default_scope
init_default_scope('mmdet')
print(MODELS.get('mmman.LocalBackbone').__name__, OPTIM_WRAPPERS.get('mmman.LocalLearningOptimWrapper').__name__,
      HOOKS.get('mmman.EMABiasHook').__name__, MODEL_WRAPPERS.get('mmman.LocalDistributedDataParallel').__name__,
      RUNNERS.get('mmman.PipelineRunner').__name__)
print(LOOPS.get('mmman.EpochBasedTrainLoop').__module__, HOOKS.get('mmman.CheckpointHook').__module__)
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    names, modules = run.stdout.splitlines()
    assert names == 'LocalBackbone LocalLearningOptimWrapper EMABiasHook LocalDistributedDataParallel PipelineRunner'
    assert modules.split() == ['mmman.runtime.loops', 'mmman.runtime.checkpoint_hook']
