"""Test any mmdet, mmseg or mmpretrain config on a checkpoint, locally trained or not.

Examples:

    python tools/test.py CONFIG CHECKPOINT --out results.pkl
    tools/dist_test.sh CONFIG CHECKPOINT 8
"""

from __future__ import annotations

import argparse
from copy import deepcopy

from mmengine.config import Config
from mmengine.runner import Runner

import mmman  # noqa: F401  registers its parts, and reads every checkpoint
from mmman.analysis.dummy_model import scope_of
from mmman.runtime.launch import (
    add_common_arguments,
    build_runner,
    check_checkpoint,
    end_on_error,
    is_pipeline,
    leave_process_group,
    load_config,
    type_name,
    watch_peers,
)

# For each visualization hook: what makes it draw every image, and its folder for them (mmseg's leaves that to the visualizer).
VISUALIZATION_HOOKS = {
    'DetVisualizationHook': (dict(draw=True), 'test_out_dir'),
    'TrackVisualizationHook': (dict(draw=True, frame_interval=1), 'test_out_dir'),
    'SegVisualizationHook': (dict(draw=True, interval=1), None),
    'VisualizationHook': (dict(enable=True, interval=1), 'out_dir'),
}

# What averages over flips where the config has no test-time augmentation of its own; mmseg's configs all have one.
DEFAULT_TTA = {
    'mmdet': dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    'mmpretrain': dict(type='AverageClsScoreTTA'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test a detector, a segmentor or a classifier')
    parser.add_argument('config', help='config file, or library::path of one that a library brings')
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    add_common_arguments(parser)
    parser.add_argument('--out', metavar='PKL', help='write the predictions to this pickle file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='write pictures of the predictions to this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows each picture')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation: the config's, or flips")
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out}: give a file that ends in .pkl')
    return args


def enable_visualization(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Let the library's own hook show the predictions, or draw them into a folder."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    name = type_name(hook or {})
    if name not in VISUALIZATION_HOOKS:
        raise SystemExit(
            f'--show and --show-dir need default_hooks.visualization to be one of {", ".join(VISUALIZATION_HOOKS)}; '
            f'the config has {name or "none"}'
        )
    switch_on, folder = VISUALIZATION_HOOKS[name]
    hook.update(switch_on, show=show, wait_time=wait_time)
    if show_dir and folder:
        hook[folder] = show_dir
    elif show_dir:
        cfg.visualizer.save_dir = show_dir


def enable_tta(cfg: Config) -> None:
    """Wrap the model in its test-time augmentation: the config's, or the average over a horizontal flip."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # inside a wrapper such as RepeatDataset
        dataset = dataset.dataset
    scope = cfg.get('default_scope')
    if 'tta_model' not in cfg:
        if scope not in DEFAULT_TTA:
            raise SystemExit('--tta: the config has no tta_model; add one, for example dict(type="SegTTAModel")')
        cfg.tta_model = DEFAULT_TTA[scope]
    if 'tta_pipeline' not in cfg:
        if scope not in DEFAULT_TTA:
            raise SystemExit('--tta: the config has no tta_pipeline; add one that ends in a TestTimeAug transform')
        *load, pack = deepcopy(dataset.pipeline)
        if scope == 'mmdet':  # mmpretrain packs these by default
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def dump_predictions(runner: Runner, path: str) -> None:
    """Let the runner write its predictions to a pickle file, besides evaluating them."""
    if scope_of(runner.cfg) == 'mmdet':
        from mmdet.evaluation import DumpDetResults as DumpResults  # encodes masks
    else:
        from mmengine.evaluator import DumpResults
    runner.test_evaluator.metrics.append(DumpResults(out_file_path=path))


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = check_checkpoint(args.checkpoint, 'checkpoint')
    if args.show or args.show_dir:
        enable_visualization(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        enable_tta(cfg)
    if is_pipeline(cfg):
        cfg.pop('runner_type')  # a whole model is evaluated, by one process or data parallel
        cfg.pop('pipeline', None)
    with end_on_error(cfg.load_from), watch_peers(cfg) as watchdog:
        runner = build_runner(cfg, watchdog)
        if args.out:
            dump_predictions(runner, args.out)
        runner.test()
        leave_process_group()


if __name__ == '__main__':
    main()
