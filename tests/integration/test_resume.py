"""A run that is stopped, anywhere and more than once, ends with the same bits as one that is not."""

import itertools
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from mmman.errors import CheckpointError, NonFiniteLossError
from mmman.runtime.seeded import seed_process
from tests.integration.test_train import assert_same, load
from tests.parity.test_mlaan import LINEAR
from tests.toy import CLASSES, ToyClassifier, toy_config

IMAGES, BATCH, EPOCHS = 11, 3, 3
ITERATIONS = 4 * EPOCHS
FRESH = itertools.count(100)


class NoisyImages:
    """Images of two aspect ratios that every generator changes, each time anew."""

    def __init__(self, images: int) -> None:
        self.metainfo = {'classes': tuple(map(str, range(CLASSES)))}
        self.images = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.images)

    def get_data_info(self, index: int) -> dict:
        return {'width': 1 + index % 3, 'height': 2}

    def __getitem__(self, index: int) -> dict:
        factor = random.random() + np.random.rand()
        image = self.images[index] * factor + 0.1 * torch.randn(3, 8, 8, dtype=torch.float64)
        return {'inputs': image, 'data_samples': torch.tensor(index % CLASSES)}


class Mixup(BaseDataPreprocessor):
    """Mixes the images of a batch, as data preprocessors of the libraries do within the training step."""

    def forward(self, data: dict, training: bool = False) -> dict:
        share = np.random.beta(0.8, 0.8)
        order = torch.randperm(len(data['inputs']))
        return {**data, 'inputs': share * data['inputs'] + (1 - share) * data['inputs'][order]}


def local_model(**options) -> ToyClassifier:
    model = MODELS.build(toy_config(**options)).double()
    model.data_preprocessor = Mixup()
    model.register_module('dropout', nn.Dropout(0.3))
    model.head[0].register_forward_pre_hook(lambda module, inputs: model.dropout(inputs[0]))
    return model


class StoppedError(Exception):
    pass


class StopAfter(Hook):
    """Stops a run as a kill would, once a checkpoint of that iteration is there."""

    priority = 'LOWEST'

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        if runner.iter + 1 == self.iteration:
            raise StoppedError


def loader_of(sampler='default', workers=0, persistent=False, aspect=False, drop_last=False, batch=BATCH, images=IMAGES):
    dataset = NoisyImages(images)
    sampler = {'default': DefaultSampler, 'infinite': InfiniteSampler}[sampler](dataset)
    options = {'num_workers': workers, 'persistent_workers': persistent}
    if aspect:
        from mmdet.datasets.samplers import AspectRatioBatchSampler

        return DataLoader(dataset, batch_sampler=AspectRatioBatchSampler(sampler, batch, drop_last), **options)
    return DataLoader(dataset, batch_size=batch, sampler=sampler, drop_last=drop_last, **options)


def start(
    folder, by_epoch=True, loaders=loader_of, accumulate=1, stop=None, resume=None, seed=None, local=None, **options
) -> Runner:
    """Train from the beginning or from a checkpoint; where ``stop`` is an iteration, the run ends there."""
    seed_process(next(FRESH) if seed is None else seed)
    schedulers = [
        {'type': 'MultiStepLR', 'by_epoch': by_epoch, 'milestones': [1, 2], 'gamma': 0.5},
        {'type': 'LinearLR', 'by_epoch': False, 'start_factor': 0.1, 'begin': 0, 'end': 7},
    ]
    train_cfg = {'type': 'mmman.EpochBasedTrainLoop', 'max_epochs': EPOCHS}
    if not by_epoch:
        train_cfg = {'type': 'mmman.IterBasedTrainLoop', 'max_iters': ITERATIONS}
    checkpoint = {'type': 'mmman.CheckpointHook', 'by_epoch': False, 'interval': 1, 'max_keep_ckpts': 1}
    arguments = dict(
        model=local_model(**(local or {})),
        work_dir=str(folder),
        train_dataloader=loaders(),
        train_cfg={**train_cfg, 'val_interval': 99},
        optim_wrapper={
            'type': 'mmman.LocalLearningOptimWrapper',
            'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-3},
            'accumulative_counts': accumulate,
        },
        param_scheduler=schedulers,
        custom_hooks=[
            {'type': 'mmman.EMABiasHook', 'momentum': 0.9},
            {'type': 'EMAHook', 'priority': 49},
            *([StopAfter(stop)] if stop else []),
        ],
        default_hooks={'logger': None, 'checkpoint': checkpoint},
        randomness={'seed': seed},
        resume=resume is not None,
        load_from=resume and str(resume),
        log_level='ERROR',
        experiment_name=f'{folder.name}-{random.Random().random()}',
    )
    runner = Runner(**{**arguments, **options})
    try:
        runner.train()
    except StoppedError:
        assert stop
    if (workers := runner.train_dataloader._iterator) is not None:
        workers._shutdown_workers()  # left to the garbage collector, persistent ones are waited for
    return runner


