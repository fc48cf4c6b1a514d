"""Peak live tensor bytes of one training step of detectors, side by side, and the floor that neck, head and loss set.

    python tools/analysis_tools/peak_memory.py CONFIG [CONFIG ...] --shape 608 1024 --batch 2

Counts on the CPU, exactly: the same command gives the same numbers everywhere. The step is the second one, so that optimizer
state is there. The floor of a config is what remains without its backbone: parameters, buffers and optimizer state of the whole
model, and neck, head and loss run forward and backward on feature maps that are given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from rich.console import Console
from rich.table import Table

import mmman  # noqa: F401  registers what the configs name
from mmman.analysis import LiveBytes, peak_live_bytes
from mmman.local.blocks import LocalBlocks

GB = 1e9


def without_pretrained(cfg: dict) -> dict:
    """The config without weights to download: only sizes count here."""
    kept = {key: value for key, value in cfg.items() if not (key == 'init_cfg' and value and value.get('type') == 'Pretrained')}
    return {key: without_pretrained(value) if isinstance(value, dict) else value for key, value in kept.items()}


def batch_of(size: int, height: int, width: int, classes: int, seed: int = 0) -> dict:
    """Random uint8 images with ten random boxes each, as mmdet's data loader gives them."""
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(seed)
    inputs, samples = [], []
    for _ in range(size):
        inputs.append(torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8))
        corners = torch.rand(10, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
        sample = DetDataSample(metainfo={'img_shape': (height, width), 'scale_factor': (1.0, 1.0)})
        labels = torch.randint(classes, (10,), generator=generator)
        sample.gt_instances = InstanceData(bboxes=corners.flatten(1), labels=labels)
        samples.append(sample)
    return {'inputs': inputs, 'data_samples': samples}


def measure(path: str, batch: int, height: int, width: int) -> dict:
    """Bytes of one config: ``peak``, ``floor``, ``parameters`` (all of the model's, momentum copies included)."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(without_pretrained(cfg.model)))
    model.train()
    local = getattr(model.backbone, 'local', None)
    if isinstance(local, LocalBlocks):
        for head in local.values():
            head.transfer.sync_(head.source.of(model.backbone))
    wrapper_cfg = cfg.optim_wrapper
    wrapper_cfg.optimizer.lr = 0.0
    optim_wrapper = build_optim_wrapper(model, wrapper_cfg)
    data = batch_of(batch, height, width, model.bbox_head.num_classes)
    model.train_step(data, optim_wrapper)
    held = (model, optim_wrapper.optimizer, data['inputs'])
    peak = peak_live_bytes(lambda: model.train_step(data, optim_wrapper), *held)

    processed = model.data_preprocessor(data, True)
    with torch.no_grad():
        features = [feature.requires_grad_() for feature in model.backbone(processed['inputs'])]
    with LiveBytes(*held, processed['inputs'], features) as live:
        losses = model.bbox_head.loss(model.neck(features), processed['data_samples'])
        model.parse_losses(losses)[0].backward()
    return {
        'config': Path(path).stem,
        'peak': peak,
        'floor': live.peak,
        'parameters': sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', help='detector configs; ratios are to the first')
    parser.add_argument('--shape', type=int, nargs=2, default=(608, 1024), metavar=('H', 'W'), help='pixels, multiples of 32')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--out', type=Path, help='also write the rows as JSON')
    args = parser.parse_args()
    rows = [measure(path, args.batch, *args.shape) for path in args.configs]
    table = Table(title=f'peak live bytes of one training step, batch {args.batch}, {args.shape[0]}x{args.shape[1]}')
    for name in ('config', 'peak, GB', 'to the first', 'floor, GB', 'parameters, GB'):
        table.add_column(name, justify='left' if name == 'config' else 'right')
    for row in rows:
        change = row['peak'] / rows[0]['peak'] - 1
        numbers = (f'{row["peak"] / GB:.3f}', f'{change:+.1%}', f'{row["floor"] / GB:.3f}', f'{row["parameters"] / GB:.3f}')
        table.add_row(row['config'], *numbers)
    Console(width=110).print(table)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2))


if __name__ == '__main__':
    main()
