"""Overfit a RetinaNet on 16 COCO images, end to end and by local learning, and compare: does MAN++ learn what E2E learns?

    python tools/benchmarks/overfit.py --data-root COCO --rows e2e manpp light

Nothing is pre-trained or frozen, the data, iterations and optimizer are the same for all rows, and the metric is mmdet's
CocoMetric on the training images. Each row is one Runner in ``WORK_DIR/<row>``. The last lines are a table of all rows in the
folder, and their curves are drawn in ``WORK_DIR/overfit.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ABLATION = {
    'local': {'ema': False, 'bias': False, 'scale': False},
    'ema': {'ema': True, 'bias': False, 'scale': False},
    'man': {'ema': True, 'bias': 'unit', 'scale': False},
    'manpp': {'ema': True, 'bias': 'unit', 'scale': True},
}
FILES = {'e2e': 'retinanet_r18_e2e.py', 'light': 'light/retinanet_r18_k4.py'}
"""Of the rows that aren't the ablation's."""

OPTIMIZERS = {
    'adam': {'type': 'Adam', 'weight_decay': 0},
    'sgd': {'type': 'SGD', 'momentum': 0.9, 'weight_decay': 1e-4},
}


def write_subset(data_root: Path, images: int, path: Path) -> None:
    """Annotations of the first ``images`` images that have objects, with the dataset's own categories."""
    coco = json.loads((data_root / 'annotations/instances_train2017.json').read_text())
    with_objects = {a['image_id'] for a in coco['annotations'] if not a['iscrowd']}
    coco['images'] = [i for i in sorted(coco['images'], key=lambda i: i['id']) if i['id'] in with_objects][:images]
    kept = {i['id'] for i in coco['images']}
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] in kept]
    mmengine.dump(coco, path)


def row_config(args: argparse.Namespace, row: str, annotations: Path) -> Config:
    """The stock-based config of a row with the common small-scale settings."""
    cfg = Config.fromfile(CONFIGS / FILES.get(row, 'retinanet_r18_manpp_k4.py'))
    backbone = cfg.model.backbone
    if row != 'e2e':
        backbone.transfer = ABLATION.get(row, backbone.get('transfer'))
        backbone.loss_weight = args.loss_weight
        cfg.optim_wrapper.clip_scope = args.clip_scope
        if args.local_lr_mult != 1:
            cfg.optim_wrapper.paramwise_cfg = {'custom_keys': {'backbone.local': {'lr_mult': args.local_lr_mult}}}
        backbone = backbone.backbone
    backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    load = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations', 'with_bbox': True}]
    resize = {'type': 'Resize', 'scale': (args.size, args.size), 'keep_ratio': True}
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    dataset = {
        'type': 'CocoDataset',
        'data_root': '',
        'ann_file': str(annotations),
        'data_prefix': {'img': str(args.data_root / 'train2017')},
        'pipeline': [*load, resize, {'type': 'PackDetInputs', 'meta_keys': meta}],
    }
    for key in ('train_dataloader', 'val_dataloader'):
        cfg[key].update(batch_size=args.batch, num_workers=0, persistent_workers=False)
        cfg[key].pop('dataset')
        cfg[key].dataset = {**dataset, 'test_mode': key == 'val_dataloader'}
    cfg.train_dataloader.sampler = {'type': 'InfiniteSampler', 'shuffle': True}
    cfg.val_evaluator.ann_file = str(annotations)
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.train_cfg = {'type': 'IterBasedTrainLoop', 'max_iters': args.iters, 'val_interval': args.val_interval}
    cfg.optim_wrapper.optimizer = OPTIMIZERS[args.optimizer] | {'lr': args.lr}
    cfg.optim_wrapper.clip_grad = {'max_norm': args.clip, 'norm_type': 2}
    cfg.param_scheduler = [
        {'type': 'LinearLR', 'start_factor': 0.01, 'by_epoch': False, 'begin': 0, 'end': 50},
        {'type': 'MultiStepLR', 'by_epoch': False, 'milestones': [int(args.iters * 0.8)], 'gamma': 0.1},
    ]
    cfg.default_hooks.logger.interval = min(10, args.val_interval)
    cfg.default_hooks.checkpoint = {
        'type': 'CheckpointHook',
        'by_epoch': False,
        'interval': args.iters,
        'save_optimizer': False,
    }
    cfg.log_processor = {'type': 'LogProcessor', 'by_epoch': False, 'window_size': 20}
    cfg.randomness = {'seed': args.seed}
    cfg.work_dir = str(args.work_dir / row)
    return cfg


def read_scalars(folder: Path) -> list[dict]:
    """What mmengine's local backend logged in the last run of a row."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in files[-1].read_text().splitlines()] if files else []


def summarize(work_dir: Path, val_interval: int) -> None:
    """Print the table of all rows in ``work_dir`` and draw their curves."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    table = Table('row', 'iterations', 'AP50', 'to e2e', 'AP', 'task loss', 's', title='train AP of the overfitted images')
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    reference = None
    for row in ('e2e', *ABLATION, 'light'):
        logged = read_scalars(work_dir / row)
        steps = [line for line in logged if 'loss' in line]
        metrics = [line for line in logged if 'loss' not in line]
        if not steps or not metrics:
            continue
        scores = [line.get('coco/bbox_mAP_50', 0.0) for line in metrics]  # CocoMetric gives nothing where nothing is found
        reference = scores[-1] if row == 'e2e' else reference
        ratio = f'{scores[-1] / reference:.2f}' if reference else '-'
        scales = ', '.join(f'{value:.3f}' for key, value in steps[-1].items() if key.endswith('/s'))
        numbers = (str(steps[-1]['step']), f'{scores[-1]:.3f}', ratio, f'{metrics[-1].get("coco/bbox_mAP", 0.0):.3f}')
        table.add_row(row, *numbers, f'{steps[-1]["loss"]:.3f}', scales or '-')
        left.plot([0, *(val_interval * (i + 1) for i in range(len(scores)))], [0, *scores], marker='o', label=row)
        right.plot([line['step'] for line in steps], [line['loss'] for line in steps], label=row)
    left.set(xlabel='iteration', ylabel='train AP50', ylim=(0, 1))
    right.set(xlabel='iteration', ylabel='task loss', yscale='log')
    left.legend()
    figure.savefig(work_dir / 'overfit.png', dpi=100)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-root', type=Path, required=True, help='a COCO folder: train2017/, annotations/')
    parser.add_argument('--rows', nargs='+', choices=['e2e', *ABLATION, 'light'], default=['e2e', 'manpp'])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/overfit'))
    parser.add_argument('--images', type=int, default=16)
    parser.add_argument('--size', type=int, default=256, help='longer side of the images, pixels')
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--iters', type=int, default=500)
    parser.add_argument('--val-interval', type=int, default=100)
    parser.add_argument('--optimizer', choices=[*OPTIMIZERS], default='adam')
    parser.add_argument('--lr', type=float, default=4e-4)
    parser.add_argument('--clip', type=float, default=10.0, help='gradient norm, over what --clip-scope says')
    parser.add_argument('--clip-scope', choices=['block', 'global'], default='block')
    parser.add_argument('--local-lr-mult', type=float, default=1.0, help='learning rate of the local heads over the rest')
    parser.add_argument('--loss-weight', type=float, default=1.0, help='weight of the local losses')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    annotations = args.work_dir / f'train_{args.images}.json'
    write_subset(args.data_root, args.images, annotations)
    for row in args.rows:
        Runner.from_cfg(row_config(args, row, annotations)).train()
    summarize(args.work_dir, args.val_interval)


if __name__ == '__main__':
    main()