def checkpoint_in(folder):
    (path,) = folder.glob('iter_*.pth')
    return path


def interrupted(folder, stops, first_seed=None, loaders=loader_of, **options):
    """Train in pieces that end after the iterations of ``stops``, and return the last checkpoint."""
    resume, seed = None, first_seed
    for stop in [*stops, None]:
        start(folder, stop=stop, resume=resume, seed=seed, loaders=loaders, **options)
        resume, seed = checkpoint_in(folder), None
    return load(resume)


def whole(folder, loaders=loader_of, **options):
    start(folder, seed=5, loaders=loaders, **options)
    return load(checkpoint_in(folder))


PARTS = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')


def assert_same_training(ours, theirs, parts=PARTS, iterations=ITERATIONS):
    assert ours['meta']['iter'] == theirs['meta']['iter'] == iterations
    for part in parts:
        assert_same(ours[part], theirs[part], part)


KINDS = {
    'epochs': {},
    'epochs, workers': {'workers': 2},
    'epochs, persistent workers': {'workers': 2, 'persistent': True},
    'epochs, accumulation': {'accumulate': 3},
    'epochs, MLAAN': {'local': {'transfer': {'source_unit': 'next_stage'}, 'window': 2, 'independent_head': LINEAR}},
    'epochs, aspect ratios': {'aspect': True},
    'iterations, infinite sampler': {'by_epoch': False, 'sampler': 'infinite'},
    'iterations, workers': {'by_epoch': False, 'sampler': 'infinite', 'workers': 2, 'persistent': True},
    'iterations, finite sampler': {'by_epoch': False},
    'iterations, aspect ratios, last dropped': {'by_epoch': False, 'aspect': True, 'drop_last': True, 'accumulate': 2},
}


@pytest.mark.parametrize('kind', KINDS)
def test_stopped_runs_end_as_the_whole_one(kind, tmp_path):
    options = dict(KINDS[kind])
    run = {name: options.pop(name) for name in ('by_epoch', 'accumulate', 'local') if name in options}
    if options.get('aspect'):
        pytest.importorskip('mmdet')

    def loaders():
        return loader_of(**options)

    reference = whole(tmp_path / 'whole', loaders, **run)
    stops = [6] if 'workers' in options else [1, 3, 4, 6, 11]
    resumed = interrupted(tmp_path / 'stopped', stops, first_seed=5, loaders=loaders, **run)

    assert_same_training(resumed, reference)
    assert reference['meta']['seed'] == resumed['meta']['seed'] == 5


