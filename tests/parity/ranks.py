"""Runs a function in several gloo processes, which start from one that has the libraries loaded."""

import multiprocessing as mp
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing

PRELOAD = ('mmdet.models', 'mmseg.models', 'mmpretrain.models', 'mmman', 'tests.parity.test_ddp')


def run_ranks(function, world: int, folder, *args) -> None:
    """Call ``function(rank, world, *args)`` in ``world`` processes; an error in one is raised here."""
    mp.get_context('forkserver').set_forkserver_preload([*PRELOAD])
    multiprocessing.start_processes(_run, (function, world, str(folder), *args), nprocs=world, start_method='forkserver')


def _run(rank, function, world, folder, *args):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    function(rank, world, *args)
    dist.destroy_process_group()


def assert_same_on_all_ranks(named_tensors: dict) -> None:
    for name, tensor in named_tensors.items():
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), f'{name} differs from that of rank 0'
