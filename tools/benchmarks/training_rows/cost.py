"""Measure a training step of a row's config: peak memory and FLOPs. Run as a process of its own, on the row's first batch.

python -m training_rows.cost CONFIG OUT.json
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import mmman  # noqa: F401  registers its parts
from mmman.analysis.dummy_model import build_dummy_model
from mmman.analysis.training import StepMeter
from mmman.memory.detection.focal_loss import fused_focal_loss


def measure(cfg: Config) -> dict:
    """Peak bytes and FLOPs of the second training step on the first batch of the training data.

    On a CPU the peak is that of live tensors, with the focal loss of detectors counted as the one operator that a GPU runs. On
    a GPU it is the peak of torch's allocator.
    """
    init_default_scope(cfg.default_scope)
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    height, width = batch['inputs'][0].shape[-2:]
    model, optim_wrapper = build_dummy_model(cfg, height, width)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        model.cuda()
    with fused_focal_loss() if cfg.default_scope == 'mmdet' and not on_gpu else nullcontext():
        meter = StepMeter(model, optim_wrapper, batch)
        memory = meter.memory()
        peak = meter.allocator_peak() if on_gpu else memory.peak
    images = len(batch['inputs'])
    return {
        'peak_bytes': peak,
        'flops_per_image': memory.flops / images,
        'measured_on': 'GPU allocator' if on_gpu else 'live tensors',
    }


def main() -> None:
    path, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(measure(Config.fromfile(path)), indent=1))


if __name__ == '__main__':
    main()
