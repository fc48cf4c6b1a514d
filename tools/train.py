"""Train any mmdet, mmseg or mmpretrain config, with local learning or without.

Examples:

    python tools/train.py configs/demo/retinanet_r18_manpp_k2_shapes.py
    mmman train mmman::retinanet_r50_manpp_k4.py             # the same, with an installed config
    tools/dist_train.sh configs/retinanet_r50_manpp_k4.py 8 --amp
"""

from __future__ import annotations

import argparse

from mmengine.config import Config
from mmengine.device import get_device

import mmman  # noqa: F401  registers its parts, and reads every checkpoint
from mmman.runtime.atomic_files import check_folder, converting_full_disk_errors
from mmman.runtime.launch import (
    LOCAL_LEARNING,
    add_common_arguments,
    build_runner,
    end_on_error,
    leave_process_group,
    load_config,
    set_resume,
    type_name,
    watch_peers,
)
from mmman.runtime.resume import use_exact_resume


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector, a segmentor or a classifier')
    parser.add_argument('config', help='config file, or library::path of one that a library brings')
    add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from this checkpoint; without a value, from the latest one in the work folder, if any; '
        "'previous': from the one before",
    )
    return parser.parse_args()


def enable_amp(cfg: Config) -> None:
    """Switch the config's optim wrapper to mixed precision; what the config says about it already is kept."""
    wrapper = cfg.optim_wrapper
    name = type_name(wrapper, 'OptimWrapper')
    if name == LOCAL_LEARNING:
        # autocast on CPU knows bfloat16 only, and bfloat16 needs no loss scale
        if wrapper.setdefault('dtype', 'bfloat16' if get_device() == 'cpu' else 'float16') == 'float16':
            wrapper.setdefault('loss_scale', 'dynamic')
    elif get_device() == 'cpu':
        raise SystemExit(f'--amp: without a GPU only {LOCAL_LEARNING} trains in mixed precision; leave --amp out')
    elif name in ('OptimWrapper', 'AmpOptimWrapper'):
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    else:
        raise SystemExit(f'--amp does not know the optim wrapper {name}; enable mixed precision in the config')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Switch on the scaling of the learning rate that the config describes."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SystemExit(
            '--auto-scale-lr: the config does not say for which batch size its learning rate is meant; '
            'add auto_scale_lr = dict(base_batch_size=...)'
        )
    cfg.auto_scale_lr.enable = True


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    set_resume(cfg, args.resume)
    use_exact_resume(cfg)
    with end_on_error(cfg.get('load_from')), watch_peers(cfg) as watchdog, converting_full_disk_errors(cfg.work_dir):
        check_folder(cfg.work_dir)
        build_runner(cfg, watchdog).train()
        leave_process_group()


if __name__ == '__main__':
    main()
