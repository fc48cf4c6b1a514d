"""Compare mmman's recompute with ``torch.utils.checkpoint`` on the same units of the same model: seconds and bytes of a step.

    python tools/benchmarks/recompute.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --shape 416 640 --batch 8
    VIT=mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py
    python tools/benchmarks/recompute.py $VIT --shape 224 224 --batch 128
    python tools/benchmarks/recompute.py --one-unit

Every unit but the stem is recomputed, in one block (end-to-end training). With small images (``--shape 32 32 --batch 1``) a
step takes about the time that Python takes, which is what a GPU with short kernels waits for. ``--one-unit`` times nothing but
that: the processor time of one bottleneck on 4x4 maps, forward and backward, the least of 300.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmman.analysis.dummy_model import build_dummy_model, random_batch
from mmman.analysis.training import StepMeter
from mmman.memory.detection.focal_loss import fused_focal_loss
from mmman.memory.recompute import recompute_, temporary_buffers
from mmman.memory.selective import should_save
from mmman.partition import chain_of
from mmman.partition.chain import STEM
from mmman.runtime.stock_config import config_path

ROWS = ('plain', 'mmman', 'torch', 'mmman, selective', 'torch, selective')


class Checkpointed:
    """Replaces the ``forward`` of one module, which ``torch.utils.checkpoint`` then runs and recomputes."""

    def __init__(self, module: nn.Module, selective: bool) -> None:
        self.module, self.selective = module, selective

    def __call__(self, *args: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple:
        """Contexts of the first run and of recomputation."""
        buffers = temporary_buffers(self.module)
        if not self.selective:
            return nullcontext(), buffers
        caching, cached = create_selective_checkpoint_contexts(_policy)
        return caching, _Both(buffers, cached)


class _Both:
    """Two context managers as one."""

    def __init__(self, *contexts: Any) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if should_save(op, args) else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_(module: nn.Module, row: str) -> None:
    """Recompute one module as ``row`` says."""
    selective = 'selective' in row
    if row.startswith('mmman'):
        recompute_(module, selective)
    elif row.startswith('torch'):
        module.forward = Checkpointed(module, selective)


def one_unit(times: int = 300) -> dict[str, float]:
    """Least processor seconds of forward and backward of a bottleneck on 4x4 maps, by row, taken in rounds."""
    from mmdet.models.backbones.resnet import Bottleneck

    x, seconds = torch.rand(1, 64, 4, 4, requires_grad=True), {row: [] for row in ROWS}
    units = {row: Bottleneck(64, 16).train() for row in ROWS}
    for row, unit in units.items():
        checkpoint_(unit, row)
    for _ in range(times):
        for row, unit in units.items():
            start = time.process_time()
            unit(x).sum().backward()
            seconds[row].append(time.process_time() - start)
    return {row: min(own) for row, own in seconds.items()}


def build(config: str, row: str, batch: int, height: int, width: int) -> StepMeter:
    """A stock model whose units are recomputed as ``row`` says."""
    cfg = Config.fromfile(config_path(config))
    model, optim_wrapper = build_dummy_model(cfg, height, width)
    for unit in chain_of(model.backbone).units:
        for path in () if unit.name == STEM else unit.modules:
            checkpoint_(model.backbone.get_submodule(path), row)
    return StepMeter(model, optim_wrapper, random_batch(model, cfg.default_scope, batch, height, width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', help='a stock config: a file, or one of a library, as mmdet::retinanet/...')
    parser.add_argument('--shape', type=int, nargs=2, default=(416, 640), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--iterations', type=int, default=5, help='timed steps of each row, in rounds')
    parser.add_argument('--one-unit', action='store_true', help='time the Python around one unit instead')
    args = parser.parse_args()
    if args.one_unit:
        for row, seconds in one_unit().items():
            print(f'{row:18}{1e3 * seconds:.1f} ms')
        return
    if args.config is None:
        parser.error('name a config, or give --one-unit')
    table = Table(title=f'{args.config}: batch {args.batch}, {args.shape[0]}x{args.shape[1]}')
    for column in ('recompute', 'peak, MB', 'seconds, median', 'to plain (min to max of rounds)'):
        table.add_column(column, justify='right' if table.columns else 'left')
    with fused_focal_loss() if 'mmdet' in args.config else nullcontext():
        meters = [build(args.config, row, args.batch, *args.shape) for row in ROWS]
        rounds = [[meter.seconds() for meter in meters] for _ in range(args.iterations)]
        peaks = [meter.memory().peak for meter in meters]
    for i, (row, peak) in enumerate(zip(ROWS, peaks, strict=True)):
        ratios = [seconds[i] / seconds[0] for seconds in rounds]
        median = statistics.median(seconds[i] for seconds in rounds)
        spread = f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})'
        table.add_row(row, f'{peak / 1e6:.1f}', f'{median:.3f}', spread)
    Console(width=128).print(table)


if __name__ == '__main__':
    main()
