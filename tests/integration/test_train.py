"""From a shipped config to a trained detector and back: the tools, resuming, and what checkpoints carry from model to model."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmman import delocalize_
from mmman.datasets import write_shapes_dataset
from mmman.errors import CheckpointError
from tests.conftest import ROOT, TEST_DATA

mmdet = pytest.importorskip('mmdet')

IMAGES = 8
SIZE = 128


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Overrides that make any shipped config read eight images: of COCO where the test data is present, else generated ones."""
    root = tmp_path_factory.mktemp('data')
    classes = {}
    if (TEST_DATA / 'coco128').is_dir():
        source = TEST_DATA / 'coco128'
        coco = json.loads((source / 'annotations' / 'instances_train2017.json').read_text())
        boxes = [box for box in coco['annotations'] if not box['iscrowd']]
        kept = sorted({box['image_id'] for box in boxes})[:IMAGES]
        coco['images'] = [image for image in coco['images'] if image['id'] in kept]
        coco['annotations'] = [box for box in boxes if box['image_id'] in kept]
        annotations = root / 'coco.json'
        annotations.write_text(json.dumps(coco))
        images = source / 'train2017'
    else:
        root = write_shapes_dataset(root / 'shapes', train_images=IMAGES, val_images=0, size=SIZE)
        annotations, images = root / 'annotations' / 'instances_train.json', root / 'train'
        classes = {'metainfo.classes': ('circle', 'rectangle', 'triangle')}
    options = {}
    for split in ('train', 'val', 'test'):
        loader = {
            'num_workers': 0,
            'persistent_workers': False,
            'dataset.data_root': '',
            'dataset.ann_file': annotations,
            'dataset.data_prefix.img': images,
            **{f'dataset.{key}': value for key, value in classes.items()},
        }
        options |= {f'{split}_dataloader.{key}': value for key, value in loader.items()}
    return {
        **options,
        'train_dataloader.dataset.pipeline.2.scale': (SIZE, SIZE),
        'train_dataloader.dataset.pipeline.3.prob': 0.0,
        'train_dataloader.batch_sampler': None,
        'val_dataloader.dataset.pipeline.1.scale': (SIZE, SIZE),
        'test_dataloader.dataset.pipeline.1.scale': (SIZE, SIZE),
        'val_evaluator.ann_file': annotations,
        'test_evaluator.ann_file': annotations,
    }


