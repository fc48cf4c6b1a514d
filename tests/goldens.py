"""Hashes of short trainings, to show that a change of the code computes nothing differently.

Each case trains three steps on random images and hashes the state dict, the optimizer's state and the log. A refactoring
reproduces every hash of the commit it started from:

    python -m tests.goldens record
    python -m tests.goldens compare

Hashes hold for one CPU and one version of torch, because libraries choose their kernels by both. They are kept in
``tests/goldens.json`` with the machine that they were recorded on; ``compare`` refuses another one.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

import mmman
from mmman.analysis.dummy_model import model_config, random_batch
from tests.configs import read_config
from tests.parity.pipeline_runs import run_alone, run_in_processes, toy_run
from tests.parity.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / 'tests' / 'goldens.json'
STEPS, MOMENTUM = 3, 0.9

SGD = {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9, 'weight_decay': 1e-4}
ADAM = {'type': 'AdamW', 'lr': 1e-3}
DET = (2, 64, 96)
"""Images, height and width."""


def own(
    name: str, optim_wrapper: dict | None = None, optimizer: dict = SGD, local_head: dict | None = None, **model: Any
) -> Config:
    """A config of this project with changes to its optim wrapper, another local head, and changes to its model."""
    cfg = read_config(name)
    if local_head is not None:
        cfg.model.backbone.local_head = {**local_head, 'head': cfg.model.head}
    cfg.merge_from_dict({f'model.{key.replace("__", ".")}': value for key, value in model.items()})
    cfg.optim_wrapper = {**cfg.optim_wrapper, **(optim_wrapper or {}), 'optimizer': optimizer}
    return cfg


def stock(name: str, num_blocks: int, local_head: Callable[[Config], dict], optimizer: dict = SGD, **backbone: Any) -> Config:
    """A stock config of a library, localised by hand."""
    cfg = get_config(name)
    inner = {**cfg.model.backbone, 'init_cfg': None, **backbone}
    options = {'num_blocks': num_blocks, 'local_head': local_head(cfg)}
    cfg.model.backbone = {'type': 'mmman.LocalBackbone', 'backbone': inner, **options}
    cfg.optim_wrapper = {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': optimizer}
    return cfg


def dense(cfg: Config) -> dict:
    return {'type': 'mmman.DetLocalHead', 'bbox_head': cfg.model.bbox_head, 'train_cfg': cfg.model.get('train_cfg')}


def atss() -> Config:
    cfg = stock('mmdet::atss/atss_r50_fpn_1x_coco.py', 4, dense, depth=18)
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    cfg.optim_wrapper.images_per_chunk = 2
    return cfg


def fcos() -> Config:
    cfg = stock('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 4, dense, depth=18, style='pytorch')
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    cfg.optim_wrapper.images_per_chunk = 1
    return cfg


def faster_rcnn() -> Config:
    return stock(
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 4, lambda _: {'type': 'mmman.DetLocalHead', 'num_classes': 80}
    )


def swin() -> Config:
    return stock('mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py', 3, dense, ADAM, drop_path_rate=0.0)


R18 = 'paper/retinanet_r18_manpp_k4.py'
LIGHT = 'retinanet_r18_manpp_k4.py'
CIFAR = 'table1/cifar10_resnet32_k16_{}'
CASES: dict[str, tuple[Callable[[], Config], tuple[int, int, int], bool]] = {
    'retinanet': (partial(own, R18), DET, True),
    'retinanet, frozen, adam': (
        partial(own, 'paper/retinanet_r50_manpp_k4.py', None, ADAM, backbone__backbone__frozen_stages=1),
        DET,
        True,
    ),
    'retinanet, light: chunks and recompute': (partial(own, LIGHT), (3, 64, 96), True),
    'retinanet, light, immediate': (partial(own, LIGHT, {'update': 'immediate'}), DET, True),
    'retinanet, light, bfloat16': (partial(own, LIGHT, {'dtype': 'bfloat16'}), DET, False),
    'retinanet, light, clipped, accumulated': (
        partial(own, LIGHT, {'clip_grad': {'max_norm': 1.0}, 'accumulative_counts': 2}),
        DET,
        True,
    ),
    'retinanet, selective recompute': (
        partial(own, R18, backbone__recompute=['stem', 'layer1'], backbone__selective_recompute=['layer2', 'layer3']),
        DET,
        True,
    ),
    'fcos, chunks': (fcos, (2, 64, 96), True),
    'atss, chunks': (atss, (3, 64, 96), True),
    'faster r-cnn': (faster_rcnn, (1, 96, 128), False),
    'deeplabv3, infopro': (
        partial(own, 'paper/deeplabv3_r50_manpp_k2.py', pretrained=None),
        (2, 64, 64),
        True,
    ),
    'deeplabv3plus, light': (partial(own, 'deeplabv3plus_r50_manpp_k2.py', pretrained=None), (2, 64, 64), True),
    'resnet-32, infopro': (partial(own, CIFAR.format('infopro_manpp')), (8, 32, 32), True),
    'resnet-32, dgl': (partial(own, CIFAR.format('dgl_manpp')), (8, 32, 32), True),
    'resnet-32, auglocal': (
        partial(
            own,
            CIFAR.format('dgl_man'),
            local_head={'type': 'mmman.AugLocalHead'},
        ),
        (8, 32, 32),
        True,
    ),
    'resnet-32, predsim': (
        partial(
            own,
            CIFAR.format('dgl'),
            local_head={'type': 'mmman.PredSimLocalHead'},
        ),
        (8, 32, 32),
        True,
    ),
    'vit, light': (partial(own, 'vit-tiny_manpp_k6_imagenet.py', None, ADAM), (2, 224, 224), True),
    'swin, retinanet': (swin, (1, 128, 160), True),
}


def build(cfg: Config, size: tuple[int, int, int], is_double: bool) -> BaseModel:
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(model_config(cfg, *size[1:])))
    model.backbone.local.init_weights()
    for head in model.backbone.local.values():
        head.transfer.init_from_(head.source.of(model.backbone))
    return (model.double() if is_double else model).train()


def train(name: str, wrap: Callable = lambda model: model, rank: int = 0) -> dict[str, str]:
    """Train a case, and hash what comes of it."""
    make, size, is_double = CASES[name]
    cfg = make()
    model = build(cfg, size, is_double)
    hub = MessageHub.get_current_instance()
    hub.log_scalars.clear()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    optim_wrapper.initialize_count_status(model, 0, STEPS)
    wrapped, log = wrap(model), []
    for step in range(STEPS):
        torch.manual_seed(step)
        batch = random_batch(model, cfg.default_scope, *size, seed=10 * rank + step)
        log.append(wrapped.train_step(copy.deepcopy(batch), optim_wrapper))
        for head in model.backbone.local.values():
            head.transfer.ema_update_(head.source.of(model.backbone), MOMENTUM)
    logged = {key: [float(value) for value in buffer.data[0]] for key, buffer in hub.log_scalars.items()}
    return {
        'weights': digest(model.state_dict()),
        'optimizer': digest(optim_wrapper.optimizer.state_dict()['state']),
        'log': digest({'steps': log, 'logged': logged}),
    }


def on_rank(rank: int, world: int, name: str, folder: str) -> None:
    wrap = partial(mmman.LocalDistributedDataParallel, broadcast_buffers=False)
    Path(folder, f'{rank}.json').write_text(json.dumps(train(name, wrap, rank)))


def distributed(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(on_rank, 2, folder, name, folder)
        ranks = [json.loads(Path(folder, f'{rank}.json').read_text()) for rank in range(2)]
    return {f'{key}, rank {rank}': value for rank, own in enumerate(ranks) for key, value in own.items()}


def through_runner(processes: int) -> dict[str, str]:
    """The toy classifier in single precision: one stage a process, or all of it in one, with mmengine's loops and hooks."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = toy_run(folder, iters=STEPS, staleness=1)
        if processes == 1:
            checkpoint = run_alone(cfg)
        else:
            run_in_processes([(cfg, processes)])
            checkpoint = torch.load(Path(folder, 'last_checkpoint').read_text())
    return {'weights': digest(checkpoint['state_dict']), 'optimizer': digest(checkpoint['optimizer']['state'])}


