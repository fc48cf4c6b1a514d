"""Two gloo processes: a stopped and resumed run ends as the whole one, each rank with random numbers of its own."""

import os
import random

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from torch import multiprocessing

from mmman.runtime.checkpoint_files import latest_checkpoint
from tests.integration.test_resume import StopAfter, assert_same_training, checkpoint_in, load, start

RANKS, ITERATIONS = 2, 6


class Draws(Hook):
    """What a rank draws in each iteration, and what it trains on."""

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append((random.random(), data_batch['inputs'].sum().item()))


def train(rank, folder):
    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=RANKS)
    wrapper = {'type': 'mmman.LocalDistributedDataParallel', 'broadcast_buffers': False, 'device_ids': None}
    options = {'launcher': 'pytorch', 'cfg': {'model_wrapper_cfg': wrapper}, 'env_cfg': {'dist_cfg': {'backend': 'gloo'}}}
    draws = Draws()
    copies = {'type': 'mmman.EMABiasHook'}
    start(folder / 'whole', seed=5, custom_hooks=[copies, draws], **options)
    start(folder / 'stopped', seed=5, stop=3, custom_hooks=[copies, StopAfter(3)], **options)
    dist.barrier()
    resume = latest_checkpoint(folder / 'stopped')
    dist.barrier()
    start(folder / 'stopped', resume=resume, custom_hooks=[copies], **options)
    torch.save(draws.seen, folder / f'{rank}.pth')
    dist.destroy_process_group()


def test_a_stopped_run_of_two_ranks_ends_as_the_whole_one(tmp_path):
    multiprocessing.spawn(train, (tmp_path,), nprocs=RANKS)
    resumed, whole = (load(checkpoint_in(tmp_path / name)) for name in ('stopped', 'whole'))
    assert whole['meta']['mmman_resume']['data'] == {'processes': RANKS, 'batch size': 3, 'dataset length': 11}
    assert_same_training(resumed, whole, parts=('state_dict', 'optimizer', 'param_schedulers'), iterations=ITERATIONS)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in range(RANKS))
    assert len(first) == len(second) == ITERATIONS
    for ours, theirs in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True):
        assert not {*ours} & {*theirs}