def overrides(dataset: dict, is_local: bool, expansion: int = 1, **options) -> dict:
    """A deterministic run of two epochs on ``dataset``: a ResNet of a quarter of its width, from random weights.

    ``options`` has ``__`` for every dot of a key.
    """
    classes = dataset.get('train_dataloader.dataset.metainfo.classes')
    heads = ['bbox_head', 'backbone.local_head.bbox_head'] if is_local else ['bbox_head']
    backbone = 'model.backbone.backbone' if is_local else 'model.backbone'
    width = 64
    values = {
        **dataset,
        f'{backbone}.init_cfg': None,
        f'{backbone}.base_channels': 16,
        'model.neck.in_channels': [16 * expansion * 2**stage for stage in range(4)],
        'model.neck.out_channels': width,
        'model.test_cfg.score_thr': 0.0,
        'train_cfg.max_epochs': 2,
        'train_cfg.val_interval': 10,
        'param_scheduler.0.end': 2,
        'param_scheduler.1.milestones': [1],
        'optim_wrapper.clip_grad.max_norm': 10,
        'default_hooks.logger.interval': 1,
        'randomness.seed': 0,
    }
    for head in heads:
        values |= {f'model.{head}.in_channels': width, f'model.{head}.feat_channels': width}
        if classes:
            values[f'model.{head}.num_classes'] = len(classes)
    values |= {key.replace('__', '.'): value for key, value in options.items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def small_config(name: str, dataset: dict, **options) -> Config:
    cfg = Config.fromfile(ROOT / 'configs' / name)
    cfg.merge_from_dict(overrides(dataset, 'manpp' in name, **options))
    return cfg


class States(Hook):
    """Copies the model's state when training is about to start."""

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        self.first = copy.deepcopy(runner.model.state_dict())


def train(cfg: Config, work_dir: Path) -> dict[str, Tensor]:
    """Train and return the state dict with which training started."""
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    runner = Runner.from_cfg(cfg)
    states = States()
    runner.register_hook(states)
    runner.train()
    return states.first


def run_script(script: Path, *arguments: object, options: dict) -> None:
    """Run a command-line tool, options as ``--cfg-options``."""
    options = [f'{key}={value}'.replace(' ', '') for key, value in options.items()]
    command = [sys.executable, script, *arguments, '--cfg-options', *options]
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(paths)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def logged(work_dir: Path) -> list[dict]:
    """The scalars of all runs in a work folder, a dict an iteration or validation."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def load(path: Path) -> dict:
    return torch.load(path, map_location='cpu')


def unit_of(state: dict[str, Tensor], unit: str) -> dict[str, Tensor]:
    """The part of a state dict below one module."""
    return {key.removeprefix(f'{unit}.'): value for key, value in state.items() if key.startswith(f'{unit}.')}


def copies(state: dict[str, Tensor], head: str) -> list[dict[str, Tensor]]:
    """The momentum copy and the bias of the local head at a cut."""
    return [unit_of(state, f'backbone.local.{head}.transfer.{name}') for name in ('momentum', 'bias')]


def assert_same(ours: object, theirs: object, path: str = '') -> None:
    """Both are equal, tensors bit for bit."""
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key, value in ours.items():
            assert_same(value, theirs[key], f'{path}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f'{path}.{i}')
    else:
        assert ours == theirs, path


LOCAL = 'paper/retinanet_r18_manpp_k4.py'
END_TO_END = 'paper/retinanet_r18_e2e.py'
SOURCES = {'layer1_1': 'backbone.layer2.0', 'layer2_1': 'backbone.layer3.0', 'layer3_1': 'backbone.layer4.0'}
ONE_ITERATION = {'train_cfg__max_epochs': 1, 'train_dataloader__dataset__indices': 2}


@pytest.fixture(scope='module')
def local_run(dataset: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folder of a local run of two epochs, with a checkpoint after each."""
    work_dir = tmp_path_factory.mktemp('local_run')
    train(small_config(LOCAL, dataset), work_dir)
    return work_dir


@pytest.fixture(scope='module')
def end_to_end_run(dataset: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folder of an end-to-end run of one iteration."""
    work_dir = tmp_path_factory.mktemp('end_to_end_run')
    train(small_config(END_TO_END, dataset, **ONE_ITERATION), work_dir)
    return work_dir


def test_the_stock_train_script_runs_the_flagship(dataset: dict, tmp_path: Path) -> None:
    script = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    options = overrides(dataset, is_local=True, expansion=4, train_cfg__max_epochs=1, train_dataloader__dataset__indices=4)
    run_script(script, ROOT / 'configs' / 'paper' / 'retinanet_r50_manpp_k4.py', '--work-dir', tmp_path, options=options)

    scalars = [line for line in logged(tmp_path) if 'epoch' in line]
    assert len(scalars) == 2
    assert all(math.isfinite(line[f'local/{j}/loss']) for line in scalars for j in (1, 2, 3))
    state = load(tmp_path / 'epoch_1.pth')['state_dict']
    for head, source in {'layer1_2': 'layer2.0', 'layer2_3': 'layer3.0', 'layer3_5': 'layer4.0'}.items():
        momentum, bias = copies(state, head)
        assert momentum.keys() == bias.keys() == unit_of(state, f'backbone.{source}').keys()
        assert not torch.equal(momentum['conv1.weight'], bias['conv1.weight'])


def test_our_tools_train_resume_and_test(dataset: dict, tmp_path: Path) -> None:
    config = ROOT / 'configs' / LOCAL
    options = overrides(dataset, is_local=True, train_cfg__val_interval=1)
    trained, tested = tmp_path / 'train', tmp_path / 'test'
    for epochs, resume in ((1, []), (2, ['--resume'])):
        options |= {'train_cfg.max_epochs': epochs, 'val_evaluator.outfile_prefix': trained / f'{epochs}'}
        run_script(ROOT / 'tools' / 'train.py', config, '--work-dir', trained, *resume, options=options)
    options |= {'test_evaluator.outfile_prefix': tested / 'result'}
    run_script(ROOT / 'tools' / 'test.py', config, trained / 'epoch_2.pth', '--work-dir', tested, options=options)

    assert [line['epoch'] for line in logged(trained) if 'epoch' in line] == [1] * 4 + [2] * 4
    validated = [line for line in logged(trained) if 'coco/bbox_mAP' in line]
    assert len(validated) == 2
    (metrics,) = (json.loads(path.read_text()) for path in tested.glob('*/*.json'))
    assert {key: metrics[key] for key in metrics if 'mAP' in key} == {
        key: value for key, value in validated[-1].items() if 'mAP' in key
    }
    predictions = [json.loads(path.read_text()) for path in (trained / '2.bbox.json', tested / 'result.bbox.json')]
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) > IMAGES


def test_resumed_run_is_bitwise_the_uninterrupted_one(dataset: dict, local_run: Path, tmp_path: Path) -> None:
    train(small_config(LOCAL, dataset, resume=True, load_from=local_run / 'epoch_1.pth'), tmp_path)

    first, resumed, whole = load(local_run / 'epoch_1.pth'), load(tmp_path / 'epoch_2.pth'), load(local_run / 'epoch_2.pth')
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_same(resumed[part], whole[part], part)
    for head, source in SOURCES.items():
        momentum, bias = copies(whole['state_dict'], head)
        unit = unit_of(whole['state_dict'], source)
        for other in (bias, unit, copies(first['state_dict'], head)[0]):
            assert not torch.equal(momentum['conv1.weight'], other['conv1.weight'])
        assert whole['state_dict'][f'backbone.local.{head}.transfer.delta'] != 0


def test_copies_start_as_the_units_of_an_end_to_end_checkpoint(dataset: dict, end_to_end_run: Path, tmp_path: Path) -> None:
    checkpoint = end_to_end_run / 'epoch_1.pth'
    start = train(small_config(LOCAL, dataset, load_from=checkpoint, **ONE_ITERATION), tmp_path)

    loaded = load(checkpoint)['state_dict']
    assert_same({key: start[key] for key in loaded}, dict(loaded))
    for head, source in SOURCES.items():
        for copied in copies(start, head):
            assert_same(copied, unit_of(loaded, source), head)


def test_copies_of_a_local_checkpoint_are_kept_where_the_cut_is_the_same(
    dataset: dict, local_run: Path, tmp_path: Path
) -> None:
    checkpoint = local_run / 'epoch_2.pth'
    cfg = small_config(LOCAL, dataset, load_from=checkpoint, **ONE_ITERATION)
    cfg.model.backbone.update(num_blocks=None, partition=['layer1.1', 'layer2.0'])
    start = train(cfg, tmp_path)

    loaded = load(checkpoint)['state_dict']
    assert_same(copies(start, 'layer1_1'), copies(loaded, 'layer1_1'))
    for copied in copies(start, 'layer2_0'):
        assert_same(copied, unit_of(loaded, 'backbone.layer2.1'))


def test_a_local_checkpoint_starts_an_end_to_end_run(dataset: dict, local_run: Path, tmp_path: Path) -> None:
    checkpoint = local_run / 'epoch_2.pth'
    start = train(small_config(END_TO_END, dataset, load_from=checkpoint, **ONE_ITERATION), tmp_path)

    loaded = load(checkpoint)['state_dict']
    assert_same(dict(start), {key: value for key, value in loaded.items() if not key.startswith('backbone.local.')})


def test_resuming_with_another_partition_is_refused(dataset: dict, local_run: Path, tmp_path: Path) -> None:
    cfg = small_config(LOCAL, dataset, resume=True, load_from=local_run / 'epoch_1.pth', model__backbone__num_blocks=2)

    with pytest.raises(CheckpointError, match=r'local heads on \[layer1_1, layer2_1, layer3_1\], this config on \[layer2_1\]'):
        train(cfg, tmp_path)


def test_the_stock_inference_api_finds_the_same_boxes_with_and_without_local_heads(
    dataset: dict, local_run: Path, tmp_path: Path
) -> None:
    from mmdet.apis import inference_detector, init_detector

    image = next(Path(dataset['train_dataloader.dataset.data_prefix.img']).glob('*.jpg'))
    local = init_detector(small_config(LOCAL, dataset), str(local_run / 'epoch_2.pth'), device='cpu')
    with_heads = inference_detector(local, str(image)).pred_instances
    delocalize_(local.backbone)
    torch.save(local.state_dict(), tmp_path / 'stock.pth')
    stock = init_detector(small_config(END_TO_END, dataset), str(tmp_path / 'stock.pth'), device='cpu')
    without = inference_detector(stock, str(image)).pred_instances

    assert len(with_heads) > 0
    for key in ('bboxes', 'scores', 'labels'):
        assert torch.equal(with_heads[key], without[key])