OTHERS: dict[str, Callable[[], dict[str, str]]] = {
    'retinanet, light, two ranks': partial(distributed, 'retinanet, light: chunks and recompute'),
    'resnet-32, infopro, two ranks': partial(distributed, 'resnet-32, infopro'),
    'toy, through a runner': partial(through_runner, 1),
    'toy, pipeline of four': partial(through_runner, 4),
}


def digest(value: Any) -> str:
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f'{value.dtype}{tuple(value.shape)}'.encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value if all(isinstance(key, int) for key in value) else sorted(value):
            found.update(str(key).encode())
            _feed(found, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(found, item)
    else:
        found.update(repr(value).encode())


def machine() -> dict[str, str]:
    return {'cpu': torch.backends.cpu.get_cpu_capability(), 'processor': platform.processor(), 'torch': torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('action', choices=('record', 'compare'))
    parser.add_argument('--only', nargs='+', metavar='WORD', help='cases whose name has one of these words')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    names = [n for n in (*CASES, *OTHERS) if not args.only or any(word in n for word in args.only)]
    known = json.loads(FILE.read_text()) if FILE.exists() else {'machine': machine(), 'hashes': {}}
    if args.action == 'compare' and known['machine'] != machine():
        sys.exit(f'recorded on {known["machine"]}, this is {machine()}: record on the commit to compare with first')
    differing = []
    for name in names:
        start = time.perf_counter()
        found = OTHERS[name]() if name in OTHERS else train(name)
        same = found == known['hashes'].get(name)
        result = 'recorded' if args.action == 'record' else 'same' if same else 'DIFFERENT'
        print(f'{name:45} {result:10} {time.perf_counter() - start:5.1f} s', flush=True)
        if args.action == 'record':
            known['hashes'][name] = found
        elif not same:
            differing.append(name)
    if args.action == 'record':
        FILE.write_text(json.dumps({'machine': machine(), 'hashes': known['hashes']}, indent=1) + '\n')
    elif differing:
        sys.exit(f'{len(differing)} of {len(names)} cases differ')


if __name__ == '__main__':
    main()
