import subprocess
import sys

import pytest

import mmman
from mmman.errors import ConfigError, MisuseError
from mmman.local import MomentumTransfer
from mmman.partition import Feature


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


def test_handlers_of_the_former_exception_work():
    with pytest.raises(MisuseError) as caught:
        MomentumTransfer(None, Feature(8, 4), ema=False)
    assert type(caught.value) is ConfigError
