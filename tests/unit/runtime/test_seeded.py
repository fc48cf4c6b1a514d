"""Every sample is a function of its seed, and any batch of a pass can be had without the ones before it."""

import logging
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, DefaultSampler, InfiniteSampler, RepeatDataset
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

from mmman.runtime.seeded import SeededBatchSampler, SeededDataLoader, SeededDataset, SeededIndex, derive_seeds


class Draws:
    """A dataset that says what each generator draws."""

    def __init__(self, size=10):
        self.size, self.pipeline = size, 'first'

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item(), self.pipeline


def batches(sampler, epoch=0, batch=0, seed=3):
    batch_sampler = SeededBatchSampler(BatchSampler(sampler, 3, drop_last=False))
    batch_sampler.start(seed, epoch, batch)
    return iter(batch_sampler)


def test_a_sample_is_drawn_from_its_seed_by_all_generators():
    dataset = SeededDataset(Draws())
    first, again, other = dataset[SeededIndex(4, 2**63)], dataset[SeededIndex(4, 2**63)], dataset[SeededIndex(4, 1)]
    assert first == again
    assert first[0] == other[0] == 4
    assert all(one != two for one, two in zip(first[1:4], other[1:4], strict=True))


def test_attributes_are_those_of_the_wrapped_dataset():
    wrapped = Draws()
    dataset = SeededDataset(wrapped)
    dataset.pipeline = 'second'
    assert wrapped.pipeline == dataset.pipeline == 'second'
    assert len(dataset) == 10 and not hasattr(dataset, 'metainfo')
    restored = pickle.loads(pickle.dumps(dataset))
    assert isinstance(restored, SeededDataset) and restored.pipeline == 'second'


def test_a_dataset_that_loads_many_at_once_is_asked_one_by_one():
    dataset = SeededDataset(Subset(Draws(), [5, 6, 7]))
    assert not hasattr(dataset, '__getitems__')
    assert dataset[SeededIndex(1, 0)][0] == 6


@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
def test_any_batch_of_a_pass_without_those_before(sampler):
    whole = batches(sampler(Draws(), seed=0), epoch=2)
    expected = [next(whole) for _ in range(4)]
    rest = batches(sampler(Draws(), seed=0), epoch=2, batch=2)
    assert [next(rest), next(rest)] == expected[2:]
    assert len({item.seed for batch in expected for item in batch}) == sum(map(len, expected))


def test_each_pass_has_an_order_of_its_own():
    orders = [[item.index for batch in batches(DefaultSampler(Draws(), seed=0), epoch) for item in batch] for epoch in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == [*range(10)]


def test_seeds_differ_by_run_pass_and_rank():
    sampler = DefaultSampler(Draws(), shuffle=False)
    seeds = {next(batches(sampler, epoch=epoch, seed=seed))[0].seed for epoch in (0, 1) for seed in (0, 1)}
    sampler.rank = 1
    seeds.add(next(batches(sampler, seed=0))[0].seed)
    assert len(seeds) == 5
    assert derive_seeds(1, 2) != derive_seeds(2, 1)


def test_what_a_short_pass_could_not_leave_out_is_left_for_the_next():
    batch_sampler = SeededBatchSampler(BatchSampler(DefaultSampler(Draws()), 3, drop_last=False))
    batch_sampler.start(0, 0, 7)
    assert [*batch_sampler] == [] and batch_sampler.to_skip == 3


@pytest.mark.parametrize('context', [None, 'fork', 'spawn'])
def test_workers_draw_what_the_main_process_draws(context):
    def loader(**options):
        stock = DataLoader(Draws(6), batch_size=2, sampler=DefaultSampler(Draws(6), seed=0), collate_fn=list, **options)
        seeded = SeededDataLoader.of(stock)
        seeded.batch_sampler.start(0, 0, 0)
        return [*seeded]

    options = {'num_workers': 1 if context == 'spawn' else 2, 'multiprocessing_context': context} if context else {}
    assert loader(**options) == loader()


def test_which_loaders_can_be_positioned():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    assert SeededDataLoader.supports(DataLoader(Draws()))
    assert not SeededDataLoader.supports(DataLoader(Stream()))
    assert not SeededDataLoader.supports(DataLoader(Draws(), batch_size=None))


class Numbers(BaseDataset):
    """Samples of a random pipeline, as the datasets of the libraries have it."""

    def load_data_list(self):
        return [{'number': number, 'width': 1, 'height': 1} for number in range(6)]

    def get_cat_ids(self, index):
        return [index % 2]


def add_noise(results):
    return {'number': results['number'], 'noise': np.random.rand() + random.random()}


class Mix:
    """A transform of several images, as mmdet's mosaic."""

    def get_indexes(self, dataset):
        return [random.randint(0, len(dataset) - 1)]

    def __call__(self, results):
        return {**results, 'mixed': results['mix_results'][0]['number'], 'noise': np.random.rand()}


def wrapped(name):
    numbers = Numbers(pipeline=[add_noise])
    if name == 'MultiImageMixDataset':
        dataset = pytest.importorskip('mmdet.datasets').MultiImageMixDataset(numbers, [{'type': 'Compose', 'transforms': []}])
        dataset.pipeline, dataset.pipeline_types = [Mix()], ['Mix']
        return dataset
    return {
        'RepeatDataset': lambda: RepeatDataset(numbers, 2),
        'ConcatDataset': lambda: ConcatDataset([numbers, Numbers(pipeline=[add_noise])]),
        'ClassBalancedDataset': lambda: ClassBalancedDataset(numbers, 0.9),
    }[name]()


@pytest.mark.parametrize('name', ['RepeatDataset', 'ConcatDataset', 'ClassBalancedDataset', 'MultiImageMixDataset'])
def test_wrappers_of_datasets(name):
    dataset = SeededDataset(wrapped(name))
    items = [str(dataset[SeededIndex(len(dataset) - 1, seed)]) for seed in (1, 2, 1)]
    assert items[0] == items[2] != items[1]
    dataset.metainfo  # noqa: B018  which the loops ask for


def test_a_hook_that_switches_the_pipeline_reaches_persistent_workers():
    hooks = pytest.importorskip('mmdet.engine.hooks')
    options = {'num_workers': 1, 'persistent_workers': True, 'collate_fn': list}
    loader = SeededDataLoader.of(DataLoader(Draws(4), batch_size=2, sampler=DefaultSampler(Draws(4)), **options))
    hook = hooks.PipelineSwitchHook(1, [])
    kinds = []
    for epoch in range(2):
        hook.before_train_epoch(SimpleNamespace(epoch=epoch, train_dataloader=loader, logger=logging.getLogger()))
        loader.batch_sampler.start(0, epoch, 0)
        kinds.append({type(item[4]).__name__ for batch in loader for item in batch})
    loader._iterator._shutdown_workers()
    assert kinds == [{'str'}, {'Compose'}]
