"""What to look at first when local training misbehaves: loss, gradient, scale, momentum copy and dead channels of every block.

    python tools/analysis_tools/inspect_blocks.py WORK_DIR
    python tools/analysis_tools/inspect_blocks.py CHECKPOINT --images 8

Scales s_j and distances are those of the checkpoint. Without --images, losses, gradients and dead channels are the last ones in
the work folder's scalars. Dead channels are there if the run had mmman.LocalInspectorHook; gradients, too, or else those before
clipping, if it had clip_grad. With --images N, they are measured in a training step on N training images, without
clipping and mixed precision.

    loss      the block's local loss, without loss_weight; of the last block the task loss
    gradient  L2 norm over the block and its local head; of the last block with neck and head
    s         scale of the momentum copy, which starts at 1: y = s E(x) + (2 - s) B(x)
    distance  |E - source| / |source| of the momentum copy, over parameters
    dead      share of the channels of the block's output that are zero in the whole batch
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from mmengine.logging import MessageHub
from rich.console import Console
from rich.table import Table

from mmman import LocalLearningOptimWrapper
from mmman.analysis.inspection import StepMonitor, copy_distance
from mmman.analysis.scalars import by_block, read_scalars
from mmman.engine.block_parameters import parameters_by_block
from mmman.errors import ConfigError
from mmman.local.blocks import localized_backbone
from mmman.messages import errors_end_the_program
from mmman.runtime.trained_model import TrainedModel, add_model_arguments, load_models

CONSOLE = Console(width=140)
COLUMNS = ('loss', 'gradient', 's', 'distance', 'dead')


def inspect(one: TrainedModel, images: int | None) -> list[dict]:
    """One row a block: its number, its units, and the values of :data:`COLUMNS`; None for what isn't known."""
    backbone = localized_backbone(one.model)
    plan, heads = backbone.local.plan, [*backbone.local.values()]
    if not heads:
        raise ConfigError(f'{one.name} has one block, without local heads: there is nothing to inspect')
    rows = []
    for j, block in enumerate(plan.blocks, start=1):
        units = block[0].name if len(block) == 1 else f'{block[0].name}..{block[-1].name}'
        rows.append({'block': j, 'units': units, **dict.fromkeys(COLUMNS)})
    for row, head in zip(rows, heads, strict=False):
        row['s'] = None if head.transfer.s is None else head.transfer.s.item()
        row['distance'] = copy_distance(head, backbone)
    for name, values in (_measured(one, images) if images else _logged(one.work_dir, len(rows))).items():
        for row in rows:
            row[name] = values.get(row['block'])
    return rows


def _measured(one: TrainedModel, images: int) -> dict[str, dict[int, float]]:
    """Losses, gradients and dead channels, by block, of a training step on one batch. The model is trained by it."""
    model = one.model
    model.train()
    backbone = localized_backbone(model)
    for head in backbone.local.values():
        head.transfer.init_from_(head.source.of(backbone), keep_loaded=True)
    chunk = one.cfg.optim_wrapper.get('images_per_chunk')
    optim_wrapper = LocalLearningOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0), images_per_chunk=chunk)
    blocks = [block.values() for block in parameters_by_block(model)]
    with StepMonitor(backbone, optim_wrapper.optimizer, blocks) as monitor:
        log = model.train_step(next(one.batches(images, images, 'train')), optim_wrapper)
    hub = MessageHub.get_current_instance().log_scalars
    losses = {j: hub[f'train/local/{j}/loss'].current() for j in range(1, len(blocks))}
    return {'loss': {**losses, len(blocks): log['loss'].item()}, 'gradient': monitor.gradients, 'dead': monitor.dead}


def _logged(work_dir: Path, count: int) -> dict[str, dict[int, float]]:
    """The same, as a run logged them last."""
    try:
        curves = read_scalars(work_dir)
    except ConfigError as error:
        CONSOLE.print(f'no losses: {error}; or measure them with --images', markup=False, highlight=False)
        return {}
    last = {
        name: {block: curve[-1][1] for block, curve in by_block(curves, name).items()}
        for name in ('loss', 'gradient', 'dead', 'grad_norm')
    }
    clipped = last.pop('grad_norm')  # norms before clipping, which are there without the hook
    if clipped and not last['gradient']:
        last['gradient'] = {**clipped, **({count: curves['grad_norm'][-1][1]} if 'grad_norm' in curves else {})}
    if 'loss' in curves:
        last['loss'][count] = curves['loss'][-1][1]
    return last


def table_of(rows: list[dict], title: str) -> Table:
    table = Table(title=title)
    table.add_column('block', justify='right')
    table.add_column('units')
    for name in COLUMNS:
        table.add_column(name, justify='right')
    for row in rows:
        cells = ('' if row[name] is None else f'{row[name]:.1%}' if name == 'dead' else f'{row[name]:.4f}' for name in COLUMNS)
        table.add_row(str(row['block']), row['units'], *cells)
    return table


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, 1, images=None, batch_size=None)
    return parser.parse_args(args)


def run(args: argparse.Namespace) -> dict:
    """Inspect, print, write what was asked for. Returns what ``--out`` writes."""
    (one,) = load_models(args, stock=False)
    rows = inspect(one, args.images)
    source = f'one step on {args.images} training images' if args.images else 'the last scalars of the run'
    CONSOLE.print(table_of(rows, f'{one.name}, {one.checkpoint.name}'))
    CONSOLE.print(f'loss, gradient and dead channels: {source}')
    found = {'model': one.name, 'checkpoint': str(one.checkpoint), 'images': args.images, 'blocks': rows}
    if args.out:
        args.out.write_text(json.dumps(found, indent=2))
    return found


def main() -> None:
    args = parse_args()
    with errors_end_the_program():
        run(args)


if __name__ == '__main__':
    main()