@pytest.mark.parametrize(
    ('loaders', 'source'),
    [
        (lambda: DataLoader(NoisyImages(4), batch_size=2, shuffle=True), 'RandomSampler, which has no seed'),
        (lambda: DataLoader(Stream(), batch_size=2), 'a custom loader or an iterable dataset'),
    ],
)
@pytest.mark.parametrize('by_epoch', [True, False])
def test_data_that_cannot_be_positioned_is_trained_with_a_warning(loaders, source, by_epoch, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr('mmman.runtime.loops.print_log', lambda message, **_: messages.append(message))
    start(tmp_path, by_epoch, loaders, stop=3)
    assert messages == [f'The training data comes from {source}: a resumed run will not be exact']


class Stream(IterableDataset):
    def __iter__(self):
        images = NoisyImages(4)
        return (images[index] for index in range(4))

    def __len__(self):
        return 4


def test_a_run_ends_where_a_local_loss_is_not_finite_and_names_the_block(tmp_path):
    class Spoil(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 6:
                runner.model.backbone.local['layer1_1'].fc[0].weight.data.fill_(float('nan'))

    with pytest.raises(NonFiniteLossError, match=r'local/2/loss_ce = nan'):
        start(tmp_path, seed=0, custom_hooks=[{'type': 'mmman.EMABiasHook'}, Spoil()])
    saved = load(checkpoint_in(tmp_path))
    assert saved['meta']['iter'] == 6
    assert all(torch.isfinite(value).all() for value in saved['state_dict'].values())


def saved_run(folder, **options):
    start(folder, seed=0, stop=6, **options)
    return checkpoint_in(folder)


ADAM = {'type': 'mmman.LocalLearningOptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 0.1}}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'by_epoch': False}, 'the checkpoint counts epochs, train_cfg iterations'),
        (
            {'optim_wrapper': ADAM},
            'the class of the optimizer: SGD in the checkpoint, AdamW in this run; resume with the config',
        ),
        ({'param_scheduler': []}, 'parameter schedulers: 2 in the checkpoint, 0 in this run'),
        (
            {'loaders': lambda: loader_of(batch=4)},
            r'at batch 2 of an epoch with other data: batch size is 3 in the checkpoint, 4 in this run. Resume',
        ),
        (
            {'loaders': lambda: loader_of(images=8)},
            'dataset length is 11 in the checkpoint, 8 in this run',
        ),
        (
            {'loaders': lambda: loader_of(drop_last=True)},
            'batches is 4 in the checkpoint, 3 in this run',
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(options, message, tmp_path):
    path = saved_run(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path, resume=path, **options)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = saved_run(tmp_path)
    model = local_model()
    model.head[0] = nn.Linear(8, CLASSES + 1).double()
    message = r'different model, head.0.bias: float64 \(5,\) in the checkpoint, float64 \(6,\) in this run \(1 more differ\)'
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path, resume=path, model=model)
    stripped = {name: value for name, value in load(path).items() if name != 'optimizer'}
    torch.save(stripped, path)
    with pytest.raises(CheckpointError, match=r'has no optimizer state, e.g. because it is a published one or a best_\*.pth'):
        start(tmp_path, resume=path)


def test_other_data_is_allowed_between_epochs(tmp_path):
    start(
        tmp_path, seed=0, stop=5, default_hooks={'logger': None, 'checkpoint': {'type': 'mmman.CheckpointHook', 'interval': 1}}
    )
    runner = start(tmp_path, resume=tmp_path / 'epoch_1.pth', loaders=lambda: loader_of(batch=4))
    assert runner.epoch == EPOCHS and runner.iter == 4 + 2 * 3


def test_the_log_counts_on_within_the_epoch(tmp_path):
    class Seen(Hook):
        def __init__(self):
            self.batches = []

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.batches.append((runner.epoch, batch_idx, len(runner.train_dataloader)))

    start(tmp_path, seed=0, stop=6)
    seen = Seen()
    start(tmp_path, resume=checkpoint_in(tmp_path), custom_hooks=[{'type': 'mmman.EMABiasHook'}, {'type': 'EMAHook'}, seen])
    assert seen.batches[:3] == [(1, 2, 4), (1, 3, 4), (2, 0, 4)]
