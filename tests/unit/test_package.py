"""What the package exports, and what its import needs."""

import subprocess
import sys

import mmman


def run(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()


def test_public_names():
    assert mmman.__all__ == [
        'AugLocalHead',
        'ClsLocalHead',
        'DGLLocalHead',
        'DetLocalHead',
        'EMABiasHook',
        'InfoProLocalHead',
        'LAMLocalHead',
        'LinearLocalHead',
        'LocalBackbone',
        'LocalDistributedDataParallel',
        'LocalHead',
        'LocalLearningError',
        'LocalLearningOptimWrapper',
        'MomentumTransfer',
        'PipelineRunner',
        'PredSimLocalHead',
        'SegLocalHead',
        'ViTLocalHead',
        'delocalize_',
        'localize_',
        'register_chain',
    ]
    assert all(hasattr(mmman, name) for name in mmman.__all__)


def test_import_needs_torch_and_mmengine_only():
    block = 'import sys\nfor name in ("mmcv", "mmdet", "mmseg", "mmpretrain", "pycocotools"): sys.modules[name] = None\n'
    modules = ', '.join(
        f'mmman.{name}' for name in ('analysis', 'backbones', 'datasets', 'engine', 'local', 'parallel', 'registry')
    )
    assert run(f'{block}import {modules}; print("imported")') == 'imported'
