"""Make a checkpoint to share of a training checkpoint: without local heads, optimizer and log; loadable as pretrained weights.

Examples:

    python tools/publish_model.py work_dirs/resnet50/epoch_90.pth resnet50_manpp.pth
    python tools/publish_model.py work_dirs/resnet50/epoch_90.pth resnet50_manpp.pth --backbone-only --ema
    python tools/publish_model.py work_dirs/resnet50/epoch_90.pth resnet50_tv.pth --format torchvision
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mmman  # noqa: F401  reads every checkpoint
from mmman.errors import CheckpointError
from mmman.runtime.formats import FORMATS
from mmman.runtime.publish import publish


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Make a checkpoint to share of a training checkpoint')
    parser.add_argument('checkpoint', type=Path, help='training checkpoint')
    parser.add_argument('out', type=Path, help='output <stem>.pth, written as <stem>-<first 8 digits of its SHA-256 sum>.pth')
    parser.add_argument('--backbone-only', action='store_true', help='only backbone.*: to pretrain a detector or segmentor')
    parser.add_argument(
        '--format',
        choices=['mm', *FORMATS],
        default='mm',
        help="whose names: mm keeps OpenMMLab's; torchvision and timm write the backbone alone, for strict loading into their "
        'ResNets and vision transformers, apart from the classifier',
    )
    parser.add_argument('--ema', action='store_true', help="the weights that mmengine's EMAHook averaged")
    parser.add_argument('--force', action='store_true', help='overwrite an existing file')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        file, summary = publish(args.checkpoint, args.out, args.backbone_only, args.format, args.ema, args.force)
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    print(f'{file}: {summary}')


if __name__ == '__main__':
    main()
